"""The memory layout of a tensor: which strides a save keeps, and how they come back.

Kernels choose their path by strides, and paths round differently.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SLACK = 8  # memory that a tensor may take for each element's own


def kept_strides(value: Tensor) -> list[int] | None:
    """The strides of a tensor where they are to be kept; None for a contiguous one, and for one
    that `laid_out` does not make."""
    strides = list(value.stride())
    if value.is_contiguous() or not can_lay_out(value.shape, strides):
        return None
    return strides


def laid_out(value: Tensor, strides: list[int]) -> Tensor:
    """A copy of `value` with these strides."""
    shape = value.shape
    spread = [n > 1 and stride == 0 for n, stride in zip(value.shape, strides, strict=True)]
    for dim, is_spread in enumerate(spread):
        value = value.narrow(dim, 0, 1) if is_spread else value
    made = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
    return made.copy_(value).as_strided(shape, strides)


def can_lay_out(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor may have these strides: no element in two places but for expanded
    dimensions, and little memory that no element takes."""
    taken, numel = 1, 1
    for stride, n in sorted(zip(strides, shape, strict=True)):
        if n > 1 and stride:
            if stride < taken:
                return False
            taken += (n - 1) * stride
            numel *= n
    return taken <= _SLACK * numel
