"""Run attention on the CPU with the kernel of this package, or with heads padded for torch's own.

y = sdpa(q, k, v)    ->    y = cpu_attention(q, k, v, scale)
y = sdpa(q, k, v), 8 channels a head    ->    y = sdpa(pad(q), pad(k), pad(v))[..., :8]
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from tfmq_fx.core.stages import Stage

from . import kernels

WIDTH = 16  # float32 lanes; torch's CPU kernel slows down below that


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """softmax(query key^T scale) value, products in bfloat16.

    query: (B, H, L, D), key, value: (B, H, K, D), float32 or bfloat16.  scale: None is D ** -0.5.
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if scale is None:
        scale = query.shape[-1] ** -0.5
    y: Tensor = kernels.cpu_attention(query, key, value, scale)
    return y


attention.stage = Stage.LOWERED  # type: ignore[attr-defined]


def use_kernel(gm: fx.GraphModule) -> int:
    """Replace attention by the kernel of this package where it can run it, in place; returns how
    many."""
    changed = 0
    for node in gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
        arguments = _arguments(node)
        if arguments is not None:
            node.target, node.args, node.kwargs = attention, arguments, {}
            changed += 1
    return changed


def _arguments(node: fx.Node) -> tuple[Any, ...] | None:
    """The arguments of `attention` for a node, or None where it computes something else."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    if len(node.args) > len(names):
        return None
    call = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    plain = not (call.get("dropout_p") or call.get("is_causal") or call.get("enable_gqa"))
    scale = call.get("scale")
    tensors = [call.get(name) for name in names[:3]]
    if not plain or call.get("attn_mask") is not None or isinstance(scale, fx.Node):
        return None
    values = [x.meta["val"] for x in tensors if isinstance(x, fx.Node)]
    if len(values) < 3 or any(v.dim() != 4 or v.device.type != "cpu" for v in values):
        return None
    if any(v.dtype != values[0].dtype for v in values) or values[0].dtype not in kernels.DTYPES:
        return None
    leading = {str(tuple(v.shape[:2])) for v in values}  # else one broadcasts to another
    return (*tensors, scale) if len(leading) == 1 else None


def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Scaled dot-product attention with head channels padded by zeros to 16, and cut again.

    The same function up to float reassociation: zeros add nothing to a product, and the scale stays
    that of the width given. query, key, value: (..., tokens, channels); the rest as for
    torch.nn.functional.scaled_dot_product_attention.
    """
    width, out = query.shape[-1], value.shape[-1]
    if kwargs.get("scale") is None:
        kwargs = {**kwargs, "scale": width**-0.5}
    # contiguous: padding keeps the strides of interleaved heads, which the kernel reads more slowly
    query = F.pad(query, (0, WIDTH - width)).contiguous()
    key = F.pad(key, (0, WIDTH - width)).contiguous()
    value = F.pad(value, (0, WIDTH - out)).contiguous()
    return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)[..., :out]


padded_attention.stage = Stage.LOWERED  # type: ignore[attr-defined]


def pad_attention(gm: fx.GraphModule) -> int:
    """Use `padded_attention` for narrow heads on the CPU, in place; returns how many."""
    changed = 0
    for node in gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
        query, _, value = node.args[:3] if len(node.args) >= 3 else (None, None, None)
        if not (isinstance(query, fx.Node) and isinstance(value, fx.Node)) or len(node.args) > 6:
            continue  # the scale is given by position, or the tensors by name
        widths = [query.meta["val"].shape[-1], value.meta["val"].shape[-1]]
        on_cpu = query.meta["val"].device.type == "cpu"
        if on_cpu and all(isinstance(w, int) and w < WIDTH for w in widths):
            node.target = padded_attention
            changed += 1
    return changed
