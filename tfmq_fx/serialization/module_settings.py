"""Record what a model computes with besides its tensors: settings, forwards and hooks of modules.

A graph holds all of this as it was at capture (the scale of an adapter, an epsilon), so a change of
it in the model is a change of the model.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import itertools
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.core.errors import ArtifactError

from .source_tensors import ADAPTED

Behaviour = Mapping[str, Mapping[str, Any]]
"""JSON-ready: module path -> attribute -> token that differs where the attribute differs."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CLASS, _FORWARD, _HOOKS = "(class)", "(forward)", "(hooks)"
_OPAQUE = object()  # the token of a value that cannot be compared
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype)
_CONTAINERS = (Mapping, tuple, list, set, frozenset)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_MAX_ENTRIES, _MAX_DEPTH = 256, 4  # of containers whose values are compared
# Attributes that no output depends on: where activations are kept, and notes of libraries.
_IDLE = _words(
    """inplace gradient_checkpointing _gradient_checkpointing_func _is_hf_initialized
    _hf_hook _old_forward _diffusers_hook _hf_peft_config_loaded peft_config _name_or_path
    sample_size"""
)
_NO_SETTINGS = _IDLE | set(vars(nn.Module())) | {"forward"}
# Hooks of accelerate and diffusers that only move weights.
_MOVING_HOOKS = _words(
    """AlignDevicesHook CpuOffload UserCpuOffloadHook SequentialHook GroupOffloadingHook
    LazyPrefetchGroupOffloadingHook LayerExecutionTrackerHook"""
)
_MUTATORS = _words("append appendleft extend insert add update setdefault pop popleft remove clear")


def behaviour(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Record the class, forward, hooks and plain attributes of each module of `model`.

    Left out are attributes that forward itself writes (counters, caches), and those that no output
    depends on.
    """
    return {path: _module_behaviour(module) for path, module in model.named_modules()}


def _module_behaviour(module: nn.Module) -> dict[str, Any]:
    kind: Any = type(module)
    state = vars(module)
    forward = kind.forward if _only_moved(state) else state.get("forward", kind.forward)
    hooks = (*state["_forward_pre_hooks"].values(), *state["_forward_hooks"].values())
    tokens = {_CLASS: _name(kind), _FORWARD: _token(forward), _HOOKS: [*map(_token, hooks)]}
    ignored = _written(kind, "forward") | _NO_SETTINGS
    for name in (*_class_settings(kind), *state):
        if name not in ignored:
            tokens[name] = _token(state[name] if name in state else getattr(kind, name))
    return {name: token for name, token in tokens.items() if token is not _OPAQUE}


def _only_moved(state: Mapping[str, Any]) -> bool:
    """Whether a module's forward was replaced only to have its weights moved to where it runs."""
    hook, registry = state.get("_hf_hook"), state.get("_diffusers_hook")
    hooks = [hook] if hook is not None else []
    hooks = [*hooks, *getattr(hook, "hooks", ()), *getattr(registry, "hooks", {}).values()]
    return bool(hooks) and all(type(each).__name__ in _MOVING_HOOKS for each in hooks)


@functools.cache
def _class_settings(kind: type) -> tuple[str, ...]:
    """Return the names of plain attributes that instances have from their class."""
    classes = [each for each in kind.__mro__ if not issubclass(nn.Module, each)]
    return tuple(
        name
        for each in classes
        for name, value in vars(each).items()
        if isinstance(value, _PLAIN) and not name.startswith("__")
    )


@functools.cache
def _written(kind: type, entry: str) -> frozenset[str]:
    """Return the names of attributes that the method `entry` of a class, and the methods that it
    calls, assign or fill: these are state, no settings."""
    written, seen, todo = set[str](), set[str](), [entry]
    while todo:
        function = getattr(kind, name := todo.pop(), None)
        function = function.fget if isinstance(function, property) else function
        code = getattr(getattr(function, "__wrapped__", function), "__code__", None)
        if name in seen or code is None:
            continue
        seen.add(name)
        todo += code.co_names
        for before, step in itertools.pairwise(dis.get_instructions(code)):
            if step.opname == "STORE_ATTR":
                written.add(str(step.argval))
            if step.argval in _MUTATORS and before.opname == "LOAD_ATTR":
                written.add(str(before.argval))
    return frozenset(written)


def _token(value: Any, depth: int = 0) -> Any:
    """Return JSON-ready data that differs for values that differ; _OPAQUE where that is unknown."""
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}.{value.name}"
    if isinstance(value, float):  # an adapter's scale, set and unset by a call, may lose a digit
        return float(f"{value:.12g}") if math.isfinite(value) else repr(value)
    if isinstance(value, (torch.dtype, complex)):
        return str(value)
    if isinstance(value, _PLAIN):
        return value
    if depth > _MAX_DEPTH or isinstance(value, (Tensor, torch.device)):
        return _OPAQUE
    if isinstance(value, (nn.Module, type)):
        return _name(value if isinstance(value, type) else type(value))
    if isinstance(value, _CONTAINERS) and len(value) > _MAX_ENTRIES:
        return _OPAQUE
    if isinstance(value, Mapping):
        items = ((repr(k), _token(v, depth + 1)) for k, v in value.items() if k not in _IDLE)
        return {key: token for key, token in items if token is not _OPAQUE}
    if isinstance(value, _CONTAINERS):
        ordered = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [t for t in (_token(v, depth + 1) for v in ordered) if t is not _OPAQUE]
    if isinstance(value, functools.partial):
        return [_token(part, depth + 1) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, _FUNCTIONS):
        return _function_token(value, depth)
    kind: Any = type(value)  # of an object that is no module, such as an attention processor
    settings = {
        repr(name): _token(v, depth + 1)
        for name, v in getattr(value, "__dict__", {}).items()
        if name not in _written(kind, "__call__") | _IDLE and is_simple(v)
    }
    return {"class": _name(kind), **settings}


def _function_token(value: Any, depth: int) -> dict[str, Any]:
    """Return what distinguishes a function: name, code, defaults and the values it closes over."""
    function = getattr(value, "__func__", value)
    token: dict[str, Any] = {"function": f"{function.__module__}.{function.__qualname__}"}
    if isinstance(function, types.FunctionType):
        closure = []
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                closure.append(cell.cell_contents)
        token["closure"] = _token(closure, depth + 1)
        token["defaults"] = _token([function.__defaults__, function.__kwdefaults__], depth + 1)
        token["code"] = hash(function.__code__)  # in this process only; see `portable`
    return token


def is_simple(value: Any) -> bool:
    """Whether a value is plain data, all of it."""
    if not isinstance(value, _CONTAINERS):
        return isinstance(value, (*_PLAIN, enum.Enum))
    values = value.values() if isinstance(value, Mapping) else value
    return len(value) <= _MAX_ENTRIES and all(map(is_simple, values))


def portable(recorded: Behaviour) -> dict[str, dict[str, Any]]:
    """Return `recorded` without the tokens that only this process can compare."""

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            is_function = "function" in value
            return {k: walk(v) for k, v in value.items() if not (is_function and k == "code")}
        return [walk(v) for v in value] if isinstance(value, list) else value

    return {path: walk(tokens) for path, tokens in recorded.items()}


def restored(data: Any, where: str) -> Behaviour:
    """Check the JSON of what `portable` returned. Raises ArtifactError where it is damaged."""
    entries = data.values() if isinstance(data, dict) else [None]
    if not all(isinstance(entry, dict) and type(entry.get(_CLASS)) is str for entry in entries):
        raise ArtifactError(f"{where}: expected an object of modules, each with its class")
    return data  # type: ignore[no-any-return]


def differences(recorded: Behaviour, model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Compare `model` with its record: "path.attribute" -> recorded value and value now.

    New attributes do not count, nor do adapters round a layer that had none: the layer's weight
    shows whether they are fused.
    """
    different: dict[str, tuple[Any, Any]] = {}
    gone: list[str] = []
    for path, was in recorded.items():
        place = _place(recorded, model, path)
        if place is None:
            if not any(path.startswith(f"{name}.") for name in gone):  # once for all below it
                different[path] = (was[_CLASS], None)
            gone.append(path)
            continue
        now = _module_behaviour(model.get_submodule(place))
        changed = [n for n, token in was.items() if n in now and not _agree(token, now[n])]
        for name in changed[:1] if _CLASS in changed else changed:  # another class has others
            different[f"{path}.{name}".removeprefix(".")] = (was[name], now[name])
    return different


def _agree(was: Any, now: Any) -> bool:
    """Whether two tokens are equal; a dict may have more entries now (a cache gets them)."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        return all(key in now and _agree(value, now[key]) for key, value in was.items())
    if isinstance(was, list) and isinstance(now, list):
        return len(was) == len(now) and all(map(_agree, was, now))
    return bool(was == now)


def explained(different: Mapping[str, tuple[Any, Any]]) -> str:
    """Describe the first three of `differences` for a message; "" where there are none."""
    lines = [
        f"{name} was {_short(was)}, is {_short(now)}"
        for name, (was, now) in itertools.islice(different.items(), 3)
    ]
    return "; ".join(lines) + (f", ... ({len(different)} in all)" if len(different) > 3 else "")


def _short(value: Any) -> str:
    text = "gone" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def current_settings(recorded: Behaviour, model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Yield the current path of each recorded module of `model`, and its recorded attributes."""
    for path, tokens in recorded.items():
        place = _place(recorded, model, path)
        if place is not None:
            yield place, [name for name in tokens if name not in (_CLASS, _FORWARD, _HOOKS)]


def _place(recorded: Behaviour, model: nn.Module, path: str) -> str | None:
    """Return the current path of a recorded module: inside an adapter that has wrapped it since."""
    place, module, walked = list[str](), model, ""
    for part in path.split(".") if path else ():
        walked = f"{walked}.{part}".removeprefix(".")
        if module._modules.get(part) is None:
            return None
        module = module.get_submodule(part)
        place.append(part)
        while module._modules.get(ADAPTED) is not None and f"{walked}.{ADAPTED}" not in recorded:
            module = module.get_submodule(ADAPTED)
            place.append(ADAPTED)
    return ".".join(place)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
