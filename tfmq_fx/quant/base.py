"""Provide what quantized modules share: fixed dtypes, saved arguments, input ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from .affine import TINY_SCALE, finite_only, levels, rounded


class FixedDtypeModule(nn.Module):
    """A module whose tensors keep their dtype when the model is cast, and move with it.

    `dtype`, if it has one, is that of its output, and changes with a cast.
    """

    dtype: torch.dtype

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        """Build the module, its tensors still empty, from what `spec()` returned."""
        dtype = {"dtype": getattr(torch, spec["dtype"])} if "dtype" in spec else {}
        return cls(**{**spec, **dtype})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def same_dtype(value: Tensor) -> Tensor:
            moved = fn(value)
            return moved if moved.dtype == value.dtype else value.to(moved.device)

        super()._apply(same_dtype, recurse)
        if "dtype" in vars(self):
            self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


class RangedModule(FixedDtypeModule):
    """A module that quantizes its input with a static range or one scale per timestep.

    Buffers: `act_scale`, `act_zero`, 0-d float32 and int32: the static range, or only the zero
    point that all ranges share.
    """

    def register_range(self, zero: int = 0) -> None:
        """Register the buffers of the range."""
        self.register_buffer("act_scale", torch.ones((), dtype=torch.float32))
        self.register_buffer("act_zero", torch.tensor(zero, dtype=torch.int32))
        self.act_scale: Tensor
        self.act_zero: Tensor

    def set_static_range(self, scale: float, zero: int) -> None:
        """Use one range for every timestep (or, with per_timestep, the shared zero point)."""
        self.act_scale = torch.full_like(self.act_scale, max(float(scale), TINY_SCALE))
        self.act_zero = torch.full_like(self.act_zero, int(zero))

    def integer_codes(self, x: Tensor, scale: Tensor, bits: int) -> Tensor:
        """The codes of float32 x less the zero point; `scale` broadcasts to x.

        Rounds x * (1 / scale), as integer kernels do, not x / scale; gradients pass straight
        through within the range.  NaN and infinities become NaN.
        """
        zero = self.act_zero.to(torch.float32)
        codes = (rounded(x * (1.0 / scale)) + zero).clamp(0, levels(bits))
        return finite_only(codes - zero, x)


def plain_spec(module: Any, *names: str) -> dict[str, Any]:
    """The attributes `names` of a module as JSON-ready values."""
    plain = {}
    for name in names:
        value = getattr(module, name)
        if isinstance(value, torch.dtype):
            value = str(value).removeprefix("torch.")
        plain[name] = list(value) if isinstance(value, tuple) else value
    return plain
