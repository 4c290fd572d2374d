"""Save and restore the strides of a tensor.

Kernels choose their path by strides, and paths round differently.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SLACK = 8  # the most memory of a tensor, relative to that of its elements


def kept_strides(value: Tensor) -> list[int] | None:
    """The strides to save with a tensor; None for a contiguous one or where `laid_out` cannot
    restore them."""
    strides = list(value.stride())
    return None if value.is_contiguous() or not can_lay_out(value.shape, strides) else strides


def laid_out(value: Tensor, strides: list[int]) -> Tensor:
    """A copy of `value` with these strides."""
    shape = value.shape
    for dim, (n, stride) in enumerate(zip(shape, strides, strict=True)):
        if n > 1 and stride == 0:  # expanded: one element in memory
            value = value.narrow(dim, 0, 1)
    memory = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
    return memory.copy_(value).as_strided(shape, strides)


def can_lay_out(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether `laid_out` can give a tensor these strides: no two elements in one place unless
    expanded, and little unused memory between them."""
    extent, numel = 1, 1
    for stride, n in sorted(zip(strides, shape, strict=True)):
        if n > 1 and stride:
            if stride < extent:
                return False
            extent += (n - 1) * stride
            numel *= n
    return extent <= _SLACK * numel
