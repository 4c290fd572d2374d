"""Run group norm, modulation, SiLU and quantization on CUDA in two reads and one write.

q = quantize(silu(norm(x) * factor + shift)), stored with the borders that a convolution pads with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfmq_fx.backends.codes.arithmetic import quantize, stored_zero
from tfmq_fx.backends.codes.fuse_norms import MOST_RUNS
from tfmq_fx.core.errors import BackendError
from tfmq_fx.core.stages import Stage

from .triton_op import kernel_op, launcher

CHUNK = 256  # pixels whose statistics one program takes
BLOCK_PIXELS, BLOCK_CHANNELS, BLOCK_CHUNKS = 32, 64, 16  # of a program's step


def group_norm_quantize_triton(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    factor: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    scales: Sequence[Tensor],
    zeros: Sequence[int],
    sizes: Sequence[int],
    levels: int,
    pads: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The codes of silu(group_norm(x) * factor + shift); arguments as for `NormCodes`, except for:

    x: (B, H, W, C), contiguous, any float dtype; computed in float32 throughout.
    factor, shift: (B, C), or None.
    dtype: int8 (codes - 128) or float8_e4m3fn.
    Raises BackendError for another layout, and more runs than the kernel takes.
    """
    from tfmq_fx.backends.cuda.kernels.norm import norm_apply_kernel

    _check(x, sizes)
    a, b = _lines(x, groups, weight, bias, eps, factor, shift)
    batch, height, width, channels = x.shape
    left, right, top, bottom = pads
    out_height, out_width = top + height + bottom, left + width + right
    y = x.new_empty((batch, out_height, out_width, channels), dtype=dtype)
    rows = batch * out_height * out_width
    launcher(norm_apply_kernel)[-(-rows // BLOCK_PIXELS), -(-channels // BLOCK_CHANNELS)](
        x,
        a,
        b,
        scales[0],
        scales[-1],
        y,
        rows,
        out_height * out_width,
        out_width,
        height,
        width,
        top,
        left,
        channels,
        sizes[0],
        zeros[0],
        zeros[-1],
        levels,
        RANGES0=int(scales[0].shape[0] > 1),
        RANGES1=int(scales[-1].shape[0] > 1),
        SILU=silu,
        BLOCK_P=BLOCK_PIXELS,
        BLOCK_C=BLOCK_CHANNELS,
        num_warps=4,
    )
    return y


def _lines(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    factor: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The norm and its modulation as x * a + b for each channel; a, b: (B, C) float32."""
    from tfmq_fx.backends.cuda.kernels.norm import norm_affine_kernel, norm_partial_kernel

    batch, height, width, channels = x.shape
    pixels = height * width
    chunks = -(-pixels // CHUNK)
    means = x.new_empty((batch, chunks, channels), dtype=torch.float32)
    squares = torch.empty_like(means)
    launcher(norm_partial_kernel)[batch * chunks, -(-channels // BLOCK_CHANNELS)](
        x,
        means,
        squares,
        pixels,
        channels,
        chunks,
        CHUNK=CHUNK,
        BLOCK_P=BLOCK_PIXELS,
        BLOCK_C=BLOCK_CHANNELS,
        num_warps=4,
    )
    a = x.new_empty((batch, channels), dtype=torch.float32)
    b = torch.empty_like(a)
    values = (weight, bias, factor, shift)
    launcher(norm_affine_kernel)[(batch * groups,)](
        means,
        squares,
        *(a if value is None else value.contiguous() for value in values),
        a,
        b,
        pixels,
        channels,
        chunks,
        groups,
        channels // groups,
        eps,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_FACTOR=factor is not None,
        HAS_SHIFT=shift is not None,
        CHUNK=CHUNK,
        BLOCK_K=BLOCK_CHUNKS,
        BLOCK_W=1 << (channels // groups - 1).bit_length(),
        num_warps=2,
    )
    return a, b


def group_norm_quantize_reference(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    factor: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    scales: Sequence[Tensor],
    zeros: Sequence[int],
    sizes: Sequence[int],
    levels: int,
    pads: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The result of `group_norm_quantize_triton`, in plain torch on any device."""
    _check(x, sizes)
    images = x.float().permute(0, 3, 1, 2)
    weight, bias = (None if value is None else value.float() for value in (weight, bias))
    value = F.group_norm(images, groups, weight, bias, eps).permute(0, 2, 3, 1)
    if factor is not None:
        value = value * factor.float()[:, None, None, :]
    if shift is not None:
        value = value + shift.float()[:, None, None, :]
    if silu:
        value = F.silu(value)
    runs = []
    for run, scale, zero in zip(value.split(list(sizes), 3), scales, zeros, strict=True):
        codes = quantize(run, scale[:, None, None, None], zero, levels, dtype)
        border = stored_zero(zero, dtype)
        runs.append(F.pad(codes.float(), (0, 0, *pads), value=border).to(dtype))
    return torch.cat([run.float() for run in runs], 3).to(dtype).contiguous()


group_norm_quantize = kernel_op("tfmq_fx::group_norm_quantize", group_norm_quantize_triton)
group_norm_quantize.register_kernel("cpu")(group_norm_quantize_reference)


def _check(x: Tensor, sizes: Sequence[int]) -> None:
    if not x.is_contiguous():
        raise BackendError(
            f"group_norm_quantize takes a contiguous (B, H, W, C), got shape {tuple(x.shape)} with "
            f"strides {x.stride()}; call .contiguous() on it"
        )
    if len(sizes) > MOST_RUNS:
        raise BackendError(f"group_norm_quantize takes {MOST_RUNS} runs of channels, got {sizes}")


def _fake(x: Tensor, *settings: Any) -> Tensor:
    *_, (left, right, top, bottom), dtype = settings
    batch, height, width, channels = x.shape
    return x.new_empty((batch, top + height + bottom, left + width + right, channels), dtype=dtype)


group_norm_quantize.register_fake(_fake)


def norm_codes(x: Tensor, groups: int, *settings: Any) -> Tensor:
    """The codes of silu(group_norm(x) * factor + shift); arguments as for `NormCodes`.

    Their dtype is int8 (codes - 128) or float8_e4m3fn.
    """
    weight, bias, eps, factor, shift, *rest = settings
    images = x if x.dim() == 4 else x.unsqueeze(3)
    pixels = images.permute(0, 2, 3, 1).contiguous()
    factor, shift = (None if v is None else v.flatten(1) for v in (factor, shift))
    codes: Tensor = group_norm_quantize(pixels, groups, weight, bias, eps, factor, shift, *rest)
    return codes


norm_codes.stage = Stage.LOWERED  # type: ignore[attr-defined]
