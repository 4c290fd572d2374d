"""The Triton kernel of an implicit-GEMM convolution on channels-last tensors."""

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import inverse, round_to_even


@triton.jit
def _accumulate(
    x_ptr,
    w_ptr,
    zero_ptr,  # (O,) uint8 zero points of packed weights
    pixels,  # (BLOCK_M,) index of the first input pixel of each output pixel
    cols,  # (BLOCK_N,) output channels
    part,  # the one of SPLIT parts of the loop over taps and blocks of channels that is summed
    channels,
    pixel_stride,  # of x, in elements
    tap_stride,  # of w, in bytes or elements
    width,  # of x, in pixels
    out_channels,
    TAPS_X: tl.constexpr,
    TAPS: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides channels, BLOCK_N divides out_channels
    HALF: tl.constexpr,  # 0, or the channels in each half of a run of packed 4-bit weights
    FLOAT: tl.constexpr,  # fp8, accumulated in float32
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The sum over taps and channels of x * w: (BLOCK_M, BLOCK_N) int32, or float32 for fp8."""
    LOADED: tl.constexpr = HALF if HALF > 0 else BLOCK_K
    STEP: tl.constexpr = 2 * HALF if HALF > 0 else BLOCK_K  # packed weights have their own
    NOTHING: tl.constexpr = 0.0 if FLOAT else 0
    SUM: tl.constexpr = tl.float32 if FLOAT else tl.int32
    k = tl.arange(0, LOADED)
    blocks = tl.cdiv(channels, STEP)
    steps = TAPS * blocks
    x_rows = x_ptr + pixels * pixel_stride
    w_rows = w_ptr + cols.to(tl.int64) * (tap_stride * TAPS)
    if HALF > 0:
        zeros = tl.load(zero_ptr + cols, mask=cols < out_channels, other=0).to(tl.int8)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
    for step in range(part * steps // SPLIT, (part + 1) * steps // SPLIT):
        tap = step // blocks
        block = step % blocks
        shift = (tap // TAPS_X) * DILATION_Y * width + (tap % TAPS_X) * DILATION_X
        x_tile = x_rows[:, None] + (shift * pixel_stride + block * STEP + k)[None, :]
        if HALF > 0:
            # a byte holds channels k (low) and k + HALF (high) of its run
            w_tile = w_rows[None, :] + (tap * tap_stride + block * HALF + k)[:, None]
            if EVEN:
                packed = tl.load(w_tile)
                low_x = tl.load(x_tile)
                high_x = tl.load(x_tile + HALF)
            else:
                left = channels - block * STEP
                packed = tl.load(w_tile, mask=(cols < out_channels)[None, :], other=0)
                low_x = tl.load(x_tile, mask=(k < left)[None, :], other=0)
                high_x = tl.load(x_tile + HALF, mask=(k + HALF < left)[None, :], other=0)
            low = (packed & 15).to(tl.int8) - zeros[None, :]
            high = (packed >> 4).to(tl.int8) - zeros[None, :]
            acc = tl.dot(low_x, low, acc, out_dtype=tl.int32)
            acc = tl.dot(high_x, high, acc, out_dtype=tl.int32)
        else:
            w_tile = w_rows[None, :] + (tap * tap_stride + block * STEP + k)[:, None]
            if EVEN:
                a = tl.load(x_tile)
                b = tl.load(w_tile)
            else:
                left = channels - block * STEP
                inside = k < left
                real = inside[:, None] & (cols < out_channels)[None, :]
                a = tl.load(x_tile, mask=inside[None, :], other=NOTHING)
                b = tl.load(w_tile, mask=real, other=NOTHING)
            acc = tl.dot(a, b, acc, out_dtype=SUM)
    return acc


@triton.jit
def _tile_of(
    pid, rows, out_channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
):
    """Rows, and first column, of the tile of program `pid`: GROUP rows of tiles share weights in
    the L2."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(out_channels, BLOCK_N)
    group = pid // (GROUP * tiles_n)
    first = group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    row = (first + inside % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, inside // size * BLOCK_N


@triton.jit
def _pixels_of(
    row,  # (BLOCK_M,) output pixels, all within bounds
    rows_per_sample,
    out_width,
    width,
    image,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The sample of each output pixel, and the index of the first input pixel that it reads."""
    sample = row // rows_per_sample
    place = row % rows_per_sample
    y = place // out_width * STRIDE_Y
    x = place % out_width * STRIDE_X
    pixels = sample * image + y * width + x
    if WIDE:
        sample = sample.to(tl.int64)
        pixels = pixels.to(tl.int64)
    return sample, pixels


@triton.jit
def _with_offset(total, offset_ptr, col, out_channels, FLOAT: tl.constexpr):
    """The sums of one segment in float32, integers with what their zero point adds."""
    if not FLOAT:
        total += tl.load(offset_ptr + col, mask=col < out_channels, other=0)[None, :]
    return total.to(tl.float32)


@triton.jit
def _scale(scale_ptr, weight_scale_ptr, safe, col, rows_per_range, out_channels):
    """The unit of the sums of one segment: (BLOCK_M, BLOCK_N) float32."""
    of_input = tl.load(scale_ptr + safe // rows_per_range)[:, None]
    return of_input * tl.load(weight_scale_ptr + col, mask=col < out_channels, other=0.0)[None, :]


@triton.jit
def _write_part(total, part, row, col, rows, out_channels, y_ptr):
    """Store the sums of one of several programs that share a tile."""
    inside = (row < rows)[:, None] & (col < out_channels)[None, :]
    at = row[:, None] * out_channels + col[None, :]
    tl.store(y_ptr + part.to(tl.int64) * rows * out_channels + at, total, mask=inside)


@triton.jit
def _write(
    result,  # (BLOCK_M, columns) float32
    col,
    row,
    sample,  # of each row, within bounds, as is
    safe,
    rows,
    out_channels,
    bias_ptr,
    row_ptr,
    residual_ptr,
    out_scale_ptr,
    rows_per_out_range,
    out_zero,
    out_levels,
    y_ptr,
    HAS_BIAS: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    REQUANTIZE: tl.constexpr,
):
    """Apply the epilogue to some columns of a result, and store them."""
    real = col < out_channels
    inside = (row < rows)[:, None] & real[None, :]
    at = row[:, None] * out_channels + col[None, :]
    if HAS_BIAS:
        result += tl.load(bias_ptr + col, mask=real, other=0.0).to(tl.float32)[None, :]
    if HAS_ROW:
        added = row_ptr + sample[:, None] * out_channels + col[None, :]
        result += tl.load(added, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        result += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if REQUANTIZE:
        factor = inverse(tl.load(out_scale_ptr + safe // rows_per_out_range))
        result = result * factor[:, None]
        if y_ptr.dtype.element_ty == tl.int8:
            result = round_to_even(result) + out_zero
            result = tl.minimum(tl.maximum(result, 0.0), out_levels) - 128.0
        else:
            result = tl.minimum(tl.maximum(result, -448.0), 448.0)
    tl.store(y_ptr + at, result.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _write_halves(
    result,  # (BLOCK_M, BLOCK_N) float32
    first,  # of its columns
    row,
    sample,
    safe,
    rows,
    out_channels,
    bias_ptr,
    row_ptr,
    residual_ptr,
    out_scale_ptr,
    rows_per_out_range,
    out_zero,
    out_levels,
    y_ptr,
    HAS_BIAS: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write a tile half by half, which takes half as many registers; columns stay neighbours."""
    left, right = tl.split(tl.permute(tl.reshape(result, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    half_col = first + tl.arange(0, BLOCK_N // 2)
    for i in tl.static_range(2):
        _write(
            left if i == 0 else right, half_col + i * (BLOCK_N // 2), row, sample, safe, rows,
            out_channels, bias_ptr, row_ptr, residual_ptr, out_scale_ptr, rows_per_out_range,
            out_zero, out_levels, y_ptr, HAS_BIAS, HAS_ROW, HAS_RESIDUAL, REQUANTIZE,
        )  # fmt: skip


@triton.jit
def conv_kernel(
    x0_ptr,
    w0_ptr,
    scale0_ptr,  # (ranges,) float32 input scales
    weight_scale0_ptr,  # (O,) float32
    offset0_ptr,  # (O,) int32: (stored zero - zero point) * sum of the weights
    zero0_ptr,
    x1_ptr,  # the second segment of channels, or the first again
    w1_ptr,
    scale1_ptr,
    weight_scale1_ptr,
    offset1_ptr,
    zero1_ptr,
    bias_ptr,  # (O,)
    row_ptr,  # (B, O) added to every pixel of a sample
    residual_ptr,  # like y
    out_scale_ptr,  # (ranges,) float32: scale that the result is quantized with
    y_ptr,  # (B, OH, OW, O), or (SPLIT, B * OH * OW, O) partial sums
    rows,  # B * OH * OW
    rows_per_sample,  # OH * OW
    rows_per_range0,  # how many rows share an input scale
    rows_per_range1,
    rows_per_out_range,
    out_width,
    out_channels,
    width,  # of the input, padding included
    image,  # pixels of an input image, padding included
    channels0,
    channels1,
    pixel_stride0,
    pixel_stride1,
    tap_stride0,
    tap_stride1,
    out_zero,
    out_levels,  # the largest code of the requantized result
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    SEGMENTS: tl.constexpr, HALF0: tl.constexpr, HALF1: tl.constexpr, FLOAT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ROW: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    REQUANTIZE: tl.constexpr, EVEN0: tl.constexpr, EVEN1: tl.constexpr,
    WIDE: tl.constexpr,  # an index exceeds 31 bits
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile of a convolution without padding of one or two segments of input channels."""
    TAPS: tl.constexpr = TAPS_Y * TAPS_X
    row, first = _tile_of(tl.program_id(0), rows, out_channels, BLOCK_M, BLOCK_N, GROUP)
    col = first + tl.arange(0, BLOCK_N)
    safe = tl.minimum(row, rows - 1)  # rows beyond the end repeat the last one and are not stored
    sample, pixels = _pixels_of(
        safe, rows_per_sample, out_width, width, image, STRIDE_Y, STRIDE_X, WIDE
    )
    part = tl.program_id(1)
    total = _accumulate(
        x0_ptr, w0_ptr, zero0_ptr, pixels, col, part, channels0, pixel_stride0, tap_stride0, width,
        out_channels, TAPS_X, TAPS, DILATION_Y, DILATION_X, EVEN0, HALF0, FLOAT, BLOCK_M, BLOCK_N,
        BLOCK_K, SPLIT,
    )  # fmt: skip
    if WIDE:
        row = row.to(tl.int64)
    if SPLIT > 1:
        _write_part(total, part, row, col, rows, out_channels, y_ptr)
        return
    scale0 = _scale(scale0_ptr, weight_scale0_ptr, safe, col, rows_per_range0, out_channels)
    result = _with_offset(total, offset0_ptr, col, out_channels, FLOAT) * scale0
    if SEGMENTS == 2:
        more = _accumulate(
            x1_ptr, w1_ptr, zero1_ptr, pixels, col, 0, channels1, pixel_stride1, tap_stride1, width,
            out_channels, TAPS_X, TAPS, DILATION_Y, DILATION_X, EVEN1, HALF1, FLOAT, BLOCK_M,
            BLOCK_N, BLOCK_K, 1,
        )  # fmt: skip
        scale1 = _scale(scale1_ptr, weight_scale1_ptr, safe, col, rows_per_range1, out_channels)
        result += _with_offset(more, offset1_ptr, col, out_channels, FLOAT) * scale1
    _write_halves(
        result, first, row, sample, safe, rows, out_channels, bias_ptr, row_ptr, residual_ptr,
        out_scale_ptr, rows_per_out_range, out_zero, out_levels, y_ptr, HAS_BIAS, HAS_ROW,
        HAS_RESIDUAL, REQUANTIZE, BLOCK_M, BLOCK_N,
    )  # fmt: skip
