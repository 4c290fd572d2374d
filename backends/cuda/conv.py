"""Convolution (and linear layer: a 1x1 convolution) of int8 or fp8 values, with its epilogue.

y = ((x * w) + offset) * (scale[range] * weight_scale[o]) + bias[o] + row[b, o] + residual,
summed over one or two segments of input channels, each with scales of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

from tfmq_fx.affine import FP8, to_fp8
from tfmq_fx.errors import BackendError

from .tiles import Tile

STORED_ZERO = 128  # codes in [0, 255] are stored as code - 128, to fit int8


def conv2d_triton(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    zeros: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    offsets: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Tensor | None,
    row: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_zero: int,
    out_levels: int,
    stride: Sequence[int],
    dilation: Sequence[int],
    halves: Sequence[int],
    dtype: torch.dtype,
    tile: Sequence[int],
) -> Tensor:
    """The convolution without padding of channels-last codes: (B, OH, OW, O) in `dtype`.

    The sequences have one entry for each segment of input channels, one or two.
    xs: (B, H, W, C) int8 (codes - 128) or float8_e4m3fn, borders included; pixels may lie apart
    (a slice of channels), the rest contiguous.
    weights: (O, R, S, C) int8 or float8_e4m3fn, or uint8 (O, R, S, bytes) packed by
    `pack_weight`.  zeros: (O,) uint8 zero points of packed weights, else one unused tensor.
    halves: of `pack_weight`, 0 for weights that are not packed.
    weight_scales: (O,) float32.  offsets: (O,) int32, (128 - zero point) * sum of the weights;
    unused for fp8.  scales: (ranges,) float32; ranges divides B * OH * OW: one for all, one a
    sample, or one a row.
    bias: (O,).  row: (B, O), added to all pixels of a sample.  residual: like the result.
    out_scale: (ranges,) float32, where the result is quantized again: `dtype` is int8 (codes - 128
    with `out_zero` and at most `out_levels`) or float8_e4m3fn.
    dtype: of the result.  tile: a `Tile`.
    Raises BackendError for codes of another dtype or layout, and sums that cannot be split.
    """
    from . import kernels

    size = Tile(*tile)
    _check(xs, size)
    first, last = xs[0], xs[-1]
    batch, _, width, _ = first.shape
    out_channels, taps_y, taps_x = weights[0].shape[:3]
    out_height, out_width = out_size(first, weights[0], stride, dilation)
    rows = batch * out_height * out_width
    is_float = first.dtype == FP8
    shape = (batch, out_height, out_width, out_channels)
    if size.split > 1:
        sums = torch.float32 if is_float else torch.int32
        y = first.new_empty((size.split, *shape), dtype=sums)
    else:
        y = first.new_empty(shape, dtype=dtype)
    reach = max(rows * out_channels, *(x.numel() // x.shape[3] * pixel_stride(x) for x in xs))

    def even(x: Tensor, half: int) -> bool:
        return x.shape[3] % (2 * half or size.k) == 0 and out_channels % size.n == 0

    def given(value: Tensor | None) -> Tensor:
        return first if value is None else value

    grid = (-(-rows // size.m) * -(-out_channels // size.n), size.split)
    launcher(kernels.conv_kernel)[grid](
        first,
        weights[0],
        scales[0],
        weight_scales[0],
        offsets[0],
        zeros[0],
        last,
        weights[-1],
        scales[-1],
        weight_scales[-1],
        offsets[-1],
        zeros[-1],
        given(bias),
        given(row),
        given(residual),
        given(out_scale),
        y,
        rows,
        out_height * out_width,
        rows // scales[0].shape[0],
        rows // scales[-1].shape[0],
        rows // out_scale.shape[0] if out_scale is not None else 1,
        out_width,
        out_channels,
        width,
        first.shape[1] * width,
        first.shape[3],
        last.shape[3],
        pixel_stride(first),
        pixel_stride(last),
        weights[0].stride(2),
        weights[-1].stride(2),
        out_zero,
        out_levels,
        TAPS_Y=taps_y,
        TAPS_X=taps_x,
        STRIDE_Y=stride[0],
        STRIDE_X=stride[1],
        DILATION_Y=dilation[0],
        DILATION_X=dilation[1],
        SEGMENTS=len(xs),
        HALF0=halves[0],
        HALF1=halves[-1],
        FLOAT=is_float,
        HAS_BIAS=bias is not None,
        HAS_ROW=row is not None,
        HAS_RESIDUAL=residual is not None,
        REQUANTIZE=out_scale is not None,
        WIDE=bool(reach >= 2**31),
        EVEN0=even(first, halves[0]),
        EVEN1=even(last, halves[-1]),
        BLOCK_M=size.m,
        BLOCK_N=size.n,
        BLOCK_K=size.k,
        GROUP=size.group,
        SPLIT=size.split,
        num_warps=size.warps,
        num_stages=size.stages,
    )
    if size.split == 1:
        return y
    total = y.sum(0, dtype=y.dtype)
    if not is_float:
        total = total + offsets[0]
    result = total.float() * (row_scales(scales[0], total) * weight_scales[0])
    return finish(result, bias, row, residual, out_scale, out_zero, out_levels, dtype)


def conv2d_reference(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    zeros: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    offsets: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Tensor | None,
    row: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_zero: int,
    out_levels: int,
    stride: Sequence[int],
    dilation: Sequence[int],
    halves: Sequence[int],
    dtype: torch.dtype,
    tile: Sequence[int],
) -> Tensor:
    """What `conv2d_triton` computes, in plain torch on any device; sums are exact for integers."""
    _check(xs, Tile(*tile))
    result: Tensor | None = None
    for x, packed, zero, weight_scale, offset, scale, half in zip(
        xs, weights, zeros, weight_scales, offsets, scales, halves, strict=True
    ):
        weight = unpack_weight(packed, half, x.shape[3], zero) if half else packed
        images, filters = x.double().permute(0, 3, 1, 2), weight.double().permute(0, 3, 1, 2)
        total = F.conv2d(images, filters, None, list(stride), 0, list(dilation))
        total = total.permute(0, 2, 3, 1)
        if x.dtype != FP8:
            total = total + offset
        part = total.float() * (row_scales(scale, total) * weight_scale)
        result = part if result is None else result + part
    assert result is not None
    y = finish(result, bias, row, residual, out_scale, out_zero, out_levels, dtype)
    return y.contiguous()


def kernel_op(name: str, launch: Callable[..., Tensor]) -> Any:
    """An operator that launches Triton kernels. Where Triton is missing, torch's triton_op says so
    at every import; there it is a custom operator, which nothing can call on a GPU either."""
    if importlib.util.find_spec("triton") is None:
        return custom_op(name, launch, mutates_args=())
    return triton_op(name, launch, mutates_args=())


conv2d = kernel_op("tfmq_fx::conv2d", conv2d_triton)
conv2d.register_kernel("cpu")(conv2d_reference)


def _fake(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    zeros: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    offsets: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Tensor | None,
    row: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_zero: int,
    out_levels: int,
    stride: Sequence[int],
    dilation: Sequence[int],
    halves: Sequence[int],
    dtype: torch.dtype,
    tile: Sequence[int],
) -> Tensor:
    height, width = out_size(xs[0], weights[0], stride, dilation)
    return xs[0].new_empty((xs[0].shape[0], height, width, weights[0].shape[0]), dtype=dtype)


conv2d.register_fake(_fake)


def _check(xs: Sequence[Tensor], tile: Tile) -> None:
    if any(x.dtype not in (torch.int8, FP8) or x.dtype != xs[0].dtype for x in xs):
        found = ", ".join(str(x.dtype) for x in xs)
        raise BackendError(f"conv2d takes codes in int8 or float8_e4m3fn, all alike, got {found}")
    for x in xs:
        pixel_stride(x)
    if len(xs) > 1 and tile.split > 1:
        raise BackendError(f"programs share sums of one segment only: split is {tile.split}")


def pixel_stride(x: Tensor) -> int:
    """Elements between neighbouring pixels of x (B, H, W, C), all of them evenly apart.

    Dimensions of one element have any stride, and say nothing. Raises BackendError.
    """
    if x.is_contiguous():
        return x.shape[3]
    batch, height, width, channels = x.shape
    apart = [(width, 1), (height, width), (batch, height * width)]  # size, pixels to the next
    found = [(x.stride(2 - i), n) for i, (size, n) in enumerate(apart) if size > 1]
    stride = found[0][0] // found[0][1] if found else channels
    if any(each != stride * n for each, n in found) or (channels > 1 and x.stride(3) != 1):
        raise BackendError(
            f"conv2d takes codes (B, H, W, C) with channels last and pixels evenly apart, got "
            f"shape {tuple(x.shape)} with strides {x.stride()}; call .contiguous() on them"
        )
    return stride


def out_size(
    x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width of the result for x (B, H, W, C), borders included."""
    high, wide = (
        (x.shape[i + 1] - dilation[i] * (weight.shape[i + 1] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    return high, wide


def quantize(x: Tensor, scale: Tensor, zero: int, levels: int, dtype: torch.dtype) -> Tensor:
    """x on the grid of a layer's input, stored: int8 (codes - 128), float8_e4m3fn, or on the CPU
    uint8.

    x: channels last, (..., C), any float dtype.  scale: float32, broadcasts to x.
    Plain torch, so that a compiler fuses it with what computes x.
    """
    steps = x.float() * (1.0 / scale)
    if dtype == FP8:
        return to_fp8(steps)
    codes = (torch.round(steps) + zero).clamp(0, levels)
    return codes.to(torch.uint8) if dtype == torch.uint8 else (codes - STORED_ZERO).to(torch.int8)


def stored_zero(zero: int, dtype: torch.dtype) -> float:
    """The stored value that stands for 0: what borders are filled with."""
    if dtype == FP8:
        return 0.0
    return float(zero if dtype == torch.uint8 else zero - STORED_ZERO)


def packed_half(channels: int) -> int:
    """Channels in each half of a run of packed weights: the widest that wastes little.

    Tensor cores sum 32 int8 values at a time, and wider loads are cheaper.
    """
    waste = {half: -channels % (2 * half) for half in (64, 32)}
    return 64 if waste[64] * 8 <= channels or waste[64] <= waste[32] else 32


def pack_weight(codes: Tensor, half: int) -> Tensor:
    """4-bit codes (O, R, S, C) as (O, R, S, bytes) uint8: channel i of each run of 2 * half lies in
    the low bits of byte i, channel i + half in the high bits. Missing channels hold 0."""
    filled = F.pad(codes.to(torch.uint8), (0, -codes.shape[3] % (2 * half)))
    runs = filled.unflatten(3, (-1, 2, half))
    packed: Tensor = runs[..., 0, :] | (runs[..., 1, :] << 4)
    return packed.flatten(3).contiguous()


def unpack_weight(packed: Tensor, half: int, channels: int, zero: Tensor) -> Tensor:
    """What `pack_weight` was given, less the zero points (O,): (O, R, S, channels) int8."""
    runs = packed.unflatten(3, (-1, half))
    codes = torch.stack([runs & 15, runs >> 4], -2).flatten(3)[..., :channels]
    return codes.to(torch.int8) - zero.to(torch.int8)[:, None, None, None]


def row_scales(scale: Tensor, result: Tensor) -> Tensor:
    """scale (ranges,) for the pixels of `result` (B, OH, OW, O): broadcasts to it."""
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
    """The epilogue, for a result (B, OH, OW, O) in float32; arguments as of `conv2d_triton`."""
    if bias is not None:
        result = result + bias.float()
    if row is not None:
        result = result + row.float().view(row.shape[0], 1, 1, -1)
    if residual is not None:
        result = result + residual.float()
    if out_scale is None:
        return result.to(dtype)
    return quantize(result, row_scales(out_scale, result), out_zero, out_levels, dtype)


def launcher(kernel: Any) -> Any:
    """What launches `kernel`, seen by torch.compile unless Triton interprets it."""
    from triton.runtime.interpreter import InterpretedFunction

    return kernel if isinstance(kernel, InterpretedFunction) else wrap_triton(kernel)
