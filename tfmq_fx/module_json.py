"""The modules that a graph calls and the layout of its tensors, as JSON and back.

A torch.nn module is saved as its constructor's arguments, a tfmq_fx module as its spec().
"""

from __future__ import annotations

import inspect
import itertools
import json
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor

from .allowlist import check_path, module_class
from .errors import ArtifactError
from .plain_json import decode, dtype_name, dtype_named, encode, keys


def modules_json(gm: fx.GraphModule) -> dict[str, Any]:
    """How to build every module that the graph calls, by path."""
    table: dict[str, Any] = {}
    seen: dict[nn.Module, str] = {}
    called = {n.target for n in gm.graph.nodes if n.op == "call_module"}
    for path in sorted(called):
        parents = itertools.accumulate(path.split(".")[:-1], lambda a, b: f"{a}.{b}")
        if not called.isdisjoint(parents):
            continue  # rebuilt as a part of another one
        module = gm.get_submodule(path)
        first = seen.setdefault(module, path)
        table[path] = {"same_as": first} if first != path else _module_json(module, path)
    return table


def module_json(module: nn.Module, where: str) -> dict[str, Any] | None:
    """How to build `module`, which lies at `where`, or None where that cannot be said."""
    try:
        return _module_json(module, where)
    except ArtifactError:
        return None


def install_modules(root: nn.Module, table: dict[str, Any]) -> None:
    """Give `root` the modules that `modules_json` described; their tensors come later."""
    for path, entry in table.items():
        check_path(path, path)
        owner, _, leaf = path.rpartition(".")
        same = entry.get("same_as")
        module = _build(entry, path) if same is None else root.get_submodule(same)
        _child(root, owner).add_module(leaf, module)


def tensors_of(gm: fx.GraphModule) -> dict[str, Tensor]:
    """Every tensor that the graph uses, by dotted name, shared ones under each of their names.

    Raises ArtifactError on an attribute that is not a tensor.
    """
    found: dict[str, Tensor] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module = gm.get_submodule(node.target)
            found.update((f"{node.target}.{name}", value) for name, value in _tensors(module))
        elif node.op == "get_attr":
            value = operator.attrgetter(node.target)(gm)
            if not isinstance(value, Tensor):
                raise ArtifactError(
                    f"{node.name}: attribute {node.target!r} is a {type(value).__name__}, "
                    "and only tensors can be saved"
                )
            found[node.target] = value
    return found


def owner_of(gm: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the tensor called `name`, and its name there."""
    path, _, leaf = name.rpartition(".")
    return gm.get_submodule(path), leaf


def tensors_json(gm: fx.GraphModule) -> dict[str, Any]:
    """What `install_tensors` needs to know about `tensors_of(gm)`."""
    table: dict[str, Any] = {}
    seen: dict[Any, str] = {}
    for name, value in tensors_of(gm).items():
        check_path(name, name)
        if type(value) not in (Tensor, nn.Parameter) and not isinstance(value, FakeTensor):
            raise ArtifactError(f"{name}: a {type(value).__name__} cannot be saved, only tensors")
        if value.layout is not torch.strided:
            raise ArtifactError(f"{name}: a tensor of layout {value.layout} cannot be saved")
        owner, leaf = owner_of(gm, name)
        parameter = leaf in owner._parameters
        plain = isinstance(owner, fx.GraphModule) or type(owner) is nn.Module
        if not (parameter or leaf in owner._buffers or plain):
            raise ArtifactError(f"{name}: neither a parameter nor a buffer of {_class_name(owner)}")
        place = (value.untyped_storage()._cdata, value.storage_offset(), value.shape)
        kind = (value.stride(), value.dtype, value.is_conj(), parameter)
        first = seen.setdefault((place, kind), name)
        table[name] = (
            {"same_as": first}
            if first != name
            else {
                "shape": list(value.shape),
                "dtype": dtype_name(value.dtype),
                "parameter": parameter,
                "requires_grad": parameter and value.requires_grad,
                "persistent": leaf not in owner._non_persistent_buffers_set,
            }
        )
    return table


def install_tensors(root: nn.Module, table: dict[str, Any]) -> None:
    """Give every tensor of `table` its place, empty."""
    made: dict[str, Tensor] = {}
    for name, entry in table.items():
        check_path(name, name)
        path, _, leaf = name.rpartition(".")
        owner = _child(root, path)
        if "same_as" in entry:
            tensor = made[keys(entry, name, "same_as")["same_as"]]
        else:
            keys(entry, name, "shape dtype parameter requires_grad persistent")
            dtype = dtype_named(entry["dtype"], name)
            tensor = torch.empty([int(n) for n in entry["shape"]], dtype=dtype)
            if entry["parameter"]:
                tensor = nn.Parameter(tensor, requires_grad=entry["requires_grad"])
        made[name] = tensor
        parameter = isinstance(tensor, nn.Parameter)
        place: Any = owner._parameters if parameter else owner._buffers
        if leaf not in place and type(owner) is nn.Module and not hasattr(owner, leaf):
            register: Any = owner.register_parameter if parameter else owner.register_buffer
            register(leaf, tensor)
        elif (held := place.get(leaf)) is None or (held.is_meta and held.shape != tensor.shape):
            raise ArtifactError(f"{name}: its module has no such tensor of {tuple(tensor.shape)}")
        place[leaf] = tensor


def _module_json(module: nn.Module, where: str) -> dict[str, Any]:
    """How to build `module` again. Raises ArtifactError if that would not give the same module."""
    name = _class_name(module)
    made = module_class(name, where)
    for path, part in module.named_modules():
        if "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks:
            raise ArtifactError(f"{where}.{path}: a module with hooks cannot be saved")
    if _is_own(made):
        spec: Any = module.spec()  # type: ignore[operator]
        try:
            text = json.dumps(spec, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{where}: spec() of {name} is not JSON-ready: {error}") from error
        return {"class": name, "spec": json.loads(text)}
    arguments = {}
    for key in _arguments(made):
        if key in module._parameters:
            arguments[key] = module._parameters[key] is not None
        elif hasattr(module, key):
            arguments[key] = encode(getattr(module, key), f"{where}.{key}")
    entry = {"class": name, "arguments": arguments}
    _check_same(module, _build(entry, where), where)
    return entry


def _build(entry: dict[str, Any], where: str) -> nn.Module:
    """The module that `_module_json` described; its tensors come later."""
    made = module_class(str(entry["class"]), where)
    if _is_own(made):
        built = made.from_spec(keys(entry, where, "class spec")["spec"])  # type: ignore[attr-defined]
        assert isinstance(built, nn.Module)
        return built
    arguments = keys(entry, where, "class arguments")["arguments"]
    if unknown := sorted(set(arguments) - set(_arguments(made))):
        raise ArtifactError(f"{where}: {unknown} are not arguments of {made.__name__}")
    with torch.device("meta"):  # no memory, and the random state is left alone
        return made(**{k: decode(v, f"{where}.{k}") for k, v in arguments.items()})


def _arguments(made: type[nn.Module]) -> list[str]:
    """The constructor's arguments that a save may hold; tensors bring their device and dtype."""
    return [
        key
        for key, parameter in inspect.signature(made).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and not key.startswith("_")
        and key not in ("device", "dtype")
    ]


def _check_same(module: nn.Module, rebuilt: nn.Module, where: str) -> None:
    """Raise ArtifactError unless the constructor's arguments say all that `module` does."""
    parts, made = dict(module.named_modules()), dict(rebuilt.named_modules())
    if {k: type(v) for k, v in parts.items()} != {k: type(v) for k, v in made.items()}:
        raise ArtifactError(f"{where}: a {_class_name(module)} with its parts cannot be rebuilt")
    internal, missing = set(vars(nn.Module())), object()
    for path, part in made.items():
        for name, value in vars(part).items():
            found = getattr(parts[path], name, missing)
            if name not in internal and value is not found and value != found:
                raise ArtifactError(
                    f"{where}: attribute {name!r} of the {_class_name(module)} is {found!r:.80}, "
                    f"but its constructor makes it {value!r:.80}"
                )
    expected, held = (
        {name: tuple(tensor.shape) for name, tensor in _tensors(m)} for m in (rebuilt, module)
    )
    if expected != held:
        raise ArtifactError(
            f"{where}: the {_class_name(module)} holds tensors {held}, "
            f"but its constructor makes {expected}"
        )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, less those that our own constructors compute."""
    yield from module.named_parameters(remove_duplicate=False)
    for name, value in module.named_buffers(remove_duplicate=False):
        owner, leaf = owner_of(module, name)
        if leaf not in owner._non_persistent_buffers_set or not _is_own(type(owner)):
            yield name, value


def _is_own(made: type[nn.Module]) -> bool:
    return made.__module__.startswith("tfmq_fx.")


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _child(module: nn.Module, path: str) -> nn.Module:
    """The module at `path`, made of plain containers where there is none."""
    for part in path.split(".") if path else ():
        if part not in module._modules:
            if type(module) is not nn.Module:
                raise ArtifactError(f"{path}: a {_class_name(module)} has no part {part!r}")
            module.add_module(part, nn.Module())
        found = module._modules[part]
        assert found is not None
        module = found
    return module
