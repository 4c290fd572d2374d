"""Convolve int8 or fp8 codes on CUDA, epilogue included; a linear layer is a 1x1 convolution.

y = ((x * w) + offset) * (scale[range] * weight_scale[o]) + bias[o] + row[b, o] + residual,
summed over one or two segments of input channels, each with scales of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfmq_fx.backends.codes.arithmetic import finish, row_scales, unpack_weight
from tfmq_fx.backends.codes.problem import Tile
from tfmq_fx.core.errors import BackendError
from tfmq_fx.quant.affine import FP8

from .triton_op import kernel_op, launcher


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
    from tfmq_fx.backends.cuda.kernels.conv import conv_kernel

    size = Tile(*tile)
    _check(xs, size)
    high, wide = out_size(xs[0], weights[0], stride, dilation)
    shape = (xs[0].shape[0], high, wide, weights[0].shape[0])
    is_float = xs[0].dtype == FP8
    if size.split > 1:
        sums = torch.float32 if is_float else torch.int32
        y = xs[0].new_empty((size.split, *shape), dtype=sums)
    else:
        y = xs[0].new_empty(shape, dtype=dtype)
    segments = (xs, weights, scales, weight_scales, offsets, zeros)
    added = (bias, row, residual, out_scale)
    rows, columns = math.prod(shape[:3]), shape[3]
    launcher(conv_kernel)[-(-rows // size.m) * -(-columns // size.n), size.split](
        *(each[i] for i in (0, -1) for each in segments),
        *(xs[0] if value is None else value for value in added),
        y,
        *_sizes(xs, weights, scales, out_scale, (high, wide)),
        out_zero,
        out_levels,
        **_constants(xs, weights[0], stride, dilation, halves, size, rows),
        FLOAT=is_float,
        HAS_BIAS=bias is not None,
        HAS_ROW=row is not None,
        HAS_RESIDUAL=residual is not None,
        REQUANTIZE=out_scale is not None,
        num_warps=size.warps,
        num_stages=size.stages,
    )
    if size.split == 1:
        return y
    total = y.sum(0, dtype=y.dtype)
    if not is_float:
        total = total + offsets[0]
    result = total.float() * (row_scales(scales[0], total) * weight_scales[0])
    return finish(result, *added, out_zero, out_levels, dtype)


def _sizes(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    out_scale: Tensor | None,
    out: tuple[int, int],
) -> list[int]:
    """The sizes that `conv_kernel` takes, from `rows` to `tap_stride1`; out: size of the result."""
    batch, height, width, _ = xs[0].shape
    image = out[0] * out[1]
    rows = batch * image
    return [
        rows,
        image,
        rows // scales[0].shape[0],
        rows // scales[-1].shape[0],
        rows // out_scale.shape[0] if out_scale is not None else 1,
        out[1],
        weights[0].shape[0],
        width,
        height * width,
        xs[0].shape[3],
        xs[-1].shape[3],
        pixel_stride(xs[0]),
        pixel_stride(xs[-1]),
        weights[0].stride(2),
        weights[-1].stride(2),
    ]


def _constants(
    xs: Sequence[Tensor],
    weight: Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    halves: Sequence[int],
    tile: Tile,
    rows: int,
) -> dict[str, int | bool]:
    """The constants of `conv_kernel`: how filters move over the input, and how segments lie in
    memory and are cut into tiles; rows: pixels of the result."""
    columns = weight.shape[0]
    reach = max(rows * columns, *(x.numel() // x.shape[3] * pixel_stride(x) for x in xs))

    def even(x: Tensor, half: int) -> bool:
        return x.shape[3] % (2 * half or tile.k) == 0 and columns % tile.n == 0

    return {
        "TAPS_Y": weight.shape[1],
        "TAPS_X": weight.shape[2],
        "STRIDE_Y": stride[0],
        "STRIDE_X": stride[1],
        "DILATION_Y": dilation[0],
        "DILATION_X": dilation[1],
        "SEGMENTS": len(xs),
        "HALF0": halves[0],
        "HALF1": halves[-1],
        "WIDE": bool(reach >= 2**31),
        "EVEN0": even(xs[0], halves[0]),
        "EVEN1": even(xs[-1], halves[-1]),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "GROUP": tile.group,
        "SPLIT": tile.split,
    }


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
    """The result of `conv2d_triton`, in plain torch on any device; sums of integers are exact."""
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


conv2d = kernel_op("tfmq_fx::conv2d", conv2d_triton)
conv2d.register_kernel("cpu")(conv2d_reference)


def _fake(xs: Sequence[Tensor], weights: Sequence[Tensor], *settings: Any) -> Tensor:
    stride, dilation, _, dtype, _ = settings[-5:]
    height, width = out_size(xs[0], weights[0], stride, dilation)
    return xs[0].new_empty((xs[0].shape[0], height, width, weights[0].shape[0]), dtype=dtype)


conv2d.register_fake(_fake)


def _check(xs: Sequence[Tensor], tile: Tile) -> None:
    if any(x.dtype not in (torch.int8, FP8) or x.dtype != xs[0].dtype for x in xs):
        dtypes = ", ".join(str(x.dtype) for x in xs)
        raise BackendError(f"conv2d takes codes in int8 or float8_e4m3fn, all alike, got {dtypes}")
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
    strides = [(x.stride(2 - i), n) for i, (size, n) in enumerate(apart) if size > 1]
    stride = strides[0][0] // strides[0][1] if strides else channels
    if any(each != stride * n for each, n in strides) or (channels > 1 and x.stride(3) != 1):
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
