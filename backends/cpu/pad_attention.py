"""Pad narrow attention heads to the vector width of the CPU's fused kernel.

y = sdpa(q, k, v), 8 channels a head    ->    y = sdpa(pad(q), pad(k), pad(v))[..., :8]
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from tfmq_fx.core.stages import Stage

WIDTH = 16  # float32 lanes; torch's CPU kernel slows down below that


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
