"""The tensors of a user's model by the names that they had when it was captured.

Adapters such as peft's wrap a layer: what was `proj.weight` becomes `proj.base_layer.weight`. Where
the adapter is fused into it, that is the weight of the layer; where it is not, no tensor is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.inference import ordinary

from .module_json import module_json, owner_of, tensors_of

_BASE = "base_layer"  # how adapters call the layer that they wrap
_SHOWN = 5


class UnfusedAdapter(ConfigError):
    """A layer of a model is wrapped by an adapter that is not part of its weights."""


def shown(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} in all)" if names[_SHOWN:] else "")


def tensor_at(source: nn.Module, name: str) -> Tensor | None:
    """The tensor that `name` means in `source`; None where there is none.

    Raises UnfusedAdapter where the layer that holds it computes something else.
    """
    place = place_of(source, name)
    if place is None:
        return None
    owner, leaf = owner_of(source, place)
    return _own(owner, leaf)


def place_of(source: nn.Module, name: str) -> str | None:
    """Where the tensor `name` is in `source` by now; as `tensor_at`."""
    *path, leaf = name.split(".")
    module, place = source, list[str]()
    for part in path:
        if part in module._modules:
            module = _child(module, part)
            place.append(part)
        elif part != _BASE:  # an adapter that is gone again leaves the layer that it wrapped
            return None
    while _own(module, leaf) is None:
        if not is_wrapped(module):
            return None
        _check_fused(module, ".".join(path))
        module = _child(module, _BASE)
        place.append(_BASE)
    return ".".join([*place, leaf])


def parameters_beside(source: nn.Module, known: Collection[str]) -> list[str]:
    """Parameters of `source` that are not among `known` names, those of adapters left out."""
    adapters = [path for path, module in source.named_modules() if is_wrapped(module)]
    prefixes = tuple(f"{path}." for path in adapters)
    names = [name for name, _ in source.named_parameters(remove_duplicate=False)]
    return [name for name in names if name not in known and not name.startswith(prefixes)]


def ties(source: nn.Module, used: Set[str]) -> tuple[tuple[str, ...], ...]:
    """Groups of names for one parameter of which a graph uses one and the model others as well."""
    groups: dict[int, list[str]] = {}
    for name, value in source.named_parameters(remove_duplicate=False):
        groups.setdefault(id(value), []).append(name)
    return tuple(
        tuple(names) for names in groups.values() if len(names) > 1 and not used.isdisjoint(names)
    )


def check_same_model(
    layers: Mapping[str, Any],
    source: nn.Module,
    *,
    known: Collection[str],
    tied: Iterable[Sequence[str]],
) -> None:
    """Raise ConfigError unless `source` could be the model that was captured.

    layers: how to build those that its graph calls, by path (`module_json.modules_json`).  known:
    names of its parameters.  tied: names that were one parameter.  Compared are parameters, and the
    classes and settings of the layers; not the code.
    """
    kind = type(source).__name__
    if more := parameters_beside(source, known):
        raise ConfigError(f"this {kind} is another model: it has {shown(more)} besides")
    for path, wanted in layers.items():
        found = _layer(source, path)
        theirs = None if found is None or "same_as" in wanted else module_json(found, path)
        if theirs and (different := _difference(wanted, theirs)):
            raise ConfigError(f"this {kind} is another model: {path} is {found}, where {different}")
    for names in tied:
        first, *others = (tensor_at(source, name) for name in names)
        if any(other is not first for other in others):
            raise ConfigError(
                f"{shown(names)} were one parameter when the model was captured and are several in "
                f"this {kind}. Prepare and convert it anew."
            )


def fill(gm: fx.GraphModule, source: nn.Module, constants: Mapping[str, Tensor]) -> None:
    """Put the tensors of `source` into a graph of it, as capturing does: on the same memory.

    constants: tensors that were made while the model was captured.  A source on another device is
    copied to the graph's.  Raises ConfigError naming what `source` lacks or has otherwise.
    """
    missing, different = list[str](), list[str]()
    made: dict[int, Tensor] = {}
    for name, empty in tensors_of(gm).items():
        value = tensor_at(source, name)
        if value is None:
            value = constants.get(name)
        if value is None:
            missing.append(name)
        elif value.is_meta:
            different.append(f"{name} is on the meta device, without content")
        elif value.shape != empty.shape or value.dtype != empty.dtype:
            different.append(f"{name} is {_kind(value)}, where it was {_kind(empty)}")
        else:
            _place(gm, name, value, made)
    kind = type(source).__name__
    if missing:
        raise ConfigError(f"this {kind} is another model: it has no {shown(missing)}")
    if different:
        raise ConfigError(
            f"this {kind} cannot take the place of the model that was captured: {shown(different)}"
        )


def _place(gm: fx.GraphModule, name: str, value: Tensor, made: dict[int, Tensor]) -> None:
    owner, leaf = owner_of(gm, name)
    device = _device(gm)
    if leaf in owner._parameters:
        if id(value) not in made:
            made[id(value)] = nn.Parameter(ordinary(value).to(device), value.requires_grad)
        owner._parameters[leaf] = made[id(value)]  # type: ignore[assignment]
    else:
        owner._buffers[leaf] = (ordinary(value) if value.is_inference() else value).to(device)


def _device(gm: fx.GraphModule) -> torch.device:
    """Where the graph takes its inputs."""
    (first, *_) = gm.graph.find_nodes(op="placeholder")
    device: torch.device = first.meta["val"].device
    return device


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _layer(source: nn.Module, path: str) -> nn.Module | None:
    """The layer at `path`, less what wraps it."""
    module = source
    for part in path.split("."):
        if part in module._modules:
            module = _child(module, part)
        elif part != _BASE:
            return None
    while is_wrapped(module):
        module = _child(module, _BASE)
    return module


def _difference(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What a layer was that it is no more; "" where it is the same.

    Whether it works in place does not count, as capturing may change that.
    """
    if wanted["class"] != found["class"]:
        return f"it was a {wanted['class'].rpartition('.')[2]}"
    old, new = wanted.get("arguments", {}), found.get("arguments", {})
    names = [name for name in old if name != "inplace" and old[name] != new.get(name)]
    return ", ".join(f"{name} was {old[name]}" for name in names)


def _own(module: nn.Module, leaf: str) -> Tensor | None:
    for held in (module._parameters, module._buffers, vars(module)):
        if isinstance(value := held.get(leaf), Tensor):
            return value
    return None


def _child(module: nn.Module, name: str) -> nn.Module:
    child = module._modules[name]
    assert child is not None
    return child


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module is an adapter round a layer."""
    return module._modules.get(_BASE) is not None


def _check_fused(module: nn.Module, path: str) -> None:
    fused = bool(getattr(module, "merged", False))
    disabled = bool(getattr(module, "disable_adapters", False))
    if fused == disabled:  # neither, or an adapter that the next call takes out again
        raise UnfusedAdapter(
            f"{path} has an adapter that is not fused into its weight. Fuse it first "
            "(pipeline.fuse_lora(), or merge_and_unload() of a peft model), or unload it"
        )
