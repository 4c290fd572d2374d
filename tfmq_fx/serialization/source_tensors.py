"""Find the tensors of a user's model by the names that they had when the model was captured.

Adapters such as peft's wrap a layer: what was `proj.weight` becomes `proj.base_layer.weight`. That
is the weight of the layer if the adapter is fused into it; if not, no tensor is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set

import torch
from torch import Tensor, fx, nn

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.inference import ordinary

from .fingerprints import Fingerprint
from .json_values import dtype_name
from .module_json import owner_of, tensors_of

ADAPTED = "base_layer"  # the attribute of an adapter that holds the layer it wraps
_SHOWN = 5


class UnfusedAdapter(ConfigError):
    """An adapter wraps a layer of a model and is not fused into its weights."""


def shown(names: Sequence[str]) -> str:
    """Join the first names of a list, for a message."""
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} in all)" if names[_SHOWN:] else "")


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module is an adapter that wraps a layer."""
    return module._modules.get(ADAPTED) is not None


def tensor_at(source: nn.Module, name: str) -> Tensor | None:
    """Return the tensor of `source` that was called `name` at capture; None where there is none.

    Raises UnfusedAdapter where an adapter changes what the layer of this tensor computes.
    """
    place = place_of(source, name)
    return None if place is None else _own(*owner_of(source, place))


def place_of(source: nn.Module, name: str) -> str | None:
    """Return the current name of the tensor that was called `name` at capture; see `tensor_at`."""
    *path, leaf = name.split(".")
    module, place = source, list[str]()
    for part in path:
        if part in module._modules:
            module = module.get_submodule(part)
            place.append(part)
        elif part != ADAPTED:  # an adapter that is gone again leaves the layer that it wrapped
            return None
    while _own(module, leaf) is None:
        if not is_wrapped(module):
            return None
        _check_fused(module, ".".join(path))
        module = module.get_submodule(ADAPTED)
        place.append(ADAPTED)
    return ".".join([*place, leaf])


def _own(module: nn.Module, leaf: str) -> Tensor | None:
    for attributes in (module._parameters, module._buffers, vars(module)):
        if isinstance(value := attributes.get(leaf), Tensor):
            return value
    return None


def _check_fused(module: nn.Module, path: str) -> None:
    fused = bool(getattr(module, "merged", False))
    disabled = bool(getattr(module, "disable_adapters", False))
    if fused == disabled:  # neither, or an adapter that the next call takes out again
        raise UnfusedAdapter(
            f"{path} has an adapter that is not fused into its weight. Fuse it first "
            "(pipeline.fuse_lora(), or merge_and_unload() of a peft model), or unload it"
        )


def fused_tensor_at(source: nn.Module, name: str) -> Tensor | None:
    """Return the tensor as `tensor_at` does, or None where an adapter is not fused into it."""
    try:
        return tensor_at(source, name)
    except UnfusedAdapter:
        return None


def changed_tensors(source: nn.Module, fingerprints: Mapping[str, Fingerprint]) -> list[str]:
    """Return the names of the tensors that are gone from `source` or hold other values."""

    def is_same(name: str) -> bool:
        value = fused_tensor_at(source, name)
        return value is not None and fingerprints[name].matches(value)

    return [name for name in fingerprints if not is_same(name)]


def ties(source: nn.Module, used: Set[str]) -> tuple[tuple[str, ...], ...]:
    """Return the groups of names for one parameter of which a graph uses at least one."""
    groups: dict[int, list[str]] = {}
    for name, value in source.named_parameters(remove_duplicate=False):
        groups.setdefault(id(value), []).append(name)
    return tuple(
        tuple(names) for names in groups.values() if len(names) > 1 and not used.isdisjoint(names)
    )


def check_same_model(
    source: nn.Module, *, known: Collection[str], tied: Iterable[Sequence[str]]
) -> None:
    """Raise ConfigError unless `source` has the parameters of the model that was captured.

    known: names of its parameters.  tied: groups of names that were one parameter.
    """
    adapters = tuple(f"{path}." for path, module in source.named_modules() if is_wrapped(module))
    more = [
        name
        for name, _ in source.named_parameters(remove_duplicate=False)
        if name not in known and not name.startswith(adapters)
    ]
    kind = type(source).__name__
    if more:
        raise ConfigError(f"this {kind} is another model: it has {shown(more)} besides")
    for names in tied:
        first, *others = (tensor_at(source, name) for name in names)
        if any(other is not first for other in others):
            raise ConfigError(
                f"{shown(names)} were one parameter when the model was captured and are several in "
                f"this {kind}. Prepare and convert it anew."
            )


def fill(gm: fx.GraphModule, source: nn.Module, constants: Mapping[str, Tensor]) -> None:
    """Put the tensors of `source` into its captured graph; they share memory, as after capture.

    constants: tensors that were made while the model was captured.  A source on another device is
    copied to the graph's.  Raises ConfigError naming the tensors that `source` lacks, or has with
    another shape or dtype.
    """
    missing, different = list[str](), list[str]()
    parameters: dict[int, nn.Parameter] = {}
    for name, empty in tensors_of(gm).items():
        value = tensor_at(source, name)
        if value is None:
            value = constants.get(name)
        if value is None:
            missing.append(name)
        elif value.is_meta:
            different.append(f"{name} is on the meta device, without content")
        elif value.shape != empty.shape or value.dtype != empty.dtype:
            different.append(f"{name} is {_form(value)}, where it was {_form(empty)}")
        else:
            _put(gm, name, value, parameters)
    kind = type(source).__name__
    if missing:
        raise ConfigError(f"this {kind} is another model: it has no {shown(missing)}")
    if different:
        raise ConfigError(
            f"this {kind} cannot take the place of the model that was captured: {shown(different)}"
        )


def _put(gm: fx.GraphModule, name: str, value: Tensor, parameters: dict[int, nn.Parameter]) -> None:
    """Put a tensor into the graph.  parameters: those of the graph so far, by id of the source's,
    since tied parameters must stay one."""
    owner, leaf = owner_of(gm, name)
    (first, *_) = gm.graph.find_nodes(op="placeholder")
    device: torch.device = first.meta["val"].device
    if leaf in owner._parameters:
        if id(value) not in parameters:
            parameter = nn.Parameter(ordinary(value).to(device), value.requires_grad)
            parameters[id(value)] = parameter
        owner._parameters[leaf] = parameters[id(value)]
    else:
        owner._buffers[leaf] = (ordinary(value) if value.is_inference() else value).to(device)


def _form(value: Tensor) -> str:
    return f"{dtype_name(value.dtype)} {tuple(value.shape)}"
