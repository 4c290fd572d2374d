"""Fuse a lowered graph: make each tensor's codes once, and let kernels add residuals."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.ir.graph_pass import prune
from tfmq_fx.ir.node_info import is_random, op_name
from tfmq_fx.ir.verifier import is_timestep_row
from tfmq_fx.quant.affine import dynamic_scale

from .choice import Chooser
from .fuse_epilogues import absorb_residuals, absorb_rows, merge_concat, requantize
from .fuse_norms import NormCodes, fuse_norms
from .fuse_siblings import join_siblings
from .layers import quantize_input
from .matching import Codes, called, concatenation, is_tensor, same_kind, written_nodes


def fuse(gm: fx.GraphModule, choose: Chooser, *, norm: NormCodes) -> dict[str, int]:
    """Apply all fusions to a graph, in place; returns the count of each, by name.

    choose: chooses the kernel of joined layers.  norm: see `fuse_norms`.
    """
    counts: dict[str, int] = {}
    for fusion in BEFORE_NORMS:
        counts[fusion.__name__] = counts.get(fusion.__name__, 0) + fusion(gm)
        prune(gm.graph)
    counts["fuse_norms"] = fuse_norms(gm, norm=norm)
    prune(gm.graph)
    counts["requantize"] = requantize(gm)
    prune(gm.graph)
    counts["join_siblings"] = join_siblings(gm, choose)
    return counts


def loosen_views(gm: fx.GraphModule) -> int:
    """Replace `view` by `reshape`, in place; returns how many.

    x.view(sizes)    ->    x.reshape(sizes)

    The kernels' results lie channels last, and `view` refuses what their strides do not allow.
    Left alone where the memory is written in place, which a copy would not see.
    """
    written, changed = written_nodes(gm), 0
    for node in gm.graph.find_nodes(op="call_method", target="view"):
        if node not in written and not any(isinstance(a, torch.dtype) for a in node.args):
            node.target = "reshape"
            changed += 1
    return changed


def drop_noops(gm: fx.GraphModule) -> int:
    """Remove nodes that give back their input, in place; returns how many.

    x / 1, identity(x), dropout(x) in eval mode, quantize_input(x.contiguous())    ->    x

    Left alone where the memory of either is written in place.
    """
    written, changed = written_nodes(gm), 0
    for node in list(gm.graph.nodes):
        x = _same_as(gm, node)
        if x is not None and not {x, node} & written:
            node.replace_all_uses_with(x)
            gm.graph.erase_node(node)
            changed += 1
    return changed


def share_quantize(gm: fx.GraphModule) -> int:
    """Make codes of a tensor once for all layers that read the same ones, in place; returns how
    many are saved.

    quantize_input(x, s0), quantize_input(x, s1) with s0 = s1    ->    quantize_input(x, s0)

    Scales are equal by content: columns of one look-up by timestep, static ranges, or ranges
    measured alike.
    """
    written, changed = written_nodes(gm), 0
    first_calls: dict[Any, fx.Node] = {}
    for node in gm.graph.find_nodes(op="call_function", target=quantize_input):
        codes = Codes._make(node.args)
        if codes.x in written:
            continue
        first = first_calls.setdefault(codes._replace(scale=_content(gm, codes.scale)), node)
        if first is not node:
            for user in list(node.users):
                user.replace_input_with(codes.scale, Codes._make(first.args).scale)
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)
            changed += 1
    return changed


def skip_concat(gm: fx.GraphModule) -> int:
    """Replace a slice that is one whole part of a concatenation by that part, in place; returns how
    many.

    narrow(cat([a, b], 1), 1, 0, channels of a)    ->    a
    """
    written, changed = written_nodes(gm), 0
    for node in list(gm.graph.nodes):
        if op_name(node) != "narrow" or len(node.args) != 4 or not is_tensor(node.args[0]):
            continue
        whole = node.args[0]
        part = _part(whole, *node.args[1:])
        if part is not None and not {part, whole, node} & written:
            node.replace_all_uses_with(part)
            gm.graph.erase_node(node)
            changed += 1
    return changed


BEFORE_NORMS = (
    loosen_views,
    drop_noops,
    share_quantize,
    skip_concat,
    merge_concat,
    absorb_rows,
    absorb_residuals,
    absorb_rows,  # (y + r) + row
)
"""Fusions in the order in which they apply: each finds what those before it leave."""


def _same_as(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The argument that a node gives back unchanged; None where it computes something."""
    x = next((a for a in node.args if is_tensor(a)), None)
    if x is None:
        return None
    others, name = [a for a in node.args if a is not x], op_name(node)
    dropout = called(gm, node, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    same = called(gm, node, nn.Identity) is not None
    same |= dropout is not None and not dropout.training
    same |= name == "dropout" and not is_random(gm, node)
    same |= name == "contiguous" and all(user.target is quantize_input for user in node.users)
    if name in ("truediv", "div", "mul") and len(node.args) == 2 and not node.kwargs:
        same = others == [1] and (x is node.args[0] or name == "mul") and same_kind(x, node)
    return x if same else None


def _content(gm: fx.GraphModule, scale: fx.Node) -> Any:
    """A key of a scale, equal for two scales that always hold equal values."""
    if scale.op == "get_attr":
        return _values(gm, scale)
    if scale.target is dynamic_scale:
        return scale.target, scale.args
    row, *index = scale.args
    if scale.target is operator.getitem and is_tensor(row) and is_timestep_row(row):
        table, keys, t = row.all_input_nodes
        if table.op == keys.op == "get_attr":
            return _values(gm, table, *index), keys.target, t
    return scale


def _values(gm: fx.GraphModule, node: fx.Node, index: Any = ...) -> tuple[float, ...]:
    """The values of a buffer, or of a part of it."""
    buffer: Tensor = operator.attrgetter(str(node.target))(gm)
    return tuple(buffer[index].flatten().tolist())


def _part(whole: fx.Node, dim: Any, start: Any, size: Any) -> fx.Node | None:
    """The tensor that fills exactly this slice of a concatenation `whole`; None where none does."""
    parts, along = concatenation(whole)
    rank = whole.meta["val"].dim()
    if not all(isinstance(n, int) for n in (dim, start, size, along)) or (along - dim) % rank:
        return None
    before = 0
    for part in parts:
        width = part.meta["val"].shape[dim]
        if not isinstance(width, int):
            return None
        if (before, width) == (start, size):
            return part
        before += width
    return None
