"""The Triton kernels: implicit-GEMM convolution and group norm, both on channels-last tensors.

Importing this module needs Triton; the ops in `conv` and `norm` import it when first launched.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _accumulate(
    x_ptr,
    w_ptr,
    zero_ptr,  # (O,) uint8 zero points of packed weights
    pixels,  # (BLOCK_M,) index of the first input pixel of each output pixel
    cols,  # (BLOCK_N,) output channels
    start,
    stop,  # of the loop over taps and blocks of channels
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
):
    """sum over taps and channels of x * w: (BLOCK_M, BLOCK_N) int32, or float32 for fp8."""
    LOADED: tl.constexpr = HALF if HALF > 0 else BLOCK_K
    NOTHING: tl.constexpr = 0.0 if FLOAT else 0
    SUM: tl.constexpr = tl.float32 if FLOAT else tl.int32
    k = tl.arange(0, LOADED)
    blocks = tl.cdiv(channels, BLOCK_K)
    x_rows = x_ptr + pixels * pixel_stride
    w_rows = w_ptr + cols.to(tl.int64) * (tap_stride * TAPS)
    if HALF > 0:
        zeros = tl.load(zero_ptr + cols, mask=cols < out_channels, other=0).to(tl.int8)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
    for step in range(start, stop):
        tap = step // blocks
        block = step % blocks
        shift = (tap // TAPS_X) * DILATION_Y * width + (tap % TAPS_X) * DILATION_X
        x_tile = x_rows[:, None] + (shift * pixel_stride + block * BLOCK_K + k)[None, :]
        if HALF > 0:
            # a byte holds channels k (low) and k + HALF (high) of its run
            w_tile = w_rows[None, :] + (tap * tap_stride + block * HALF + k)[:, None]
            if EVEN:
                packed = tl.load(w_tile)
                low_x = tl.load(x_tile)
                high_x = tl.load(x_tile + HALF)
            else:
                left = channels - block * BLOCK_K
                packed = tl.load(w_tile, mask=(cols < out_channels)[None, :], other=0)
                low_x = tl.load(x_tile, mask=(k < left)[None, :], other=0)
                high_x = tl.load(x_tile + HALF, mask=(k + HALF < left)[None, :], other=0)
            low = (packed & 15).to(tl.int8) - zeros[None, :]
            high = (packed >> 4).to(tl.int8) - zeros[None, :]
            acc = tl.dot(low_x, low, acc, out_dtype=tl.int32)
            acc = tl.dot(high_x, high, acc, out_dtype=tl.int32)
        else:
            w_tile = w_rows[None, :] + (tap * tap_stride + block * BLOCK_K + k)[:, None]
            if EVEN:
                a = tl.load(x_tile)
                b = tl.load(w_tile)
            else:
                left = channels - block * BLOCK_K
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
    """Row and column of the tile of program `pid`: GROUP rows of tiles share weights in the L2."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(out_channels, BLOCK_N)
    group = pid // (GROUP * tiles_n)
    first = group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    return first + inside % size, inside // size


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
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HALF0: tl.constexpr,
    HALF1: tl.constexpr,
    FLOAT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    WIDE: tl.constexpr,  # an index exceeds 31 bits
    EVEN0: tl.constexpr,
    EVEN1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One tile of a convolution without padding of one or two segments of input channels."""
    TAPS: tl.constexpr = TAPS_Y * TAPS_X
    STEP0: tl.constexpr = 2 * HALF0 if HALF0 > 0 else BLOCK_K  # packed weights have their own
    STEP1: tl.constexpr = 2 * HALF1 if HALF1 > 0 else BLOCK_K
    tile_m, tile_n = _tile_of(tl.program_id(0), rows, out_channels, BLOCK_M, BLOCK_N, GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    safe = tl.minimum(row, rows - 1)  # rows beyond the end repeat the last one and are not stored
    sample = safe // rows_per_sample
    place = safe % rows_per_sample
    y = place // out_width * STRIDE_Y
    x = place % out_width * STRIDE_X
    pixels = sample * image + y * width + x
    if WIDE:
        pixels = pixels.to(tl.int64)

    part = tl.program_id(1)
    steps0 = TAPS * tl.cdiv(channels0, STEP0)
    start = part * steps0 // SPLIT
    stop = (part + 1) * steps0 // SPLIT
    total = _accumulate(
        x0_ptr, w0_ptr, zero0_ptr, pixels, col, start, stop, channels0, pixel_stride0, tap_stride0,
        width, out_channels, TAPS_X, TAPS, DILATION_Y, DILATION_X, EVEN0, HALF0, FLOAT,
        BLOCK_M, BLOCK_N, STEP0,
    )  # fmt: skip
    inside = (row < rows)[:, None] & (col < out_channels)[None, :]
    if WIDE:
        row = row.to(tl.int64)
        sample = sample.to(tl.int64)
    at = row[:, None] * out_channels + col[None, :]
    if SPLIT > 1:
        tl.store(y_ptr + part.to(tl.int64) * rows * out_channels + at, total, mask=inside)
        return

    real = col < out_channels
    if not FLOAT:
        total += tl.load(offset0_ptr + col, mask=real, other=0)[None, :]
    result = total.to(tl.float32) * (
        tl.load(scale0_ptr + safe // rows_per_range0)[:, None]
        * tl.load(weight_scale0_ptr + col, mask=real, other=0.0)[None, :]
    )
    if SEGMENTS == 2:
        steps1 = TAPS * tl.cdiv(channels1, STEP1)
        more = _accumulate(
            x1_ptr, w1_ptr, zero1_ptr, pixels, col, 0, steps1, channels1, pixel_stride1,
            tap_stride1, width, out_channels, TAPS_X, TAPS, DILATION_Y, DILATION_X, EVEN1, HALF1,
            FLOAT, BLOCK_M, BLOCK_N, STEP1,
        )  # fmt: skip
        if not FLOAT:
            more += tl.load(offset1_ptr + col, mask=real, other=0)[None, :]
        result += more.to(tl.float32) * (
            tl.load(scale1_ptr + safe // rows_per_range1)[:, None]
            * tl.load(weight_scale1_ptr + col, mask=real, other=0.0)[None, :]
        )
    # half by half, which takes half as many registers; columns of a half stay neighbours
    left, right = tl.split(tl.permute(tl.reshape(result, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    half_col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    for i in tl.static_range(2):
        _write(
            left if i == 0 else right, half_col + i * (BLOCK_N // 2), row, sample, safe, rows,
            out_channels, bias_ptr, row_ptr, residual_ptr, out_scale_ptr, rows_per_out_range,
            out_zero, out_levels, y_ptr, HAS_BIAS, HAS_ROW, HAS_RESIDUAL, REQUANTIZE,
        )  # fmt: skip


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
    """Add to some columns of a result what is to be added, and store them."""
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
        inverse = _inverse(tl.load(out_scale_ptr + safe // rows_per_out_range))
        result = result * inverse[:, None]
        if y_ptr.dtype.element_ty == tl.int8:
            result = _round(result) + out_zero
            result = tl.minimum(tl.maximum(result, 0.0), out_levels) - 128.0
        else:
            result = tl.minimum(tl.maximum(result, -448.0), 448.0)
    tl.store(y_ptr + at, result.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _round(x):
    """To the nearest integer, halves to even, as torch.round: exact for |x| < 2**22."""
    magic = 12582912.0  # 1.5 * 2**23: adding it leaves no bits for a fraction
    x = tl.minimum(tl.maximum(x, -4194304.0), 4194304.0)
    return (x + magic) - magic


@triton.jit
def _inverse(scale):
    """1 / scale rounded to nearest, as torch does it; `/` is an approximation."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def norm_partial_kernel(
    x_ptr,  # (B, pixels, C)
    mean_ptr,  # (B, chunks, C) float32
    square_ptr,  # (B, chunks, C) float32: sum of squared differences from that mean
    pixels,
    channels,
    chunks,
    CHUNK: tl.constexpr,  # pixels of a chunk
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and squared deviation of each channel over a chunk of a sample's pixels."""
    sample = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = chunk * CHUNK
    count = tl.minimum(pixels - first, CHUNK)
    base = x_ptr + (sample.to(tl.int64) * pixels + first) * channels
    real = (col < channels)[None, :]
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for p in range(0, CHUNK, BLOCK_P):
        row = p + tl.arange(0, BLOCK_P)
        mask = (row < count)[:, None] & real
        x = tl.load(base + row[:, None] * channels + col[None, :], mask=mask, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    mean = total / count
    square = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for p in range(0, CHUNK, BLOCK_P):  # a second time, from the L1 and L2 caches
        row = p + tl.arange(0, BLOCK_P)
        mask = (row < count)[:, None] & real
        x = tl.load(base + row[:, None] * channels + col[None, :], mask=mask, other=0.0)
        apart = tl.where(mask, x.to(tl.float32) - mean[None, :], 0.0)
        square += tl.sum(apart * apart, 0)
    at = tl.program_id(0).to(tl.int64) * channels + col
    tl.store(mean_ptr + at, mean, mask=col < channels)
    tl.store(square_ptr + at, square, mask=col < channels)


@triton.jit
def norm_affine_kernel(
    mean_ptr,  # (B, chunks, C) float32, of norm_partial_kernel
    square_ptr,
    weight_ptr,  # (C,)
    bias_ptr,
    factor_ptr,  # (B, C)
    shift_ptr,
    a_ptr,  # (B, C) float32: norm(x) * factor + shift = x * a + b
    b_ptr,
    pixels,
    channels,
    chunks,
    groups,
    width,  # channels of a group
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Mean and deviation of one group of a sample's channels, as a line for each channel."""
    sample = tl.program_id(0) // groups
    inner = tl.arange(0, BLOCK_W)
    col = (tl.program_id(0) % groups) * width + inner
    real = inner < width
    size = pixels * width
    total = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for k in range(0, chunks, BLOCK_K):
        chunk = k + tl.arange(0, BLOCK_K)
        at = (sample * chunks + chunk)[:, None] * channels + col[None, :]
        mask = (chunk < chunks)[:, None] & real[None, :]
        count = tl.minimum(pixels - chunk * CHUNK, CHUNK).to(tl.float32)
        total += tl.sum(tl.load(mean_ptr + at, mask=mask, other=0.0), 1) * count
    mean = tl.sum(total, 0) / size
    total = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for k in range(0, chunks, BLOCK_K):
        # Chan et al.: squares about the common mean are those about each one's own, and what that
        # one is off
        chunk = k + tl.arange(0, BLOCK_K)
        at = (sample * chunks + chunk)[:, None] * channels + col[None, :]
        mask = (chunk < chunks)[:, None] & real[None, :]
        count = tl.minimum(pixels - chunk * CHUNK, CHUNK).to(tl.float32)
        off = tl.where(mask, tl.load(mean_ptr + at, mask=mask, other=0.0) - mean, 0.0)
        square = tl.load(square_ptr + at, mask=mask, other=0.0)
        total += tl.sum(square + off * off * count[:, None], 1)
    a = tl.zeros((BLOCK_W,), dtype=tl.float32) + 1.0 / tl.sqrt(tl.sum(total, 0) / size + eps)
    if HAS_WEIGHT:
        a *= tl.load(weight_ptr + col, mask=real, other=0.0).to(tl.float32)
    b = -mean * a
    if HAS_BIAS:
        b += tl.load(bias_ptr + col, mask=real, other=0.0).to(tl.float32)
    at = sample * channels + col
    if HAS_FACTOR:
        factor = tl.load(factor_ptr + at, mask=real, other=0.0).to(tl.float32)
        a *= factor
        b *= factor
    if HAS_SHIFT:
        b += tl.load(shift_ptr + at, mask=real, other=0.0).to(tl.float32)
    tl.store(a_ptr + at, a, mask=real)
    tl.store(b_ptr + at, b, mask=real)


@triton.jit
def norm_apply_kernel(
    x_ptr,  # (B, height, width, C)
    factor_ptr,  # (B, C) float32
    shift_ptr,  # (B, C) float32
    scale0_ptr,  # (ranges,) float32, of channels before `cut`
    scale1_ptr,  # of those from `cut` on
    y_ptr,  # (B, out_height, out_width, C) int8 or fp8, borders included
    rows,  # B * out_height * out_width
    out_image,  # out_height * out_width
    out_width,
    height,
    width,
    top,  # rows and columns of border before the image
    left,
    channels,
    cut,
    zero0,  # zero points
    zero1,
    levels,  # the largest code
    RANGES0: tl.constexpr,  # whether each sample has a range
    RANGES1: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """quantize(silu(x * factor + shift)) with a border of zeros' codes."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = col < channels
    sample = row // out_image
    place = row % out_image
    y = place // out_width - top
    x = place % out_width - left
    inside = (row < rows) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    mask = inside[:, None] & real[None, :]
    source = ((sample * height + y) * width + x)[:, None] * channels + col[None, :]
    value = tl.load(x_ptr + source, mask=mask, other=0.0).to(tl.float32)
    of = sample[:, None] * channels + col[None, :]
    stored = (row < rows)[:, None] & real[None, :]
    value = value * tl.load(factor_ptr + of, mask=stored, other=0.0)
    value += tl.load(shift_ptr + of, mask=stored, other=0.0)
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    image = tl.where(row < rows, sample, 0)
    inverse0 = _inverse(tl.load(scale0_ptr + image * RANGES0))
    inverse1 = _inverse(tl.load(scale1_ptr + image * RANGES1))
    before = (col < cut)[None, :]
    value = tl.where(mask, value * tl.where(before, inverse0[:, None], inverse1[:, None]), 0.0)
    if y_ptr.dtype.element_ty == tl.int8:
        value = _round(value) + tl.where(before, zero0, zero1).to(tl.float32)
        value = tl.minimum(tl.maximum(value, 0.0), levels) - 128.0
    else:
        value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    at = row[:, None] * channels + col[None, :]
    tl.store(y_ptr + at, value.to(y_ptr.dtype.element_ty), mask=stored)
