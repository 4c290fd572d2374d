"""Store temporal features as integers: TFMQ-DM's cache-based maintenance (arXiv 2407.19547).

The paper's abstract only says that quantized features are looked up instead of computed. The way
they are quantized is ours: one scale and zero point for each timestep and feature, by search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.stages import Stage

from .affine import levels
from .base import FixedDtypeModule, plain_spec
from .packing import pack
from .timestep_lookup import timestep_index, timestep_row

TABLE = "temporal_table"  # buffer of the exact rows, all features of a dtype side by side
FEATURE = "feature"  # node.meta entry: the name of the feature that a slice of a row holds
BITS = (4, 8)
_CANDIDATES = 20
_LEAST = 0.3  # share of the range that the tightest candidate keeps


def cache_rows(rows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the rows of one feature: codes, scale and zero point.

    rows: (K, F), one row for each timestep.  codes: (K, F) uint8 in [0, 2**bits - 1].  scale, zero:
    (K,) float32; the value of code q is scale * (q - zero), and zero need not be an integer, as
    nothing is convolved with these codes.  Per row, the best of 20 clipped ranges by squared error,
    each followed by a least-squares fit of scale and zero point to its codes.
    """
    if bits not in BITS:
        raise ConfigError(f"rows can be cached at 4 or 8 bits, not {bits}")
    values, top = rows.detach().double(), levels(bits)
    low, high = values.amin(1), values.amax(1)
    middle, span = (low + high) / 2, high - low
    is_varied = span > 0

    def codes_on(scale: Tensor, zero: Tensor) -> Tensor:
        return torch.round(values / scale[:, None] + zero[:, None]).clamp(0, top)

    def loss_of(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        # with the float32 parameters that will be stored
        restored = (codes - zero.float().double()[:, None]) * scale.float().double()[:, None]
        return (restored - values).square().sum(1)

    # A constant row is stored exactly: as code 0 on a grid of scale 1.
    scale = torch.where(is_varied, span, top) / top
    zero = -low / scale
    codes = codes_on(scale, zero)
    loss = loss_of(codes, scale, zero)
    for i in range(_CANDIDATES):
        share = 1 - (1 - _LEAST) * i / (_CANDIDATES - 1)
        width = torch.where(is_varied, span * share, top)
        trial = width / top, -(middle - width / 2) / (width / top)
        trial = _refit(values, codes_on(*trial), *trial)
        trial_codes = codes_on(*trial)
        trial_loss = loss_of(trial_codes, *trial)
        better = trial_loss < loss
        loss = torch.where(better, trial_loss, loss)
        scale, zero = torch.where(better, trial[0], scale), torch.where(better, trial[1], zero)
        codes = torch.where(better[:, None], trial_codes, codes)
    return codes.to(torch.uint8), scale.float(), zero.float()


def _refit(values: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point per row that fit `values` best with these codes, by linear regression;
    the present ones where there is no fit."""
    mean, center = values.mean(1), codes.mean(1)
    spread = codes - center[:, None]
    slope = (spread * values).sum(1) / spread.square().sum(1)
    usable = torch.isfinite(slope) & (slope > 0)
    fitted = torch.where(usable, slope, scale)
    return fitted, torch.where(usable, center - mean / fitted, zero)


def restore_rows(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The rows (K, F), float32, that `cache_rows` stored."""
    return (codes.float() - zero[:, None]) * scale[:, None]


def cache_error(rows: Tensor, bits: int) -> Tensor:
    """Relative L2 error of each row (K, F) cached at `bits`: (K,) float32; 0 for a zero row."""
    error = (restore_rows(*cache_rows(rows, bits)) - rows).double().norm(dim=1)
    norm = rows.double().norm(dim=1)
    return torch.where(norm > 0, error / norm, error).float()


class QuantTimestepTable(FixedDtypeModule):
    """Look up features stored as integers by timestep: t (B,) -> (B, F) in `dtype`.

    F is the sum of `widths`, one for each feature, in order.  Buffers: `keys` (K,) int64 or
    float64; `codes` (K, bytes) uint8, two 4-bit codes in a byte, the first one lowest; `scale`,
    `zero` (K, features) float32.  Unknown timesteps: see `timestep_lookup.timestep_row`.
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
        """Create the table of `features`, each (K, width) in the compute dtype, on their device."""
        table = cls(
            rows=len(keys),
            widths=[rows.shape[1] for rows in features],
            bits=bits,
            integer_keys=not keys.is_floating_point(),
            dtype=features[0].dtype,
        ).to(features[0].device)
        codes, scales, zeros = zip(*(cache_rows(rows, bits) for rows in features), strict=True)
        table.scale, table.zero = torch.stack(scales, 1), torch.stack(zeros, 1)
        table.keys = keys.clone()  # not shared: savers refuse tensors that share memory
        fused = torch.cat(codes, 1)
        padding = -fused.shape[1] % (8 // bits)  # each row starts a byte
        fused = nn.functional.pad(fused, (0, padding))
        table.codes = pack(fused, bits).view(len(keys), -1)
        return table

    def columns(self) -> Tensor:
        """The feature index of each column: (F,) int64."""
        return torch.repeat_interleave(torch.tensor(self.widths), output_size=sum(self.widths))

    def forward(self, t: Tensor) -> Tensor:
        """The features (B, F) for timesteps t (B,) or (), then B = 1."""
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
        """The size of codes, scales and zero points in bytes."""
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes

    def spec(self) -> dict[str, Any]:
        """The constructor arguments, JSON-ready, for `from_spec`."""
        return {
            "rows": len(self.keys),
            "integer_keys": not self.keys.is_floating_point(),
            **plain_spec(self, "widths", "bits", "dtype"),
        }

    def extra_repr(self) -> str:
        return f"{len(self.keys)} timesteps, {len(self.widths)} features, {self.bits} bits"
