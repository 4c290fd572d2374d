"""The Triton kernels of group norm on channels-last tensors."""

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import inverse, round_to_even


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
    """The codes of silu(x * factor + shift), with a border of zeros' codes."""
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
    inverse0 = inverse(tl.load(scale0_ptr + image * RANGES0))
    inverse1 = inverse(tl.load(scale1_ptr + image * RANGES1))
    before = (col < cut)[None, :]
    value = tl.where(mask, value * tl.where(before, inverse0[:, None], inverse1[:, None]), 0.0)
    if y_ptr.dtype.element_ty == tl.int8:
        value = round_to_even(value) + tl.where(before, zero0, zero1).to(tl.float32)
        value = tl.minimum(tl.maximum(value, 0.0), levels) - 128.0
    else:
        value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    at = row[:, None] * channels + col[None, :]
    tl.store(y_ptr + at, value.to(y_ptr.dtype.element_ty), mask=stored)
