"""What a model computes besides its tensors: settings, forwards and hooks of its modules.

A graph holds all of this as it was at capture (the scale of an adapter, an epsilon), so a change of
it in the model is a change of the model.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import itertools
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.core.errors import ArtifactError

Behaviour = Mapping[str, Mapping[str, Any]]
"""JSON-ready: module path -> attribute -> what tells its value from another."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CLASS, _FORWARD, _HOOKS = "(class)", "(forward)", "(hooks)"
_OWN = frozenset(vars(nn.Module()))  # what every module has
_OPAQUE = object()
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_MANY, _DEEP = 256, 4  # entries of a container and nesting that are looked at
_BASE = "base_layer"  # how adapters call the layer that they wrap
# What changes no value: where activations are kept, and what libraries note of their own.
_IDLE = _words(
    """inplace gradient_checkpointing _gradient_checkpointing_func _is_hf_initialized
    _hf_hook _old_forward _diffusers_hook _hf_peft_config_loaded peft_config _name_or_path
    sample_size"""
)
# Hooks of accelerate and diffusers that only say where weights lie.
_PLACING = _words(
    """AlignDevicesHook CpuOffload UserCpuOffloadHook SequentialHook GroupOffloadingHook
    LazyPrefetchGroupOffloadingHook LayerExecutionTrackerHook"""
)
_MUTATORS = _words(
    """append appendleft extend insert add update setdefault pop popleft remove clear"""
)


def behaviour(model: nn.Module) -> dict[str, dict[str, Any]]:
    """How each module of `model` behaves: its class, forward, hooks and plain attributes.

    Left out is what forward itself writes (counters, caches), and what no value depends on.
    """
    return {path: _module(module) for path, module in model.named_modules()}


def differences(recorded: Behaviour, model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """What `model` does otherwise than recorded: "path.attribute" -> what it was and what it is.

    Attributes that are new do not count, nor do adapters round a layer that had none: whether those
    are fused into its weight, the weight tells.
    """
    found: dict[str, tuple[Any, Any]] = {}
    gone: list[str] = []
    for path, entry in recorded.items():
        module = _module_at(recorded, model, path)
        if module is None:
            if not any(path.startswith(f"{name}.") for name in gone):  # once for all below it
                found[path] = (entry[_CLASS], None)
            gone.append(path)
            continue
        now = _module(module)
        changed = [n for n, was in entry.items() if n in now and not _agree(was, now[n])]
        for name in changed[:1] if _CLASS in changed else changed:  # another class has others
            found[f"{path}.{name}".removeprefix(".")] = (entry[name], now[name])
    return found


def explained(different: Mapping[str, tuple[Any, Any]], most: int = 3) -> str:
    """The first differences, for a message."""
    lines = [
        f"{name} was {_short(was)}, is {_short(now)}"
        for name, (was, now) in list(different.items())[:most]
    ]
    more = f", ... ({len(different)} in all)" if len(different) > most else ""
    return "; ".join(lines) + more


def settings(recorded: Behaviour, model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Where each recorded module is in `model` by now, and the recorded names of its attributes."""
    for path, entry in recorded.items():
        place = _place(recorded, model, path)
        if place is not None:
            yield ".".join(place), [n for n in entry if n not in (_CLASS, _FORWARD, _HOOKS)]


def _module(module: nn.Module) -> dict[str, Any]:
    """The behaviour of one module."""
    kind: Any = type(module)
    state = vars(module)
    entry: dict[str, Any] = {_CLASS: _name(kind)}
    forward = kind.forward if _is_placed(state) else state.get("forward", kind.forward)
    entry[_FORWARD] = _token(forward)
    hooks = (*state["_forward_pre_hooks"].values(), *state["_forward_hooks"].values())
    entry[_HOOKS] = [_token(hook) for hook in hooks]
    written = _written(kind, "forward") | _OWN | _IDLE
    for name in (*_class_settings(kind), *state):
        if name not in written and name != "forward":
            token = _token(state[name] if name in state else getattr(kind, name))
            if token is not _OPAQUE:
                entry[name] = token
    return entry


def _agree(was: Any, now: Any) -> bool:
    """Whether a value is the recorded one; a dict may have got more entries (a cache does)."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        return all(key in now and _agree(value, now[key]) for key, value in was.items())
    if isinstance(was, list) and isinstance(now, list):
        return len(was) == len(now) and all(map(_agree, was, now))
    return bool(was == now)


def _token(value: Any, depth: int = 0) -> Any:
    """JSON-ready data that tells one value from another; _OPAQUE for what cannot be told."""
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}.{value.name}"
    if isinstance(value, float):  # an adapter's scale, set and unset by a call, may lose a digit
        return float(f"{value:.12g}") if math.isfinite(value) else repr(value)
    if isinstance(value, (torch.dtype, complex)):
        return str(value)
    if isinstance(value, _PLAIN):
        return value
    if depth > _DEEP or isinstance(value, (Tensor, torch.device)):
        return _OPAQUE
    if isinstance(value, (nn.Module, type)):
        return _name(value if isinstance(value, type) else type(value))
    if isinstance(value, Mapping):
        if len(value) > _MANY:
            return _OPAQUE
        items = ((key, _token(v, depth + 1)) for key, v in value.items() if key not in _IDLE)
        return {repr(key): token for key, token in items if token is not _OPAQUE}
    if isinstance(value, (tuple, list, set, frozenset)):
        ordered = value if isinstance(value, (tuple, list)) else sorted(value, key=repr)
        if len(value) > _MANY:
            return _OPAQUE
        return [t for t in (_token(v, depth + 1) for v in ordered) if t is not _OPAQUE]
    if isinstance(value, functools.partial):
        return [_token(part, depth + 1) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, _FUNCTIONS):
        return _function(value, depth)
    return _object(value, depth)


def _function(value: Any, depth: int) -> dict[str, Any]:
    """What tells one function from another: name, constants, defaults, what it closes over."""
    function = getattr(value, "__func__", value)
    token: dict[str, Any] = {"function": f"{function.__module__}.{function.__qualname__}"}
    if isinstance(function, types.FunctionType):
        cells = [cell for cell in function.__closure__ or () if _filled(cell)]
        token["closure"] = _token([cell.cell_contents for cell in cells], depth + 1)
        token["defaults"] = _token([function.__defaults__, function.__kwdefaults__], depth + 1)
        token["code"] = _digest(function.__code__)
    return token


def _digest(code: types.CodeType) -> str:
    """What a function's compiled code does, in short; of one version of Python only."""
    parts = [code.co_code, *(c for c in code.co_consts if isinstance(c, (int, float, str, bytes)))]
    inner = [_digest(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return hashlib.sha256(repr([parts, code.co_names, inner]).encode()).hexdigest()[:16]


def portable(recorded: Behaviour) -> dict[str, dict[str, Any]]:
    """`recorded` without what only this version of Python and this process can compare."""

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            local = ("code",) if "function" in value else ()
            return {key: walk(v) for key, v in value.items() if key not in local}
        return [walk(v) for v in value] if isinstance(value, list) else value

    return {path: walk(entry) for path, entry in recorded.items()}


def restored(data: Any, where: str) -> Behaviour:
    """What `portable` made and JSON kept. Raises ArtifactError where it is something else."""
    entries = data.values() if isinstance(data, dict) else [None]
    if not all(isinstance(entry, dict) and type(entry.get(_CLASS)) is str for entry in entries):
        raise ArtifactError(f"{where}: expected an object of modules, each with its class")
    return {path: dict(entry) for path, entry in data.items()}


def _object(value: Any, depth: int) -> dict[str, Any]:
    """The class of an object that is no module (an attention processor), and its plain settings."""
    state = getattr(value, "__dict__", {})
    kind: Any = type(value)
    written = _written(kind, "__call__")
    settings = {
        repr(name): _token(v, depth + 1)
        for name, v in state.items()
        if name not in written and name not in _IDLE and is_simple(v)
    }
    return {"class": _name(kind), **settings}


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


@functools.cache
def _written(kind: type, entry: str) -> frozenset[str]:
    """Attributes that a class writes or fills itself when `entry` runs: state, no settings."""
    found, seen, todo = set[str](), set[str](), [entry]
    while todo:
        name = todo.pop()
        function = getattr(kind, name, None)
        function = function.fget if isinstance(function, property) else function
        code = _code_of(function)
        if name in seen or code is None:
            continue
        seen.add(name)
        todo += [other for other in code.co_names if other not in seen]
        owner = code.co_varnames[0] if code.co_argcount else ""
        steps = list(dis.get_instructions(code))
        for before, step in itertools.pairwise(steps):
            if step.opname == "STORE_ATTR" and (
                before.opname == "SWAP" or owner in before.argrepr.split(", ")
            ):
                found.add(str(step.argval))
            if step.argval in _MUTATORS and before.opname == "LOAD_ATTR":
                found.add(str(before.argval))
    return frozenset(found)


@functools.cache
def _class_settings(kind: type) -> tuple[str, ...]:
    """Plain attributes that instances have from their class, and may shadow."""
    classes = [each for each in kind.__mro__ if not issubclass(nn.Module, each)]
    return tuple(
        name
        for each in classes
        for name, value in vars(each).items()
        if isinstance(value, _PLAIN) and not name.startswith("__")
    )


def _code_of(function: Any) -> types.CodeType | None:
    return getattr(getattr(function, "__wrapped__", function), "__code__", None)


def _is_placed(state: Mapping[str, Any]) -> bool:
    """Whether a module's forward was replaced only to have its weights brought where it runs."""
    hook, registry = state.get("_hf_hook"), state.get("_diffusers_hook")
    hooks = [hook] if hook is not None else []
    hooks = [*hooks, *getattr(hook, "hooks", ()), *getattr(registry, "hooks", {}).values()]
    return bool(hooks) and all(type(each).__name__ in _PLACING for each in hooks)


def is_simple(value: Any) -> bool:
    """Whether a value is plain data, all of it."""
    if isinstance(value, Mapping):
        return len(value) <= _MANY and all(map(is_simple, value.values()))
    if isinstance(value, (tuple, list, set, frozenset)):
        return len(value) <= _MANY and all(map(is_simple, value))
    return isinstance(value, (*_PLAIN, enum.Enum))


def _module_at(recorded: Behaviour, model: nn.Module, path: str) -> nn.Module | None:
    """The module that a recorded path means by now."""
    place = _place(recorded, model, path)
    return None if place is None else model.get_submodule(".".join(place))


def _place(recorded: Behaviour, model: nn.Module, path: str) -> list[str] | None:
    """Where the module of a recorded path is: in an adapter that was put round it since."""
    place, at, walked = list[str](), model, ""
    for part in path.split(".") if path else ():
        walked = f"{walked}.{part}".removeprefix(".")
        if at._modules.get(part) is None:
            return None
        at = at._modules[part]  # type: ignore[assignment]
        place.append(part)
        while at._modules.get(_BASE) is not None and f"{walked}.{_BASE}" not in recorded:
            at = at._modules[_BASE]  # type: ignore[assignment]
            place.append(_BASE)
    return place


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _short(value: Any) -> str:
    text = "gone" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
