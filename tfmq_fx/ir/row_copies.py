"""Find how many rows a value has for each sample of the batch, and in which order.

Video models repeat a sample's embedding for each frame: repeat_interleave, or unsqueeze, expand
and reshape, put a sample's rows next to each other; repeat and cat put whole batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .node_info import op_name, words

_ADJACENT = words("repeat_interleave")
_BATCHES = words("repeat tile cat concat concatenate")
_MERGES = words("reshape view flatten reshape_as view_as")


def rows_per_sample(rows: int | torch.SymInt, batch: int | torch.SymInt) -> int | None:
    """The number c where `rows` is c times the batch; None where it is not.

    Where the batch is a number, that `rows` is a multiple of it may be chance.
    """
    if isinstance(rows, int) and isinstance(batch, int):
        return rows // batch if rows >= batch and rows % batch == 0 else None
    if isinstance(rows, int) or isinstance(batch, int):
        return None
    times = rows.node.expr / batch.node.expr  # of sympy: no guard is left in the shape environment
    return int(times) if times.is_Integer else None


def batches_adjacent(node: fx.Node, batch: int | torch.SymInt) -> bool | None:
    """Whether the c rows of a sample lie a batch apart in a value (c * batch, ...), not next to
    each other; None where the operation that made them does not tell.
    """
    if batch == 1:
        return False
    while True:
        rows = _rows(node, batch)
        same = [used for used in node.all_input_nodes if _rows(used, batch) == rows]
        if not same:
            break
        node = same[0]
    name = op_name(node)
    if name in _ADJACENT:
        return False
    if name in _BATCHES:
        return True
    source = node.all_input_nodes[0].meta.get("val") if name in _MERGES else None
    if not isinstance(source, Tensor) or source.dim() < 2:
        return None
    first, second = (rows_per_sample(size, batch) for size in source.shape[:2])
    if first == 1 and isinstance(source.shape[1], int):
        return False
    return True if second == 1 and isinstance(source.shape[0], int) else None


def _rows(node: fx.Node, batch: Any) -> int | None:
    value: Any = node.meta.get("val")
    return rows_per_sample(value.shape[0], batch) if _has_rows(value) else None


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
