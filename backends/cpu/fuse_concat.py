"""Make codes of a concatenation from its parts, which are read where they lie.

norm_codes(cat([a, b], 1), ...)    ->    norm_codes(a, ..., more=b)
quantize_input(cat([a, b], 1), s)    ->    norm_codes(a, 0 groups, ..., more=b)
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tfmq_fx.backends.codes.layers import quantize_input
from tfmq_fx.backends.codes.matching import Codes, concatenation, written_nodes
from tfmq_fx.ir.layer_edits import call_before

from . import kernels
from .norm_codes import norm_codes


def fuse_concat(gm: fx.GraphModule) -> int:
    """Make codes of concatenations of two images from the parts, in place; returns how many."""
    changed, written = 0, written_nodes(gm)
    for node in list(gm.graph.nodes):
        rest: tuple[Any, ...] | None = None
        if node.target is norm_codes:
            rest = node.args[1:]
        elif node.target is quantize_input:
            rest = _without_norm(Codes._make(node.args))
        parts = None if rest is None else _images(node.args[0])
        if rest is None or parts is None or {node.args[0], *parts} & written:
            continue
        name, (x, more) = f"{node.name}_parts", parts
        new = call_before(node, norm_codes, x, *rest, more=more, name=name)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        changed += 1
    return changed


def _without_norm(codes: Codes) -> tuple[Any, ...] | None:
    """The arguments of `norm_codes` after x that only quantize x; None where its kernel cannot."""
    if codes.pads is None or codes.scale.meta["val"].dim() != 1:
        return None
    channels = codes.x.meta["val"].shape[1]
    norm = (0, None, None, 0.0, None, None, False)
    grids = ([codes.scale], [codes.zero], [channels], codes.levels, codes.pads, codes.dtype)
    return (*norm, *grids)


def _images(whole: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two images that a node concatenates along their channels, of a dtype kernels read."""
    parts, dim = concatenation(whole)
    if len(parts) != 2 or dim not in (1, -3) or whole.meta["val"].dim() != 4:
        return None
    values = [part.meta["val"] for part in parts]
    fits = all(v.dtype == values[0].dtype and v.dtype in kernels.DTYPES for v in values)
    fits &= all(isinstance(v.shape[1], int) for v in values)
    return (parts[0], parts[1]) if fits else None
