"""Write the modules that a graph calls and the layout of its tensors as JSON, and rebuild them.

A torch.nn module is saved as its constructor's arguments, a tfmq_fx module as its spec().
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor

from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.core.module_overrides import has_hooks, replaced_methods
from tfmq_fx.core.strides import can_lay_out, kept_strides, laid_out
from tfmq_fx.ir.graph import OPAQUE
from tfmq_fx.quant.timestep_table import QuantTimestepTable

from .allowlist import check_path, module_class
from .json_values import decode, dtype_name, dtype_named, encode, fields, keys, naming, typed
from .saved_names import class_name, is_own

# What our modules' constructors take, those of all of them.
_SPEC: dict[str, Any] = {
    **dict.fromkeys(("weight_bits", "weight_groups", "groups", "rows", "bits", "rank"), int),
    **dict.fromkeys(("in_channels", "out_channels"), int),
    **dict.fromkeys(("per_timestep", "bias", "dynamic", "integer_keys"), bool),
    **dict.fromkeys(("dtype", "weight_format", "act_format", "padding_mode", "grid"), str),
    **dict.fromkeys(("weight_shape", "stride", "dilation", "kernel_size", "widths"), list),
    "output_padding": list,
    "act_bits": int | None,
    "padding": list | str,
}
_TENSOR = {
    **dict.fromkeys(("shape", "dtype"), object),  # checked by `_sizes` and `dtype_named`
    **dict.fromkeys(("parameter", "requires_grad", "persistent"), bool),
}
_LAYERS = 100  # of a recurrent network
_RECURRENT: dict[type[nn.Module], tuple[str, ...]] = {
    nn.GRU: (),
    nn.LSTM: ("proj_size",),
    nn.RNN: ("nonlinearity",),
}
_RECURRENT_ARGUMENTS = (
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
)


def modules_json(gm: fx.GraphModule) -> dict[str, Any]:
    """Return how to build every module that the graph calls, by path."""
    table: dict[str, Any] = {}
    seen: dict[nn.Module, str] = {}
    called = {n.target for n in gm.graph.nodes if n.op == "call_module"}
    for path in sorted(called):
        parents = itertools.accumulate(path.split(".")[:-1], lambda a, b: f"{a}.{b}")
        if not called.isdisjoint(parents):
            continue  # rebuilt as a part of another one
        module = gm.get_submodule(path)
        if path in gm.meta.get(OPAQUE, {}):
            raise ArtifactError(
                f"{path}: a {class_name(type(module))} that is opaque ({gm.meta[OPAQUE][path]}): "
                f"it runs as the model's own code, which no file holds. Convert the model in the "
                f"process that uses it; convert(checkpoint=FOLDER) keeps the work between processes"
            )
        first = seen.setdefault(module, path)
        table[path] = {"same_as": first} if first != path else module_json(module, path)
    return table


def install_modules(root: nn.Module, table: Any, where: str = "modules") -> None:
    """Add the modules that `modules_json` described to `root`, their tensors on the meta device.

    Raises ArtifactError, naming `where` and the path, on a damaged entry.
    """
    for path, entry in keys(table, where, "", None).items():
        here = f"{where}.{path}"
        check_path(path, here)
        owner, _, leaf = path.rpartition(".")
        with naming(here):
            if type(entry) is dict and "same_as" in entry:
                first = fields(entry, here, same_as=str)["same_as"]
                if first not in table or "same_as" in table[first]:
                    raise ArtifactError(f"{here}: there is no module {first!r:.80}")
                module = root.get_submodule(first)
            else:
                module = _build(entry, here)
            _make_module(root, owner).add_module(leaf, module)


def tensors_of(gm: fx.GraphModule) -> dict[str, Tensor]:
    """Return every tensor that the graph uses, by dotted name, shared ones under each name.

    Raises ArtifactError on an attribute that is not a tensor.
    """
    tensors: dict[str, Tensor] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module = gm.get_submodule(node.target)
            tensors.update((f"{node.target}.{name}", value) for name, value in _tensors(module))
        elif node.op == "get_attr":
            value = operator.attrgetter(node.target)(gm)
            if not isinstance(value, Tensor):
                raise ArtifactError(
                    f"{node.name}: attribute {node.target!r} is a {type(value).__name__}, "
                    "and only tensors can be saved"
                )
            tensors[node.target] = value
    return tensors


def owner_of(gm: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds the tensor called `name`, and its name there."""
    path, _, leaf = name.rpartition(".")
    return gm.get_submodule(path), leaf


def tensors_json(gm: fx.GraphModule) -> dict[str, Any]:
    """Return shape, dtype, layout and sharing of `tensors_of(gm)`, for `install_tensors`."""
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
            raise ArtifactError(
                f"{name}: neither a parameter nor a buffer of {class_name(type(owner))}"
            )
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
    """Fill the buffers of the modules in `root` that their settings determine."""
    for module in root.modules():
        if isinstance(module, QuantTimestepTable):
            module.feature = module.columns()


def install_tensors(
    root: nn.Module, table: Any, where: str, stored: Mapping[str, Tensor] | None = None
) -> None:
    """Put every tensor of `table` into its module in `root`.

    stored: the tensors that a file holds; None: they stay empty, on the meta device.
    """
    listed = {
        name
        for name, entry in keys(table, where, "", None).items()
        if not (type(entry) is dict and "same_as" in entry)
    }
    if stored is not None and listed != stored.keys():
        raise ArtifactError(
            f"the file of tensors does not fit the graph: missing {sorted(listed - stored.keys())},"
            f" not used {sorted(stored.keys() - listed)}"
        )
    tensors: dict[str, Tensor] = {}
    for name, entry in table.items():
        here = f"{where}.{name}"
        check_path(name, here)
        path, _, leaf = name.rpartition(".")
        owner = _make_module(root, path)
        if type(entry) is dict and "same_as" in entry:
            first = fields(entry, here, same_as=str)["same_as"]
            if first not in tensors:
                raise ArtifactError(f"{here}: {first!r:.80} does not come before it")
            tensor = tensors[first]
        else:
            tensor = _empty(entry, here)
            if stored is not None:
                tensor = _filled(tensor, stored[name], entry.get("stride"), name)
        tensors[name] = tensor
        parameter = isinstance(tensor, nn.Parameter)
        place: Any = owner._parameters if parameter else owner._buffers
        if leaf not in place and type(owner) is nn.Module and not hasattr(owner, leaf):
            register: Any = owner.register_parameter if parameter else owner.register_buffer
            register(leaf, tensor)
        else:
            _check_held(owner, leaf, place.get(leaf), tensor, entry, here)
        place[leaf] = tensor
    for module in root.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # its list of its parameters


def _empty(entry: Any, where: str) -> Tensor:
    fields(entry, where, "stride", **_TENSOR)
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


def _filled(empty: Tensor, value: Tensor, strides: list[int] | None, name: str) -> Tensor:
    """Return a tensor of the file in the form of `empty`. Raises ArtifactError if it has another
    shape or dtype."""
    if empty.is_complex() and value.shape[-1:] == (2,) and value.dtype is empty.dtype.to_real():
        value = torch.view_as_complex(value)
    if value.shape != empty.shape or value.dtype != empty.dtype:
        raise ArtifactError(
            f"in the file {name} is {value.dtype} {tuple(value.shape)}, "
            f"but the graph takes {empty.dtype} {tuple(empty.shape)}"
        )
    value = value if strides is None else laid_out(value, strides)
    return nn.Parameter(value, empty.requires_grad) if isinstance(empty, nn.Parameter) else value


def _check_held(
    owner: nn.Module, leaf: str, held: Tensor | None, tensor: Tensor, entry: Any, where: str
) -> None:
    """Raise ArtifactError unless a module that was built has the tensor that is listed for it."""
    if held is None or not held.is_meta or held.shape != tensor.shape:
        shape = None if held is None else tuple(held.shape)
        raise ArtifactError(
            f"{where}: its module has no such tensor of {tuple(tensor.shape)}, but of {shape}"
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


def module_json(module: nn.Module, where: str) -> dict[str, Any]:
    """Return how to build `module`, which lies at `where`.

    Raises ArtifactError if that would not give the same module.
    """
    name = class_name(type(module))
    kind = module_class(name, where)
    for path, part in module.named_modules():
        if has_hooks(part) or replaced_methods(part):
            place = f"{where}.{path}".removesuffix(".")
            raise ArtifactError(
                f"{place}: a module with hooks cannot be saved; take them off before prepare()"
            )
    if is_own(kind):
        spec: Any = module.spec()  # type: ignore[operator]
        try:
            text = json.dumps(spec, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{where}: spec() of {name} is not JSON-ready: {error}") from error
        return {"class": name, "spec": json.loads(text)}
    arguments = {}
    for key in _arguments(kind):
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
    """Build the module that `module_json` described, its tensors on the meta device, which takes no
    memory and no random numbers."""
    keys(entry, where, "class", "arguments spec")
    kind = module_class(entry["class"], where)
    if is_own(kind):
        spec = keys(entry, where, "class spec")["spec"]
        _check_spec(spec, f"{where}.spec")
        with naming(f"{where}.spec"), torch.device("meta"):
            return kind.from_spec(spec)  # type: ignore[attr-defined, no-any-return]
    arguments = keys(entry, where, "class arguments")["arguments"]
    keys(arguments, f"{where}.arguments", "", " ".join(_arguments(kind)))
    decoded = {k: decode(v, f"{where}.arguments.{k}") for k, v in arguments.items()}
    layers = decoded.get("num_layers", 1)
    if type(layers) is not int or layers > _LAYERS:
        raise ArtifactError(f"{where}.arguments.num_layers: more than {_LAYERS}")
    with naming(f"{where}.arguments"), torch.device("meta"):
        return kind(**decoded)


def _check_spec(spec: Any, where: str) -> None:
    """Raise ArtifactError unless the arguments of one of our modules are of the right types."""
    keys(spec, where, "", None)
    typed(spec, where, **{key: kind for key, kind in _SPEC.items() if key in spec})
    for key, value in spec.items():
        if key == "dtype" and not dtype_named(value, f"{where}.dtype").is_floating_point:
            raise ArtifactError(f"{where}.dtype: {value} is no floating dtype")
        if type(value) is list:
            _sizes(value, f"{where}.{key}")
        if type(value) is int and not 0 <= value < 1 << 40:
            raise ArtifactError(f"{where}.{key}: {value} is out of range")


def _arguments(kind: type[nn.Module]) -> list[str]:
    """Return the constructor's arguments that a save may hold; tensors have their own dtype."""
    if kind in _RECURRENT:  # their signatures are (*args, **kwargs)
        return [*_RECURRENT_ARGUMENTS, *_RECURRENT[kind]]
    return [
        key
        for key, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and not key.startswith("_")
        and key not in ("device", "dtype")
    ]


def _check_same(module: nn.Module, rebuilt: nn.Module, where: str) -> None:
    """Raise ArtifactError unless `rebuilt` equals `module` in its parts, attributes and tensors."""
    kind = class_name(type(module))
    parts, new_parts = dict(module.named_modules()), dict(rebuilt.named_modules())
    if {k: type(v) for k, v in parts.items()} != {k: type(v) for k, v in new_parts.items()}:
        raise ArtifactError(f"{where}: a {kind} with its parts cannot be rebuilt")
    internal, missing = set(vars(nn.Module())), object()
    for path, part in new_parts.items():
        for name, new in vars(part).items():
            value = getattr(parts[path], name, missing)
            if name in ("_flat_weights", "_flat_weight_refs") and isinstance(part, nn.RNNBase):
                continue  # the parameters once more
            if name not in internal and new is not value and new != value:
                raise ArtifactError(
                    f"{where}: attribute {name!r} of the {kind} is {value!r:.80}, "
                    f"but its constructor makes it {new!r:.80}"
                )
    shapes, new_shapes = (
        {name: tuple(tensor.shape) for name, tensor in _tensors(m)} for m in (module, rebuilt)
    )
    if shapes != new_shapes:
        raise ArtifactError(
            f"{where}: the {kind} holds tensors {shapes}, but its constructor makes {new_shapes}"
        )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name, except those that our own constructors compute."""
    yield from module.named_parameters(remove_duplicate=False)
    for name, value in module.named_buffers(remove_duplicate=False):
        owner, leaf = owner_of(module, name)
        if leaf not in owner._non_persistent_buffers_set or not is_own(type(owner)):
            yield name, value


def _make_module(module: nn.Module, path: str) -> nn.Module:
    """Return the module at `path`, adding plain containers where there is none."""
    for part in path.split(".") if path else ():
        if part not in module._modules:
            if type(module) is not nn.Module:
                kind = class_name(type(module))
                raise ArtifactError(f"{path}: a {kind} has no part {part!r}")
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module
