"""Where values were concatenated, followed through everything that keeps their elements in place.

Following is by position: a norm mixes the values of channels, but what it gives for a channel is
still that channel's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .node_info import is_heavy, op_name, size_hint

Cuts = frozenset[int]  # positions along a dimension at which another part begins


@dataclass(frozen=True, slots=True)
class ConcatParts:
    """Where a value's dimensions were put together from parts.

    cuts: by dimension, 0 < cut < size; dimensions without any are left out.
    lost: why a concatenation behind the value shows no more, or None.
    """

    cuts: Mapping[int, Cuts] = field(default_factory=dict)
    lost: str | None = None


def seams(gm: fx.GraphModule) -> dict[fx.Node, ConcatParts]:
    """The seams of every tensor of a graph; what multiplies matrices makes values without any."""
    found: dict[fx.Node, ConcatParts] = {}
    pieces: dict[fx.Node, list[ConcatParts]] = {}  # of nodes that return several tensors
    for node in gm.graph.nodes:
        found[node] = _seams(gm, node, found, pieces)
    return found


def part_sizes(cuts: Cuts, size: int) -> list[int]:
    """The sizes of the parts of a dimension, in order."""
    edges = [0, *sorted(cuts), size]
    return [b - a for a, b in itertools.pairwise(edges)]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NORMS = (
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.Identity,
)
_SPATIAL = (
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.Upsample,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
)
_ELEMENTWISE_TOO = _words(
    """group_norm layer_norm rms_norm batch_norm instance_norm softmax log_softmax normalize
    truediv iadd isub imul itruediv ipow inplace_ softplus hardtanh prelu
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout
    to type type_as float half double bfloat16 contiguous clone detach alias expand expand_as"""
)
_SPATIAL_NAMES = _words(
    """pad interpolate upsample avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"""
)
_RESHAPES = _words("reshape view view_as reshape_as flatten unflatten squeeze unsqueeze ravel")
_SEVERAL = _words("chunk split tensor_split")


def _seams(
    gm: fx.GraphModule,
    node: fx.Node,
    found: Mapping[fx.Node, ConcatParts],
    pieces: dict[fx.Node, list[ConcatParts]],
) -> ConcatParts:
    inputs = [used for used in node.all_input_nodes if _is_tensor(used) or used in pieces]
    kind, name = _kind(gm, node), op_name(node)
    if not inputs or kind == "heavy":
        return ConcatParts()
    x = inputs[0]
    if name in ("cat", "concat", "concatenate"):
        return _joined(node, found)
    if name == "getitem" and x in pieces:
        index = node.args[1]
        return pieces[x][index] if isinstance(index, int) else ConcatParts()
    dims: dict[int, Cuts] = {}
    if kind == "elementwise":
        for used in inputs:
            for dim, cuts in _aligned(used, node, found[used].cuts):
                dims[dim] = dims.get(dim, frozenset()) | cuts
    elif kind == "spatial":
        dims = {d: c for d, c in found[x].cuts.items() if d < 2 and _size(x, d) == _size(node, d)}
    elif name in _RESHAPES or isinstance(_module(gm, node), (nn.Flatten, nn.Unflatten)):
        dims = dict(_reshaped(x, node, found[x].cuts))
    elif name in ("permute", "transpose", "movedim", "swapaxes", "t", "getitem", "narrow"):
        dims = _indexed(x, node, found[x].cuts)
    elif name in _SEVERAL:
        pieces[node] = list(_pieces(x, node, found[x]))
        return ConcatParts()
    lost = next((found[used].lost for used in inputs if found[used].lost), None)
    if kind == "unknown" and not dims and any(_in_channels(used, found) for used in inputs):
        lost = f"{name or type(_module(gm, node)).__name__} mixes its channels"
    return ConcatParts({dim: cuts for dim, cuts in dims.items() if cuts}, lost)


def _in_channels(node: fx.Node, found: Mapping[fx.Node, ConcatParts]) -> bool:
    """Whether there are seams in a dimension that layers read channels from."""
    rank = len(_shape(node)) if _is_tensor(node) else 0
    return any(dim == rank - 1 or (dim == 1 and rank > 3) for dim in found[node].cuts)


def _kind(gm: fx.GraphModule, node: fx.Node) -> str:
    """What a node does to its dimensions: "elementwise", "spatial", "heavy" or "unknown"."""
    module, name = _module(gm, node), op_name(node)
    if module is not None:
        activation = type(module).__module__ == nn.modules.activation.__name__
        if isinstance(module, _SPATIAL):
            return "spatial"
        if isinstance(module, _NORMS) or (
            activation and not isinstance(module, (nn.MultiheadAttention, nn.GLU))
        ):
            return "elementwise"
    elif name in _ELEMENTWISE_TOO or _is_pointwise(name):
        return "elementwise"
    elif name in _SPATIAL_NAMES:
        return "spatial"
    return "heavy" if is_heavy(gm, node) else "unknown"


def _module(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return gm.get_submodule(str(node.target)) if node.op == "call_module" else None


@functools.cache
def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None) if name else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    return any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _size(node: fx.Node, dim: int) -> int | None:
    """A size that is the same for every input, or None."""
    shape = _shape(node)
    return shape[dim] if dim < len(shape) and isinstance(shape[dim], int) else None


def _joined(node: fx.Node, found: Mapping[fx.Node, ConcatParts]) -> ConcatParts:
    """Of a concatenation: the seams it makes, and those that its parts bring along."""
    parts = node.args[0] if node.args else node.kwargs["tensors"]
    assert isinstance(parts, (list, tuple))
    tensors = [part for part in parts if isinstance(part, fx.Node)]
    value = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    rank = len(_shape(node))
    along = value % rank if isinstance(value, int) else 0
    dims: dict[int, Cuts] = {}
    start: int | None = 0
    for part in tensors:
        for dim, cuts in found[part].cuts.items():
            if dim != along:
                dims[dim] = dims.get(dim, frozenset()) | cuts
            elif start is not None:
                dims[dim] = dims.get(dim, frozenset()) | {start + cut for cut in cuts}
        size = _size(part, along)
        start = None if start is None or size is None else start + size
        if start is not None:
            dims[along] = dims.get(along, frozenset()) | {start}
    total = _size(node, along)
    inner = frozenset(c for c in dims.get(along, ()) if total is not None and 0 < c < total)
    dims[along] = inner
    lost = next((found[part].lost for part in tensors if found[part].lost), None)
    return ConcatParts({dim: cuts for dim, cuts in dims.items() if cuts}, lost)


def _aligned(used: fx.Node, node: fx.Node, cuts: Mapping[int, Cuts]) -> Iterator[tuple[int, Cuts]]:
    """Seams of an operand in an elementwise result, whose dimensions are aligned from the right."""
    if _is_tensor(node):
        shift = len(_shape(node)) - len(_shape(used))
        for dim, positions in cuts.items():
            if dim + shift >= 0 and _size(used, dim) == _size(node, dim + shift):
                yield dim + shift, positions


def _reshaped(x: fx.Node, node: fx.Node, cuts: Mapping[int, Cuts]) -> Iterator[tuple[int, Cuts]]:
    """Seams of dimensions that a reshape leaves whole: of the same size, and as many elements
    behind them."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    before, after = _shape(x), _shape(node)
    for dim, positions in cuts.items():
        for other in range(len(after)):
            if _size(node, other) == before[dim] and statically_known_true(
                _count(before[dim + 1 :]) == _count(after[other + 1 :])
            ):
                yield other, positions
                break


def _count(sizes: tuple[Any, ...]) -> Any:
    count: Any = 1
    for size in sizes:
        count = count * size
    return count


def _indexed(x: fx.Node, node: fx.Node, cuts: Mapping[int, Cuts]) -> dict[int, Cuts]:
    """Seams after dimensions were permuted or sliced, read off tensors of positions.

    Every element says where it stands in one dimension of x; along the dimension of the result in
    which these positions run on, they say which of them are left.
    """
    made: dict[int, Cuts] = {}
    if not _only_moves(node):
        return made
    sizes = [size_hint(size) for size in _shape(x)]
    for dim, positions in cuts.items():
        line = [sizes[dim] if d == dim else 1 for d in range(len(sizes))]
        standing = _run(node, torch.arange(sizes[dim]).view(line).expand(sizes))  # takes no memory
        for other in range(standing.dim()):
            kept = standing[tuple(slice(None) if d == other else 0 for d in range(standing.dim()))]
            if len(kept) > 1 and bool((kept.diff() == 1).all()):
                first, last = int(kept[0]), int(kept[-1])
                made[other] = frozenset(cut - first for cut in positions if first < cut <= last)
    return made


def _only_moves(node: fx.Node) -> bool:
    """Whether the result of a node is a view: no tensor or list picks its elements."""
    index = node.args[1] if op_name(node) == "getitem" else ()
    parts = index if isinstance(index, tuple) else (index,)
    return not any(isinstance(part, (list, fx.Node)) for part in parts) and all(
        size != 0 for size in _shape(node)
    )


def _run(node: fx.Node, value: Tensor) -> Tensor:
    """The result of a node for another tensor, sizes as they were at capture."""

    def given(used: fx.Node) -> Any:
        return value if _is_tensor(used) else size_hint(used.meta["val"])

    args, kwargs = fx.map_arg((node.args, node.kwargs), given)
    call: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
    result = call(*args, **kwargs)
    assert isinstance(result, Tensor)
    return result


def _pieces(x: fx.Node, node: fx.Node, seen: ConcatParts) -> Iterator[ConcatParts]:
    """The seams of each piece of a tensor that was divided along one dimension."""
    value = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    along = value % len(_shape(x)) if isinstance(value, int) else 0
    start: int | None = 0
    for piece in node.meta["val"]:
        size = piece.shape[along]
        dims = {dim: cuts for dim, cuts in seen.cuts.items() if dim != along}
        if start is not None and isinstance(size, int):
            end, all_cuts = start + size, seen.cuts.get(along, frozenset())
            if cuts := frozenset(cut - start for cut in all_cuts if start < cut < end):
                dims[along] = cuts
        start = start + size if start is not None and isinstance(size, int) else None
        yield ConcatParts(dims, seen.lost)
