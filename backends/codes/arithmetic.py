"""Quantize, pack weights and apply epilogues in plain torch: the arithmetic of layers on codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tfmq_fx.quant.affine import FP8, to_fp8

STORED_ZERO = 128  # codes in [0, 255] are stored as code - 128, to fit int8


def quantize(x: Tensor, scale: Tensor, zero: int, levels: int, dtype: torch.dtype) -> Tensor:
    """The codes of x on the grid of a layer's input, as they are stored.

    x: channels last, (..., C), any float dtype.  scale: float32, broadcasts to x.
    dtype: int8 (codes - 128), float8_e4m3fn, or for kernels on the CPU uint8.
    Plain torch, so that a compiler fuses it with what computes x.
    """
    steps = x.float() * (1.0 / scale)
    if dtype == FP8:
        return to_fp8(steps)
    codes = (torch.round(steps) + zero).clamp(0, levels)
    return codes.to(torch.uint8) if dtype == torch.uint8 else (codes - STORED_ZERO).to(torch.int8)


def stored_zero(zero: int, dtype: torch.dtype) -> float:
    """The stored value of the code of 0, which borders are filled with."""
    if dtype == FP8:
        return 0.0
    return float(zero if dtype == torch.uint8 else zero - STORED_ZERO)


def packed_half(channels: int) -> int:
    """Channels in each half of a run of packed weights: the widest half that wastes little.

    Tensor cores sum 32 int8 values at a time, and wider loads are cheaper.
    """
    waste = {half: -channels % (2 * half) for half in (64, 32)}
    return 64 if waste[64] * 8 <= channels or waste[64] <= waste[32] else 32


def pack_weight(codes: Tensor, half: int) -> Tensor:
    """4-bit codes (O, R, S, C) packed two to a byte, (O, R, S, bytes) uint8.

    Channel i of each run of 2 * half lies in the low bits of byte i, channel i + half in the high
    bits. Missing channels hold 0.
    """
    filled = F.pad(codes.to(torch.uint8), (0, -codes.shape[3] % (2 * half)))
    runs = filled.unflatten(3, (-1, 2, half))
    packed: Tensor = runs[..., 0, :] | (runs[..., 1, :] << 4)
    return packed.flatten(3).contiguous()


def unpack_weight(packed: Tensor, half: int, channels: int, zero: Tensor) -> Tensor:
    """Undo `pack_weight`, and subtract the zero points (O,): (O, R, S, channels) int8."""
    runs = packed.unflatten(3, (-1, half))
    codes = torch.stack([runs & 15, runs >> 4], -2).flatten(3)[..., :channels]
    return codes.to(torch.int8) - zero.to(torch.int8)[:, None, None, None]


def row_scales(scale: Tensor, result: Tensor) -> Tensor:
    """The scale of each pixel of `result` (B, OH, OW, O), from (ranges,) scales; broadcasts to
    it."""
    batch, height, width = result.shape[:3]
    rows = scale.repeat_interleave(batch * height * width // scale.shape[0])
    return rows.view(batch, height, width, 1)


def finish(
    result: Tensor,
    bias: Tensor | None,
    row: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_zero: int,
    out_levels: int,
    dtype: torch.dtype,
) -> Tensor:
    """Apply the epilogue of a convolution: add to its sums, then quantize or cast them.

    result: (B, OH, OW, O) float32.  bias: (O,).  row: (B, O), added to all pixels of a sample.
    residual: like the result.  out_scale: (ranges,) float32, where the result is quantized into
    `dtype` with zero point `out_zero` and at most `out_levels`; None casts it to `dtype`.
    """
    if bias is not None:
        result = result + bias.float()
    if row is not None:
        result = result + row.float().view(row.shape[0], 1, 1, -1)
    if residual is not None:
        result = result + residual.float()
    if out_scale is None:
        return result.to(dtype)
    return quantize(result, row_scales(out_scale, result), out_zero, out_levels, dtype)
