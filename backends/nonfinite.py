"""Detect NaN and Inf in inputs, which codes cannot hold, and mark outputs with NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def is_finite(inputs: Sequence[Tensor]) -> bool:
    """Whether no floating-point input holds NaN or Inf; reads each of them once.

    A sum in float64 of other floats is finite if they are.
    """
    for x in inputs:
        if x.dtype == torch.float64:
            if not x.isfinite().all():
                return False
        elif x.is_floating_point() and not math.isfinite(x.sum(dtype=torch.float64).item()):
            return False
    return True


def with_nan(outputs: Any, inputs: Sequence[Tensor], batched: Sequence[bool]) -> Any:
    """Outputs with NaN in every sample that has a NaN in an input: no more of the model's own
    outputs could be NaN. A NaN in an input without a batch marks all samples.

    Computed where the outputs are, without waiting for that device.
    """
    size = next((len(x) for x, b in zip(inputs, batched, strict=True) if b), 0)
    device = inputs[0].device
    rows = torch.zeros(size, dtype=torch.bool, device=device)
    whole = torch.zeros((), dtype=torch.bool, device=device)
    for x, of_samples in zip(inputs, batched, strict=True):
        if not x.is_floating_point():
            continue
        if of_samples:
            spoiled = x.isnan().flatten(1).any(1) if x.dim() > 1 else x.isnan()
            rows |= spoiled.to(device)
        else:
            whole |= x.isnan().any().to(device)

    def marked(y: Tensor) -> Tensor:
        if not y.is_floating_point():
            return y
        if y.dim() == 0 or len(y) != size:
            return y.masked_fill(rows.any() | whole, math.nan)
        return y.masked_fill((rows | whole).view(-1, *[1] * (y.dim() - 1)), math.nan)

    return tree_map_only(Tensor, marked, outputs)
