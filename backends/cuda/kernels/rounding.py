"""Rounding in Triton that gives the same bits as torch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to_even(x):
    """The nearest integer, halves to even, as torch.round: exact for |x| < 2**22."""
    magic = 12582912.0  # 1.5 * 2**23: adding it leaves no bits for a fraction
    x = tl.minimum(tl.maximum(x, -4194304.0), 4194304.0)
    return (x + magic) - magic


@triton.jit
def inverse(scale):
    """1 / scale rounded to nearest, as torch does it; `/` is an approximation."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
