"""Make codes of a concatenation from its parts, which are read where they lie.

norm_codes(cat([a, b], 1))    ->    concat_codes([a, b]), the norm included
quantize_input(cat([a, b], 1), s)    ->    concat_codes([a, b])
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, fx

from tfmq_fx.backends.codes.layers import Pads, quantize_input
from tfmq_fx.backends.codes.matching import Codes, is_tensor, written_nodes
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.layer_edits import call_before
from tfmq_fx.ir.node_info import op_name

from . import kernels
from .norm_codes import norm_codes, rows

_NORM = inspect.signature(norm_codes)


def concat_codes(
    x: Tensor,
    more: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    factor: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    scales: list[Tensor],
    zeros: list[int],
    sizes: list[int],
    levels: int,
    pads: Pads,
) -> Tensor:
    """The codes of `norm_codes` for the concatenation of x (B, C, H, W) and more (B, C', H, W);
    with 0 groups those of the concatenation itself."""
    parts = [part.permute(0, 2, 3, 1).contiguous() for part in (x, more)]
    modulation = (rows(weight), rows(bias), eps, rows(factor), rows(shift), silu)
    scales = [scale.reshape(-1) for scale in scales]
    codes: Tensor = kernels.cpu_norm(
        parts[0], groups, *modulation, scales, zeros, sizes, levels, pads, parts[1]
    )
    return codes


concat_codes.stage = Stage.LOWERED  # type: ignore[attr-defined]


def fuse_concat(gm: fx.GraphModule) -> int:
    """Make codes of concatenations of two images from the parts, in place; returns how many."""
    changed, written = 0, written_nodes(gm)
    for node in list(gm.graph.nodes):
        given = _of_norm(node) if node.target is norm_codes else _of_input(node)
        whole = node.args[0] if given is not None else None
        if given is None or not is_tensor(whole) or whole in written:
            continue
        parts = _parts(whole)
        if parts is None or set(parts) & written:
            continue
        made = call_before(node, concat_codes, *parts, *given, name=f"{node.name}_parts")
        node.replace_all_uses_with(made)
        gm.graph.erase_node(node)
        changed += 1
    return changed


def _of_norm(node: fx.Node) -> tuple[Any, ...] | None:
    """The arguments of `concat_codes` beside the parts, for a call of `norm_codes`."""
    given = _NORM.bind(*node.args, **node.kwargs).arguments
    is_image = node.args[0].meta["val"].dim() == 4  # type: ignore[union-attr]
    return (*list(given.values())[1:-1],) if is_image else None


def _of_input(node: fx.Node) -> tuple[Any, ...] | None:
    """The arguments of `concat_codes` beside the parts, for a call of `quantize_input`."""
    if node.target is not quantize_input:
        return None
    codes = Codes.of(node)
    value, scale = codes.x.meta["val"], codes.scale.meta["val"]
    if codes.pads is None or scale.dim() != 1:
        return None
    norm = (0, None, None, 0.0, None, None, False)
    return (*norm, [codes.scale], [codes.zero], [value.shape[1]], codes.levels, codes.pads)


def _parts(whole: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two images that a node concatenates along their channels."""
    if op_name(whole) not in ("cat", "concat", "concatenate"):
        return None
    parts: Any = whole.args[0] if whole.args else whole.kwargs["tensors"]
    along: Any = whole.args[1] if len(whole.args) > 1 else whole.kwargs.get("dim", 0)
    if len(parts) != 2 or along not in (1, -3) or whole.meta["val"].dim() != 4:
        return None
    values = [part.meta["val"] for part in parts]
    fits = all(v.dtype == values[0].dtype and v.dtype in kernels.DTYPES for v in values)
    fits &= all(isinstance(v.shape[1], int) for v in values)
    return (parts[0], parts[1]) if fits else None
