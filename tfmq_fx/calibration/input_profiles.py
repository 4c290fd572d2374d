"""Profile a layer's input per channel and timestep, and find its range: min-max, or clipped where
the quantization error is least."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tfmq_fx.core.errors import CalibrationError
from tfmq_fx.core.layer_config import ActivationSpec
from tfmq_fx.core.stages import Stage
from tfmq_fx.quant.affine import levels

from .observers import Ranges

_VALUES = 4096  # sampled for each layer and timestep
_SHARES = torch.linspace(1.0, 0.25, 31, dtype=torch.float32)  # of an end that the search tries


@dataclass(frozen=True, slots=True)
class Profile:
    """The input of one layer over calibration.

    steps: (T,) float64, the timesteps visited, sorted.  low, high: (T,) float32.  peaks: (T, C)
    largest magnitude of each channel.  power: (C,) mean square.  values, channels: for each
    timestep a sample (n,) of single values, and the channel of each.
    """

    steps: Tensor
    low: Tensor
    high: Tensor
    peaks: Tensor
    power: Tensor
    values: tuple[Tensor, ...]
    channels: tuple[Tensor, ...]


class ProfileObserver(nn.Module):
    """Returns its input unchanged and records its profile.

    channel_dim: 1 or -1.  keeps_values: whether to sample values for the search of clipped ranges.
    """

    stage = Stage.OBSERVED

    def __init__(
        self, site: str, *, channel_dim: int, seed: int, keeps_values: bool = True
    ) -> None:
        super().__init__()
        self.site, self.channel_dim = site, channel_dim
        self._capacity = _VALUES if keeps_values else 0
        self._generator = torch.Generator().manual_seed(seed)
        # low, high, peaks; then the sampled values, their channels and their random ranks
        self._steps: dict[float, list[Tensor]] = {}
        self._squares: Tensor | None = None
        self._count = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """`x`, recorded: (n B, ...) for t (B,), else all of x counts for each of them.

        Raises CalibrationError on NaN or Inf.
        """
        rows = x.detach().movedim(self.channel_dim, -1).float()
        channels = rows.shape[-1]
        batched = x.shape[0] % len(t) == 0
        rows = rows.reshape(len(t) if batched else 1, -1, channels).expand(len(t), -1, -1)
        for step in t.unique().tolist():
            self._record(step, rows[t == step].flatten(0, 1))
        return x

    def _record(self, step: float, rows: Tensor) -> None:
        low, high = rows.amin(), rows.amax()
        if not (bool(torch.isfinite(low)) and bool(torch.isfinite(high))):
            raise CalibrationError(
                f"the input of {self.site} holds NaN or Inf at timestep {step}; "
                "check the calibration data and the model's weights"
            )
        squares = rows.square().sum(0).double()
        self._squares = squares if self._squares is None else self._squares + squares
        self._count += len(rows)
        peaks, drawn = rows.abs().amax(0), self._draw(rows)
        if step in self._steps:
            old_low, old_high, old_peaks, *old = self._steps[step]
            low, high = torch.minimum(low, old_low), torch.maximum(high, old_high)
            peaks = torch.maximum(peaks, old_peaks)
            drawn = [torch.cat(pair) for pair in zip(old, drawn, strict=True)]
            best = drawn[2].argsort()[: self._capacity]
            drawn = [part[best] for part in drawn]
        self._steps[step] = [low, high, peaks, *drawn]

    def _draw(self, rows: Tensor) -> list[Tensor]:
        """Values drawn from rows (n, C), their channels, and random ranks.

        The values of lowest rank over all calls are a fair sample.
        """
        total, count = rows.numel(), min(rows.numel(), self._capacity)
        picks = torch.randint(total, (count,), generator=self._generator)
        ranks = torch.rand(count, dtype=torch.float32, generator=self._generator) * (count / total)
        picks, ranks = picks.to(rows.device), ranks.to(rows.device)
        return [rows.flatten()[picks], picks % rows.shape[1], ranks]

    def profile(self) -> Profile:
        """The profile recorded. Raises CalibrationError where the input was never computed."""
        if self._squares is None:
            raise CalibrationError(f"the input of {self.site} was never computed in calibration")
        steps = sorted(self._steps)
        recorded = (self._steps[s] for s in steps)
        low, high, peaks, values, channels, _ = zip(*recorded, strict=True)
        return Profile(
            torch.tensor(steps, dtype=torch.float64),
            torch.stack(low),
            torch.stack(high),
            torch.stack(peaks),
            (self._squares / self._count).float(),
            tuple(values),
            tuple(channels),
        )


def input_ranges(
    profile: Profile, spec: ActivationSpec, timesteps: Tensor, importance: Tensor
) -> Ranges:
    """The range of a layer's input at each of `timesteps` (K,), by the estimator in `spec`.

    importance: (C,) weight of each channel's squared error in the search, >= 0: the energy of the
    weights that read it.  Timesteps that calibration did not visit are interpolated in t.
    """
    steps, visited = timesteps.double().cpu().numpy(), profile.steps.numpy()
    missing = int((~np.isin(steps, visited)).sum())
    groups = timestep_groups(len(steps), 1 if not spec.per_timestep else spec.timestep_groups)
    if groups is None:
        centers, positions = visited, steps
        members = [[i] for i in range(len(visited))]
    else:
        nearest = groups[np.abs(visited[:, None] - steps[None]).argmin(1)]
        centers, positions = np.unique(nearest), groups
        members = [np.flatnonzero(nearest == group).tolist() for group in centers]
    ends = torch.stack([_range(profile, part, spec, importance) for part in members]).numpy()
    low, high = (np.interp(positions, centers, ends[:, i]) for i in range(2))
    return Ranges(torch.tensor(low).float(), torch.tensor(high).float(), missing)


def timestep_groups(count: int, groups: int | None) -> np.ndarray | None:
    """The group (count,) of each of `count` neighbouring timesteps; None keeps them apart."""
    if groups is None or groups >= count:
        return None
    return np.arange(count) * groups // count


def _range(
    profile: Profile, members: list[int], spec: ActivationSpec, importance: Tensor
) -> Tensor:
    low, high = profile.low[members].amin(), profile.high[members].amax()
    if spec.ranges == "minmax":
        return torch.stack([low, high]).cpu()
    values = torch.cat([profile.values[i] for i in members])
    channels = torch.cat([profile.channels[i] for i in members])
    weights = importance.to(values)[channels]
    # The extremes are values too, though the sample may have missed them.
    values = torch.cat([values, low[None], high[None]])
    weights = torch.cat([weights, weights.mean().expand(2)])
    return torch.stack(clipped_range(values, low, high, bits=spec.bits, weights=weights)).cpu()


def clipped_range(
    values: Tensor, low: Tensor, high: Tensor, *, bits: int, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The range within [low, high] whose grid of `bits` bits has the least error on `values` (n,).

    low, high: 0-d, widened to contain 0.  weights: (n,), of each squared error.  The upper end is
    searched first, then the lower, then the upper again, over shares of `high` and `low`.
    """
    lowest, highest = low.clamp(max=0), high.clamp(min=0)
    low, high, shares = lowest, highest, _SHARES.to(values)
    for side in ("high", "low", "high"):
        lows = lowest * shares if side == "low" else low.expand_as(shares)
        highs = highest * shares if side == "high" else high.expand_as(shares)
        scale = ((highs - lows) / levels(bits)).clamp(min=1e-30)[:, None]
        zero = (-lows[:, None] / scale).round()
        codes = ((values / scale).round() + zero).clamp(0, levels(bits))
        loss = (((codes - zero) * scale - values).square() * weights).sum(1)
        best = int(loss.argmin())
        low, high = lows[best], highs[best]
    return low, high
