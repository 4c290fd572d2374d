"""Quantize a value between layers, such as the operands of attention's products.

Reference semantics in floating point; gradients pass straight through the rounding, so that layers
in front can be learnt.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.stages import Stage

from .affine import TINY_SCALE, finite_only, levels, rounded
from .base import RangedModule, plain_spec

Grid = Literal["uniform", "log2", "adaptive"]


class QuantActivation(RangedModule):
    """Round x to a grid, keeping its shape and dtype.

    Arguments: (x), (x, scale) or, with an adaptive grid, (x, scale, log2).

    grid "uniform": scale * (q - zero), q in [0, 2**bits - 1], as in QuantLayer.
    grid "log2", for x >= 0: scale * 2**-q with q = clip(round(-log2(x / scale)), 0, 2**bits - 1),
    except that the largest code stands for 0: masked probabilities stay 0.  Negative values
    become 0.
    grid "adaptive": log2 for the samples whose flag is set, uniform (zero point 0) for the others.
    """

    stage = Stage.QUANTIZED

    def __init__(self, *, bits: int, grid: Grid = "uniform", per_timestep: bool) -> None:
        super().__init__()
        if grid not in get_args(Grid) or bits not in range(2, 17):
            raise ConfigError(f"there is no {grid!r} grid of {bits} bits")
        if grid == "adaptive" and not per_timestep:
            raise ConfigError("a grid that adapts to the timestep needs a scale per timestep")
        self.bits, self.per_timestep = bits, per_timestep
        self.grid: Grid = grid
        self.register_range()

    def forward(self, x: Tensor, scale: Tensor | None = None, log2: Tensor | None = None) -> Tensor:
        """Round x (n B, ...), sample by sample.

        scale: (B,), with a scale per timestep.  log2: (B,), not 0 where the grid is logarithmic.
        """
        spread = self.spread(x, scale) if self.per_timestep else self.act_scale
        if self.grid == "uniform":
            return self.uniform(x, spread).to(x.dtype)
        if self.grid == "log2":
            return self.logarithmic(x, spread).to(x.dtype)
        chosen = self.spread(x, log2) != 0
        return torch.where(chosen, self.logarithmic(x, spread), self.uniform(x, spread)).to(x.dtype)

    def uniform(self, x: Tensor, scale: Tensor) -> Tensor:
        """The nearest uniform value in float32; `scale` broadcasts to x."""
        return self.integer_codes(x.float(), scale, self.bits) * scale

    def logarithmic(self, x: Tensor, scale: Tensor) -> Tensor:
        """The nearest power of two times `scale`, by logarithm, or 0; in float32."""
        top = levels(self.bits)
        share = x.float() / scale
        # bounded below: the gradient of log2 at 0 is infinite, and no smaller code is of use
        codes = rounded(-torch.log2(share.clamp(min=TINY_SCALE))).clamp(0, top)
        empty = (share <= 0) | (codes == top)
        return finite_only(torch.where(empty, 0.0, torch.exp2(-codes) * scale), x.float())

    def spread(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """Repeat each of `rows` (B,) for the rows of x (n B, ...) of its sample."""
        if rows is None:
            raise ConfigError("this value is quantized per timestep: it needs a row for each")
        if not torch.compiler.is_compiling() and x.shape[0] % rows.shape[0]:
            raise ConfigError(f"{x.shape[0]} rows of x do not belong to {rows.shape[0]} samples")
        times = x.shape[0] // rows.shape[0]
        return rows[:, None].expand(-1, times).reshape(-1, *[1] * (x.dim() - 1))

    def range_kind(self) -> str:
        """The kind of range of x: "static" or "per timestep"."""
        return "per timestep" if self.per_timestep else "static"

    def spec(self) -> dict[str, Any]:
        """The constructor arguments, JSON-ready, for `from_spec`."""
        return plain_spec(self, "bits", "grid", "per_timestep")

    def extra_repr(self) -> str:
        return f"{self.bits} bits {self.grid}, {self.range_kind()}"
