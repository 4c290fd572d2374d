"""Run a group norm and quantize its result in one kernel on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfmq_fx.core.errors import BackendError
from tfmq_fx.core.stages import Stage

from . import kernels


def norm_codes(x: Tensor, groups: int, *settings: Any, more: Tensor | None = None) -> Tensor:
    """The codes of silu(group_norm(x) * factor + shift); arguments as for `NormCodes`.

    groups: 0 makes codes of x itself.  more: (B, C', H, W), channels that follow those of x, as if
    both were concatenated.  Raises BackendError for a dtype other than torch.uint8.
    """
    weight, bias, eps, factor, shift, silu, *grids, dtype = settings
    if dtype != torch.uint8:
        raise BackendError(f"norm_codes on the CPU makes codes in torch.uint8, not in {dtype}")
    norm = (rows(weight), rows(bias), eps, rows(factor), rows(shift), silu)
    rest = None if more is None else _pixels(more)
    codes: Tensor = kernels.cpu_norm(_pixels(x), groups, *norm, *grids, rest)
    return codes


def _pixels(x: Tensor) -> Tensor:
    """x (B, C, H, W) or (B, C, N) as (B, H, W, C), contiguous, in a dtype that the kernel reads."""
    images = x if x.dim() == 4 else x.unsqueeze(3)
    pixels = images.permute(0, 2, 3, 1).contiguous()
    return pixels if pixels.dtype in kernels.DTYPES else pixels.float()


norm_codes.stage = Stage.LOWERED  # type: ignore[attr-defined]


def rows(value: Tensor | None) -> Tensor | None:
    """A parameter (C,), or a modulation (B, C, 1, ...) as (B, C), contiguous in float32."""
    if value is None:
        return None
    return value.flatten(1 if value.dim() > 1 else 0).float().contiguous()
