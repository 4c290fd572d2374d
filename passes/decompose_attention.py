"""Write fused attention out as products and a softmax.

y = sdpa(q, k, v, mask)    ->    y = matmul(softmax(matmul(q * scale, k^T) + mask), v)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph_pass import Declined, Rewrite, graph_pass
from tfmq_fx.ir.layer_edits import call_before, replace_call
from tfmq_fx.ir.node_info import is_view, op_name

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_NEEDS_LAYOUT = ("view", "view_as", "as_strided")


@graph_pass(takes=Stage.CAPTURED, gives=Stage.CAPTURED)
def decompose_attention(gm: fx.GraphModule) -> Rewrite:
    """The graph with scaled dot-product attention as single steps; equal up to reassociation.

    The last product keeps the node's name.  A query that a mask hides every key from gets 0, as
    from the fused operation.  In half precision the fused operation keeps its scores in float32,
    the steps do not.  Attention with dropout, or inside a module, is declined.
    """
    declined, changed = [], 0
    for node in list(gm.graph.nodes):
        name = op_name(node)
        is_module = node.op == "call_module"
        parts = gm.get_submodule(str(node.target)).modules() if is_module else ()
        inside = any(isinstance(part, nn.MultiheadAttention) for part in parts)
        if inside or name == "multi_head_attention_forward":
            declined.append(Declined(node.name, "attention inside torch.nn.MultiheadAttention"))
        elif name == "scaled_dot_product_attention":
            call = dict(zip(_ARGUMENTS, node.args, strict=False)) | node.kwargs
            reason = _obstacle(node, call)
            if reason is None:
                _write_out(node, call)
                changed += 1
            else:
                declined.append(Declined(node.name, reason))
    return Rewrite(gm, changed, declined)


def _obstacle(node: fx.Node, call: dict[str, Any]) -> str | None:
    """Why a call of fused attention cannot be written out, or None where it can."""
    if call.get("dropout_p", 0.0) != 0:
        return "it has dropout"
    if call.get("is_causal", False) not in (True, False):
        return "whether it is causal is computed"
    if call.get("is_causal") and call.get("attn_mask") is not None:
        return "it is causal and has a mask as well"
    query, key, value = (call[name].meta["val"] for name in _ARGUMENTS[:3])
    if call.get("scale") is None and not isinstance(query.shape[-1], int):
        return "the size of its heads is not fixed"
    if call.get("enable_gqa"):
        heads = [x.shape[-3] if x.dim() > 2 else None for x in (query, key, value)]
        if not all(isinstance(count, int) for count in heads):
            return "the number of its heads is not fixed"
    return None


def _write_out(node: fx.Node, call: dict[str, Any]) -> None:
    """Replace a call of fused attention by its steps; the last one takes over the name."""
    query, key, value = (call[name] for name in _ARGUMENTS[:3])
    scale = call.get("scale")
    if scale is None:
        scale = query.meta["val"].shape[-1] ** -0.5
    scaled = _step(node, "query", torch.mul, query, scale)
    if call.get("enable_gqa"):
        heads = query.meta["val"].shape[-3]
        times = [heads // x.meta["val"].shape[-3] for x in (key, value)]
        key, value = (
            _step(node, "heads", torch.repeat_interleave, x, n, dim=-3)
            for x, n in zip((key, value), times, strict=True)
        )
    turned = _step(node, "key", torch.transpose, key, -2, -1)
    scores = _step(node, "scores", torch.matmul, scaled, turned)
    mask, hidden = call.get("attn_mask"), None
    if call.get("is_causal"):
        ones = _step(node, "ones", torch.ones_like, scores, dtype=torch.bool)
        later = _step(node, "later", torch.triu, ones, 1)
        scores = _step(node, "masked", torch.masked_fill, scores, later, float("-inf"))
    elif mask is not None:
        if mask.meta["val"].dtype == torch.bool:
            drop = _step(node, "drop", torch.logical_not, mask)
            scores = _step(node, "masked", torch.masked_fill, scores, drop, float("-inf"))
        else:
            scores = _step(node, "masked", torch.add, scores, mask)
        gone = _step(node, "gone", torch.eq, scores, float("-inf"))
        hidden = _step(node, "hidden", torch.all, gone, -1, keepdim=True)
        # before the softmax too: its gradient would be NaN
        scores = _step(node, "shown", torch.masked_fill, scores, hidden, 0.0)
    weights = _step(node, "softmax", torch.softmax, scores, -1)
    if hidden is not None:
        weights = _step(node, "weights", torch.masked_fill, weights, hidden, 0.0)
    product = _step(node, "product", torch.matmul, weights, value)
    layout = _layout(node.meta["val"])
    if _views_follow(node) and _layout(product.meta["val"]) != layout:
        turned = _step(node, "turned", torch.permute, product, layout)
        packed = _step(node, "packed", torch.clone, turned, memory_format=torch.contiguous_format)
        back = tuple(layout.index(dim) for dim in range(len(layout)))
        product = _step(node, "back", torch.permute, packed, back)
    replace_call(node, product)


def _views_follow(node: fx.Node) -> bool:
    """Whether a view that needs a certain memory layout is taken of the result."""
    todo = [node]
    while todo:
        for user in todo.pop().users:
            if op_name(user) in _NEEDS_LAYOUT:
                return True
            if is_view(user):
                todo.append(user)
    return False


def _layout(value: Tensor) -> tuple[int, ...]:
    """The dimensions of a value, outermost in memory first."""
    strides = [s if isinstance(s, int) else int(s.node.hint or 1) for s in value.stride()]
    return tuple(sorted(range(value.dim()), key=lambda dim: -strides[dim]))


def _step(node: fx.Node, name: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call in front of `node`, named after it."""
    return call_before(node, target, *args, name=f"{node.name}_{name}", **kwargs)
