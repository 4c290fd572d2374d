"""Temporal features as integers: TFMQ-DM's cache-based maintenance (arXiv 2407.19547).

The abstract says that quantized features are looked up instead of computed; how they are quantized
is ours: one scale and zero point for each timestep and feature, by search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.stages import Stage

from .affine import levels
from .base import FixedDtypeModule
from .packing import pack
from .timestep_lookup import timestep_index, timestep_row

TABLE = "temporal_table"  # buffer of the exact rows, all features of a dtype side by side
FEATURE = "feature"  # node.meta entry: the name of the feature that a slice of a row holds
BITS = (4, 8)
_CANDIDATES = 20
_LEAST = 0.3  # share of the range that the tightest candidate keeps


def cache_rows(rows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point of rows of one feature.

    rows: (K, F), one row for each timestep.  codes: (K, F) uint8 in [0, 2**bits - 1].  scale, zero:
    (K,) float32; the value of code q is scale * (q - zero), and zero need not be an integer, as
    nothing is convolved with these codes.  Per row, the best of 20 clipped ranges by squared error,
    each followed by a least-squares fit of scale and zero point to its codes.
    """
    if bits not in BITS:
        raise ConfigError(f"rows can be cached at 4 or 8 bits, not {bits}")
    values = rows.detach().double()
    low, high = values.amin(1), values.amax(1)
    middle, span = (low + high) / 2, high - low
    # A constant row is stored exactly: as code 0 on a grid of scale 1.
    best = _Grid.over(low, torch.where(span > 0, span, levels(bits)), bits)
    codes = best.codes(values)
    loss = best.loss(values, codes)
    for i in range(_CANDIDATES):
        share = 1 - (1 - _LEAST) * i / (_CANDIDATES - 1)
        width = torch.where(span > 0, span * share, levels(bits))
        trial = _Grid.over(middle - width / 2, width, bits)
        trial = trial.refit(values, trial.codes(values))
        trial_codes = trial.codes(values)
        trial_loss = trial.loss(values, trial_codes)
        better = trial_loss < loss
        loss = torch.where(better, trial_loss, loss)
        best = best.where(better, trial)
        codes = torch.where(better[:, None], trial_codes, codes)
    return codes.to(torch.uint8), best.scale.float(), best.zero.float()


def restore_rows(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The rows (K, F), float32, that `cache_rows` stored."""
    return (codes.float() - zero[:, None]) * scale[:, None]


def cache_error(rows: Tensor, bits: int) -> Tensor:
    """Relative L2 error of each row (K, F) cached at `bits`: (K,) float32; 0 for a zero row."""
    error = (restore_rows(*cache_rows(rows, bits)) - rows).double().norm(dim=1)
    norm = rows.double().norm(dim=1)
    return torch.where(norm > 0, error / norm, error).float()


class _Grid:
    """Scale and zero point per row, (K,) float64 each."""

    def __init__(self, scale: Tensor, zero: Tensor, bits: int) -> None:
        self.scale, self.zero, self.bits = scale, zero, bits

    @classmethod
    def over(cls, low: Tensor, span: Tensor, bits: int) -> Self:
        scale = span / levels(bits)
        return cls(scale, -low / scale, bits)

    def codes(self, values: Tensor) -> Tensor:
        shifted = torch.round(values / self.scale[:, None] + self.zero[:, None])
        return shifted.clamp(0, levels(self.bits))

    def loss(self, values: Tensor, codes: Tensor) -> Tensor:
        # judged with the float32 parameters that will be stored
        scale, zero = self.scale.float().double(), self.zero.float().double()
        return ((codes - zero[:, None]) * scale[:, None] - values).square().sum(1)

    def refit(self, values: Tensor, codes: Tensor) -> _Grid:
        """The grid that fits `values` best with these codes: linear regression on the codes."""
        mean, center = values.mean(1), codes.mean(1)
        spread = codes - center[:, None]
        scale = (spread * values).sum(1) / spread.square().sum(1)
        usable = torch.isfinite(scale) & (scale > 0)
        scale = torch.where(usable, scale, self.scale)
        return _Grid(scale, torch.where(usable, center - mean / scale, self.zero), self.bits)

    def where(self, better: Tensor, other: _Grid) -> _Grid:
        scale = torch.where(better, other.scale, self.scale)
        return _Grid(scale, torch.where(better, other.zero, self.zero), self.bits)


class QuantTimestepTable(FixedDtypeModule):
    """Look-up by timestep of features stored as integers: t (B,) -> (B, F) in `dtype`.

    F is the sum of `widths`, one for each feature, in order.  Buffers: `keys` (K,) int64 or
    float64; `codes` (K, bytes) uint8, two 4-bit codes in a byte, the first one lowest; `scale`,
    `zero` (K, features) float32.  An unknown timestep is met as in `timestep_lookup.timestep_row`.
    """

    stage = Stage.FOLDED

    def __init__(
        self,
        *,
        rows: int,
        widths: Sequence[int],
        bits: int,
        integer_keys: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if bits not in BITS:
            raise ConfigError(f"a timestep table holds 4 or 8 bits, not {bits}")
        if rows < 1 or not widths or min(widths) < 1:
            raise ConfigError(f"a timestep table of {rows} rows and widths {widths!r:.80}")
        self.widths, self.bits, self.dtype = tuple(widths), bits, dtype
        width, size = sum(self.widths), (rows, len(self.widths))
        kind = torch.int64 if integer_keys else torch.float64
        self.register_buffer("keys", torch.empty(rows, dtype=kind))
        self.register_buffer("codes", torch.empty(rows, -(-width * bits // 8), dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(size, dtype=torch.float32))
        self.register_buffer("zero", torch.empty(size, dtype=torch.float32))
        self.register_buffer("feature", self.columns(), persistent=False)
        self.keys: Tensor
        self.codes: Tensor
        self.scale: Tensor
        self.zero: Tensor
        self.feature: Tensor

    @classmethod
    def from_rows(cls, keys: Tensor, features: Sequence[Tensor], *, bits: int) -> Self:
        """The table of `features`, each (K, width) in the compute dtype, on their device."""
        made = cls(
            rows=len(keys),
            widths=[rows.shape[1] for rows in features],
            bits=bits,
            integer_keys=not keys.is_floating_point(),
            dtype=features[0].dtype,
        ).to(features[0].device)
        codes, scales, zeros = zip(*(cache_rows(rows, bits) for rows in features), strict=True)
        made.scale, made.zero = torch.stack(scales, 1), torch.stack(zeros, 1)
        made.keys = keys.clone()  # not shared: savers refuse tensors that share memory
        fused = torch.cat(codes, 1)
        padding = -fused.shape[1] % (8 // bits)  # each row starts a byte
        fused = nn.functional.pad(fused, (0, padding))
        made.codes = pack(fused, bits).view(len(keys), -1)
        return made

    def columns(self) -> Tensor:
        """(F,) int64, the feature of each column."""
        return torch.repeat_interleave(torch.tensor(self.widths), output_size=sum(self.widths))

    def forward(self, t: Tensor) -> Tensor:
        """(B, F) for t (B,) or (), then B = 1."""
        # the scales go through the operator for its treatment of unknown timesteps
        scale = timestep_row(self.scale, self.keys, t)
        row = timestep_index(self.keys, t).clamp(min=0)
        packed = self.codes.index_select(0, row)
        if self.bits == 4:
            packed = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
            packed = packed[:, : self.feature.shape[0]]
        zero = self.zero.index_select(0, row)[:, self.feature]
        values: Tensor = (packed.float() - zero) * scale[:, self.feature]
        return values.to(self.dtype)

    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes

    def spec(self) -> dict[str, Any]:
        """JSON-ready constructor arguments; `from_spec` builds the module, empty, from them."""
        return {
            "rows": len(self.keys),
            "widths": list(self.widths),
            "bits": self.bits,
            "integer_keys": not self.keys.is_floating_point(),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def extra_repr(self) -> str:
        return f"{len(self.keys)} timesteps, {len(self.widths)} features, {self.bits} bits"
