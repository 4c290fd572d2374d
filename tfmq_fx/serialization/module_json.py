"""The modules that a graph calls and the layout of its tensors, as JSON and back.

A torch.nn module is saved as its constructor's arguments, a tfmq_fx module as its spec().
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor

from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.core.module_overrides import has_hooks, replaced_methods
from tfmq_fx.core.strides import can_lay_out, kept_strides
from tfmq_fx.quant.timestep_table import QuantTimestepTable

from .allowlist import check_path, module_class
from .json_values import decode, dtype_name, dtype_named, encode, keys, typed
from .saved_names import class_name, is_own

# What our modules' constructors take, those of all of them.
_SPEC: dict[str, Any] = {
    **dict.fromkeys(("weight_bits", "weight_groups", "groups", "rows", "bits", "rank"), int),
    **dict.fromkeys(("in_channels", "out_channels"), int),
    **dict.fromkeys(("per_timestep", "bias", "dynamic", "integer_keys"), bool),
    **dict.fromkeys(("dtype", "weight_format", "act_format", "padding_mode", "grid"), str),
    **dict.fromkeys(("weight_shape", "stride", "dilation", "kernel_size", "widths"), list),
    "act_bits": int | None,
    "padding": list | str,
}
_LAYERS = 100  # of a recurrent network


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


def install_modules(root: nn.Module, table: Any, where: str = "modules") -> None:
    """Give `root` the modules that `modules_json` described, their tensors on the meta device.

    Raises ArtifactError, naming `where` and the path, on anything that was not written there.
    """
    if type(table) is not dict:
        raise ArtifactError(f"{where}: expected an object, found {table!r:.80}")
    for path, entry in table.items():
        check_path(path, f"{where}.{path}")
        owner, _, leaf = path.rpartition(".")
        with _damaged(f"{where}.{path}"):
            if type(entry) is dict and "same_as" in entry:
                first = keys(entry, f"{where}.{path}", "same_as")["same_as"]
                if first not in table or "same_as" in table[first]:
                    raise ArtifactError(f"{where}.{path}: there is no module {first!r:.80}")
                module = root.get_submodule(first)
            else:
                module = _build(entry, f"{where}.{path}")
            _child(root, owner).add_module(leaf, module)


@contextlib.contextmanager
def _damaged(where: str) -> Iterator[None]:
    """What constructors raise on arguments that they were never given, as ArtifactError."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"{where}: damaged: {type(error).__name__}: {error}") from error


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
        layout = kept_strides(value)
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
            | ({} if layout is None else {"stride": layout})
        )
    return table


def install_computed(root: nn.Module) -> None:
    """Give the modules of `root` the buffers that follow from their settings, in memory."""
    for module in root.modules():
        if isinstance(module, QuantTimestepTable):
            module.feature = module.columns()


def install_tensors(root: nn.Module, table: Any, where: str = "tensors") -> None:
    """Give every tensor of `table` its place, on the meta device."""
    if type(table) is not dict:
        raise ArtifactError(f"{where}: expected an object, found {table!r:.80}")
    made: dict[str, Tensor] = {}
    for name, entry in table.items():
        here = f"{where}.{name}"
        check_path(name, here)
        path, _, leaf = name.rpartition(".")
        owner = _child(root, path)
        if type(entry) is dict and "same_as" in entry:
            first = keys(entry, here, "same_as")["same_as"]
            if type(first) is not str or first not in made:
                raise ArtifactError(f"{here}: {first!r:.80} does not come before it")
            tensor = made[first]
        else:
            tensor = _empty(entry, here)
        made[name] = tensor
        parameter = isinstance(tensor, nn.Parameter)
        place: Any = owner._parameters if parameter else owner._buffers
        if leaf not in place and type(owner) is nn.Module and not hasattr(owner, leaf):
            register: Any = owner.register_parameter if parameter else owner.register_buffer
            register(leaf, tensor)
        else:
            _check_held(owner, leaf, place.get(leaf), tensor, entry, here)
        place[leaf] = tensor


def _empty(entry: Any, where: str) -> Tensor:
    keys(entry, where, "shape dtype parameter requires_grad persistent", "stride")
    typed(entry, where, shape=list, parameter=bool, requires_grad=bool, persistent=bool)
    dtype, shape = dtype_named(entry["dtype"], where), _sizes(entry["shape"], f"{where}.shape")
    if "stride" in entry:
        strides = _sizes(entry["stride"], f"{where}.stride")
        if len(strides) != len(shape) or not can_lay_out(shape, strides):
            raise ArtifactError(f"{where}.stride: {strides} is no layout of {shape}")
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    if not entry["parameter"]:
        return tensor
    if entry["requires_grad"] and not (dtype.is_floating_point or dtype.is_complex):
        raise ArtifactError(f"{where}: {entry['dtype']} has no gradient")
    return nn.Parameter(tensor, requires_grad=entry["requires_grad"])


def _check_held(
    owner: nn.Module, leaf: str, held: Tensor | None, tensor: Tensor, entry: Any, where: str
) -> None:
    """Raise ArtifactError unless a module that was built has the tensor that is listed for it."""
    found = None if held is None else tuple(held.shape)
    if held is None or not held.is_meta or held.shape != tensor.shape:
        raise ArtifactError(
            f"{where}: its module has no such tensor of {tuple(tensor.shape)}, but of {found}"
        )
    if is_own(type(owner)):
        kinds = [t.dtype if not t.is_floating_point() else "float" for t in (held, tensor)]
        if kinds[0] != kinds[1] or not entry.get("persistent", True):
            raise ArtifactError(f"{where}: its module has {held.dtype} there, not {tensor.dtype}")


def _sizes(data: Any, where: str) -> list[int]:
    if type(data) is not list or not all(type(n) is int and n >= 0 for n in data):
        raise ArtifactError(f"{where}: {data!r:.80} is no list of sizes")
    if len(data) > 32 or math.prod(n for n in data if n) >= 1 << 60:
        raise ArtifactError(f"{where}: {data!r:.80} is larger than any tensor")
    return data


def _module_json(module: nn.Module, where: str) -> dict[str, Any]:
    """How to build `module` again. Raises ArtifactError if that would not give the same module."""
    name = _class_name(module)
    made = module_class(name, where)
    for path, part in module.named_modules():
        if has_hooks(part) or replaced_methods(part):
            place = f"{where}.{path}".removesuffix(".")
            raise ArtifactError(
                f"{place}: a module with hooks cannot be saved; take them off before prepare()"
            )
    if is_own(made):
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
        elif key == "bias" and isinstance(module, nn.MultiheadAttention):
            arguments[key] = module.in_proj_bias is not None
        elif hasattr(module, key):
            arguments[key] = encode(getattr(module, key), f"{where}.{key}")
    entry = {"class": name, "arguments": arguments}
    _check_same(module, _build(entry, where), where)
    return entry


def _build(entry: Any, where: str) -> nn.Module:
    """The module that `_module_json` described, its tensors on the meta device: no memory, and the
    random state is left alone."""
    keys(entry, where, "class", "arguments spec")
    made = module_class(entry["class"], where)
    if is_own(made):
        spec = keys(entry, where, "class spec")["spec"]
        _check_spec(spec, f"{where}.spec")
        with _damaged(f"{where}.spec"), torch.device("meta"):
            built = made.from_spec(spec)  # type: ignore[attr-defined]
        assert isinstance(built, nn.Module)
        return built
    arguments = keys(entry, where, "class arguments")["arguments"]
    keys(arguments, f"{where}.arguments", "", " ".join(_arguments(made)))
    decoded = {k: decode(v, f"{where}.arguments.{k}") for k, v in arguments.items()}
    if type(decoded.get("num_layers", 1)) is not int or decoded.get("num_layers", 1) > _LAYERS:
        raise ArtifactError(f"{where}.arguments.num_layers: more than {_LAYERS}")
    with _damaged(f"{where}.arguments"), torch.device("meta"):
        return made(**decoded)


def _check_spec(spec: Any, where: str) -> None:
    """Raise ArtifactError unless the arguments of one of our modules are of the right types."""
    if type(spec) is not dict:
        raise ArtifactError(f"{where}: expected an object, found {spec!r:.80}")
    typed(spec, where, **{key: kind for key, kind in _SPEC.items() if key in spec})
    for key, value in spec.items():
        if key == "dtype" and not dtype_named(value, f"{where}.dtype").is_floating_point:
            raise ArtifactError(f"{where}.dtype: {value} is no floating dtype")
        if type(value) is list:
            _sizes(value, f"{where}.{key}")
        if type(value) is int and not 0 <= value < 1 << 40:
            raise ArtifactError(f"{where}.{key}: {value} is out of range")


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
        if leaf not in owner._non_persistent_buffers_set or not is_own(type(owner)):
            yield name, value


def _class_name(module: nn.Module) -> str:
    return class_name(type(module))


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
