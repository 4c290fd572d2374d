"""Track where values were concatenated, through operations that keep channels in place.

Positions are tracked, not values: a norm mixes the values of channels, but its result for a channel
stays at that channel's position.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .node_info import is_heavy, op_name, size_hint, value_inputs, words

Cuts = frozenset[int]  # positions along a dimension at which a new part begins


@dataclass(frozen=True, slots=True)
class ConcatParts:
    """The positions along a value's dimensions at which concatenated parts begin.

    cuts: by dimension, 0 < cut < size; dimensions without cuts are left out.
    lost: why the cuts of an earlier concatenation could not be tracked to this value, or None.
    """

    cuts: Mapping[int, Cuts] = field(default_factory=dict)
    lost: str | None = None


def concat_parts(gm: fx.GraphModule) -> dict[fx.Node, ConcatParts]:
    """The concatenated parts of every tensor of a graph; results of matrix products have none."""
    parts: dict[fx.Node, ConcatParts] = {}
    pieces: dict[fx.Node, list[ConcatParts]] = {}  # of nodes that return several tensors
    for node in gm.graph.nodes:
        parts[node] = _node_parts(gm, node, parts, pieces)
    return parts


def part_sizes(cuts: Cuts, size: int) -> list[int]:
    """The sizes of the parts of a dimension, in order."""
    edges = [0, *sorted(cuts), size]
    return [b - a for a, b in itertools.pairwise(edges)]


# Files of torch.nn.modules whose layers keep every element, or every channel, in its place.
_ELEMENTWISE_FILES = words("activation batchnorm dropout instancenorm normalization")
_SPATIAL_FILES = words("padding pooling upsampling")
_ELEMENTWISE_TOO = words(
    """group_norm layer_norm rms_norm batch_norm instance_norm softmax log_softmax normalize
    truediv iadd isub imul itruediv ipow inplace_ softplus hardtanh prelu
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout
    to type type_as float half double bfloat16 contiguous clone detach alias expand expand_as"""
)
_SPATIAL_NAMES = words(
    """pad interpolate upsample avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"""
)
_RESHAPES = words("reshape view view_as reshape_as flatten unflatten squeeze unsqueeze ravel")


def _node_parts(
    gm: fx.GraphModule,
    node: fx.Node,
    parts: Mapping[fx.Node, ConcatParts],
    pieces: dict[fx.Node, list[ConcatParts]],
) -> ConcatParts:
    """The parts of a node's result, from `parts` and `pieces` of the nodes before it."""
    inputs = [used for used in node.all_input_nodes if _is_tensor(used) or used in pieces]
    kind, name = _kind(gm, node), op_name(node)
    if not inputs or kind == "heavy":
        return ConcatParts()
    x = inputs[0]
    if name in ("cat", "concat", "concatenate"):
        return _concatenated(node, parts)
    if name == "getitem" and x in pieces:
        index = node.args[1]
        return pieces[x][index] if isinstance(index, int) else ConcatParts()
    dims: dict[int, Cuts] = {}
    if kind == "elementwise":
        dims = _merged(pair for used in inputs for pair in _aligned(used, node, parts[used].cuts))
    elif kind == "spatial":
        dims = {d: c for d, c in parts[x].cuts.items() if d < 2 and _size(x, d) == _size(node, d)}
    elif name in _RESHAPES or isinstance(_module(gm, node), (nn.Flatten, nn.Unflatten)):
        dims = dict(_reshaped(x, node, parts[x].cuts))
    elif name in ("permute", "transpose", "movedim", "swapaxes", "t", "getitem", "narrow"):
        dims = _indexed(x, node, parts[x].cuts)
    elif name in ("chunk", "split", "tensor_split"):
        pieces[node] = list(_pieces(x, node, parts[x]))
        return ConcatParts()
    lost = _first_lost(inputs, parts)
    if kind == "unknown" and not dims and any(_in_channels(used, parts) for used in inputs):
        lost = f"{name or type(_module(gm, node)).__name__} mixes its channels"
    return ConcatParts({dim: cuts for dim, cuts in dims.items() if cuts}, lost)


def _first_lost(nodes: Iterable[fx.Node], parts: Mapping[fx.Node, ConcatParts]) -> str | None:
    return next((parts[node].lost for node in nodes if parts[node].lost), None)


def _merged(pairs: Iterable[tuple[int, Cuts]]) -> dict[int, Cuts]:
    """The union of cuts by dimension."""
    dims: dict[int, Cuts] = {}
    for dim, cuts in pairs:
        dims[dim] = dims.get(dim, frozenset()) | cuts
    return dims


def _in_channels(node: fx.Node, parts: Mapping[fx.Node, ConcatParts]) -> bool:
    """Whether there are cuts in a dimension that layers read channels from."""
    rank = len(_shape(node)) if _is_tensor(node) else 0
    return any(dim == rank - 1 or (dim == 1 and rank > 3) for dim in parts[node].cuts)


def _kind(gm: fx.GraphModule, node: fx.Node) -> str:
    """How a node treats its dimensions: "elementwise", "spatial", "heavy" or "unknown"."""
    module, name = _module(gm, node), op_name(node)
    if module is not None:
        file = type(module).__module__.rpartition(".")[2]
        if file in _SPATIAL_FILES:
            return "spatial"
        mixes = isinstance(module, (nn.MultiheadAttention, nn.GLU))
        if isinstance(module, nn.Identity) or (file in _ELEMENTWISE_FILES and not mixes):
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
    """The size of a dimension where it is a fixed number, or None."""
    shape = _shape(node)
    return shape[dim] if dim < len(shape) and isinstance(shape[dim], int) else None


def _concatenated(node: fx.Node, parts: Mapping[fx.Node, ConcatParts]) -> ConcatParts:
    """The cuts of a concatenation: between its operands, and those of the operands themselves."""
    tensors = value_inputs(node)
    value = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    along = value % len(_shape(node)) if isinstance(value, int) else 0
    dims = _merged(pair for tensor in tensors for pair in parts[tensor].cuts.items())
    dims.pop(along, None)
    start = 0
    edges = set[int]()
    for tensor in tensors:
        edges |= {start, *(start + cut for cut in parts[tensor].cuts.get(along, ()))}
        start += size_hint(_shape(tensor)[along])
    if _size(node, along) == start and (cuts := frozenset(edges - {0})):
        dims[along] = cuts
    return ConcatParts(dims, _first_lost(tensors, parts))


def _aligned(used: fx.Node, node: fx.Node, cuts: Mapping[int, Cuts]) -> Iterator[tuple[int, Cuts]]:
    """The cuts of an operand in an elementwise result; dimensions align from the right."""
    if _is_tensor(node):
        shift = len(_shape(node)) - len(_shape(used))
        for dim, positions in cuts.items():
            if dim + shift >= 0 and _size(used, dim) == _size(node, dim + shift):
                yield dim + shift, positions


def _reshaped(x: fx.Node, node: fx.Node, cuts: Mapping[int, Cuts]) -> Iterator[tuple[int, Cuts]]:
    """The cuts of the dimensions that a reshape leaves whole.

    Such a dimension has the same size before and after, and the same number of elements behind it.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    before, after = _shape(x), _shape(node)
    for dim, positions in cuts.items():
        for other in range(len(after)):
            if _size(node, other) == before[dim] and statically_known_true(
                math.prod(before[dim + 1 :]) == math.prod(after[other + 1 :])
            ):
                yield other, positions
                break


def _indexed(x: fx.Node, node: fx.Node, cuts: Mapping[int, Cuts]) -> dict[int, Cuts]:
    """The cuts after dimensions were permuted or sliced, computed on a tensor of positions.

    Each element of that tensor is its own position along one dimension of x. The dimension of the
    result along which positions still rise by one shows which slice of x is left.
    """
    moved: dict[int, Cuts] = {}
    if not _is_view_of_all(node):
        return moved
    sizes = [size_hint(size) for size in _shape(x)]
    for dim, positions in cuts.items():
        line = [sizes[dim] if d == dim else 1 for d in range(len(sizes))]
        standing = _run(node, torch.arange(sizes[dim]).view(line).expand(sizes))  # takes no memory
        for other in range(standing.dim()):
            row = standing[tuple(slice(None) if d == other else 0 for d in range(standing.dim()))]
            if len(row) > 1 and bool((row.diff() == 1).all()):
                first, last = int(row[0]), int(row[-1])
                moved[other] = frozenset(cut - first for cut in positions if first < cut <= last)
    return moved


def _is_view_of_all(node: fx.Node) -> bool:
    """Whether no tensor or list picks elements, and the result is not empty."""
    index = node.args[1] if op_name(node) == "getitem" else ()
    picks = index if isinstance(index, tuple) else (index,)
    return not any(isinstance(part, (list, fx.Node)) for part in picks) and 0 not in _shape(node)


def _run(node: fx.Node, value: Tensor) -> Any:
    """The result of a node for another tensor, with sizes as they were at capture."""
    args, kwargs = fx.map_arg(
        (node.args, node.kwargs),
        lambda used: value if _is_tensor(used) else size_hint(used.meta["val"]),
    )
    call: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
    return call(*args, **kwargs)


def _pieces(x: fx.Node, node: fx.Node, whole: ConcatParts) -> Iterator[ConcatParts]:
    """The parts of each piece of a tensor that was divided along one dimension."""
    value = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    along = value % len(_shape(x)) if isinstance(value, int) else 0
    dims = {dim: cuts for dim, cuts in whole.cuts.items() if dim != along}
    start = 0
    for piece in node.meta["val"]:
        end = start + size_hint(piece.shape[along])
        inner = (cut - start for cut in whole.cuts.get(along, ()) if start < cut < end)
        cuts = {along: frozenset(inner)} if along in whole.cuts else {}
        yield ConcatParts({d: c for d, c in (dims | cuts).items() if c}, whole.lost)
        start = end
