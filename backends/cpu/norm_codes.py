"""Group norms that make the codes of the layers that read them, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tfmq_fx.backends.codes.layers import Pads
from tfmq_fx.core.errors import BackendError
from tfmq_fx.core.stages import Stage

from . import kernels

MOST_RUNS = 2  # of channels with a grid each, that one call makes codes of


def norm_codes(
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
    pads: Pads,
    dtype: torch.dtype,
) -> Tensor:
    """The codes of silu(group_norm(x) * factor + shift); arguments as of `NormCodes`.

    dtype: uint8, which is what the CPU's kernels read.  Raises BackendError for another.
    """
    if dtype != torch.uint8:
        raise BackendError(f"norm_codes on the CPU makes codes in torch.uint8, not in {dtype}")
    images = x if x.dim() == 4 else x.unsqueeze(3)
    pixels = images.permute(0, 2, 3, 1).contiguous()
    pixels = pixels if pixels.dtype in kernels.DTYPES else pixels.float()
    norm = (groups, rows(weight), rows(bias), eps, rows(factor), rows(shift), silu)
    codes: Tensor = kernels.cpu_norm(pixels, *norm, scales, zeros, sizes, levels, pads)
    return codes


norm_codes.stage = Stage.LOWERED  # type: ignore[attr-defined]


def rows(value: Tensor | None) -> Tensor | None:
    """A parameter (C,), or a modulation (B, C, 1, ...) as (B, C), contiguous in float32."""
    if value is None:
        return None
    return value.flatten(1 if value.dim() > 1 else 0).float().contiguous()
