"""Measure the error of a quantized denoiser's output at each timestep and fit its correction.

PTQD models the quantized estimate as ehat = (1 + k) e + D + noise, where e is the full-precision
one: k and D are fitted for each timestep, and removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from tfmq_fx.core.config import Correction
from tfmq_fx.core.distributed import in_order
from tfmq_fx.core.errors import CalibrationError, ConfigError
from tfmq_fx.ir.graph import timestep_node, timestep_position
from tfmq_fx.quant.timestep_lookup import find_unknown, timestep_index

_ONE, _E, _D, _EE, _DD, _ED = range(6)  # what is summed: 1, e, d, e^2, d^2, e d, with d = ehat - e


@dataclass(frozen=True, slots=True)
class OutputCorrection:
    """A correction of the output at K timesteps: e is estimated by (ehat - shift) / (1 + k).

    k: (K,), shift: (K, C); both float64.  corrected: (K,) bool, where it reduces the error of
    samples that it was not fitted on; elsewhere k and shift are 0.
    interpolated: how many timesteps had no two samples to compare; their k and shift lie between
    those of their neighbours in t.
    before, after: mean relative squared error of samples that k and shift were not fitted on, over
    the timesteps whose output is not 0 throughout; 0 where it is at all of them.
    """

    k: Tensor
    shift: Tensor
    corrected: Tensor
    interpolated: int
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class OutputErrors:
    """Sums of the full-precision output e and the error d = ehat - e, over calibration samples.

    timesteps: (K,).  samples: (2, K) int64, how many there are in each of two halves.
    sums: (2, K, C, 6) float64: of 1, e, d, e^2, d^2 and e d in each half, timestep and channel.
    """

    timesteps: Tensor
    samples: Tensor
    sums: Tensor

    @property
    def measured(self) -> Tensor:
        """Which timesteps have a sample in both halves: (K,) bool."""
        return (self.samples > 0).all(0)

    def correction(self, kind: Correction) -> OutputCorrection:
        """The correction of a kind: "bias", the mean error of each channel with k = 0, or "noise",
        PTQD's model.

        It is fitted on each half and tested on the other.  At timesteps where the error is no
        smaller for it, "noise" falls back to "bias" (dividing by 1 + k < 1 amplifies the noise),
        and "bias" to k = shift = 0.  Raises ConfigError where k <= -1, CalibrationError where
        nothing was measured.
        """
        if kind not in ("bias", "noise"):
            raise ConfigError(f"a correction is 'bias' or 'noise', got {kind!r}")
        if not bool(self.measured.any()):
            raise CalibrationError("no timestep was seen in two calibration samples or more")
        whole = self.sums.sum(0)
        slopes, _ = _fit(whole, kind)
        for first in (self.measured & (slopes <= -1)).nonzero()[:1, 0].tolist():
            raise ConfigError(
                f"the quantized output runs against full precision at timestep "
                f"{self.timesteps[first].item()} (k = {float(slopes[first]):.3g}): nothing that is "
                "left of it can be corrected; quantize to more bits"
            )
        count = whole[..., _ONE].sum(1).clamp(min=1)
        k, shift = torch.zeros(len(whole), dtype=torch.float64), torch.zeros_like(whole[..., _D])
        after = before = _leftover(whole, k, shift) / count
        kinds: tuple[Correction, ...] = ("bias",) if kind == "bias" else ("bias", "noise")
        for each in kinds:
            error = self._held_out(each) / count
            better = self.measured & (error < after)
            fitted_k, fitted_shift = _fit(whole, each)
            after = torch.where(better, error, after)
            k = torch.where(better, fitted_k, k)
            shift = torch.where(better[:, None], fitted_shift, shift)
        power = whole[..., _EE].sum(1) / count
        comparable = self.measured & (power > 0)
        return OutputCorrection(
            k=self._filled(k),
            shift=self._filled(shift),
            corrected=after < before,
            interpolated=int((~self.measured).sum()),
            before=float((before / power)[comparable].mean()) if comparable.any() else 0.0,
            after=float((after / power)[comparable].mean()) if comparable.any() else 0.0,
        )

    def _held_out(self, kind: Correction) -> Tensor:
        """Sum of squared errors of each half under the correction fitted on the other: (K,)."""
        total = torch.zeros(len(self.timesteps), dtype=torch.float64)
        for fitted, other in (self.sums, self.sums.flip(0)):
            k, shift = _fit(fitted, kind)
            error = _leftover(other, k, shift) / (1 + k).square()
            total += torch.where(k > -1, error, float("inf"))
        return total

    def _filled(self, values: Tensor) -> Tensor:
        """Values (K, ...) with those at timesteps not measured interpolated in t."""
        rows = values.reshape(len(values), -1).numpy()
        measured = self.measured.numpy()
        t = self.timesteps.double().cpu().numpy()
        columns = [np.interp(t, t[measured], column[measured]) for column in rows.T]
        return torch.from_numpy(np.stack(columns, 1)).reshape(values.shape)


def _fit(sums: Tensor, kind: Correction) -> tuple[Tensor, Tensor]:
    """k (K,) and shift (K, C) fitted to sums (K, C, 6) by least squares; with "bias", k is 0."""
    n, e, d, ee, _, ed = sums.unbind(-1)
    n = n.clamp(min=1)
    k = torch.zeros(len(sums), dtype=torch.float64)
    if kind == "noise":
        spread = (ee - e * e / n).sum(1)
        # an output that is constant in every channel has no slope
        usable = spread > 1e-12 * ee.sum(1)
        k = torch.where(usable, (ed - e * d / n).sum(1) / spread, 0.0)
    return k, (d - k[:, None] * e) / n


def _leftover(sums: Tensor, k: Tensor, shift: Tensor) -> Tensor:
    """Sum of (d - shift - k e)^2 over channels, (K,), from sums (K, C, 6)."""
    n, e, d, ee, dd, ed = sums.unbind(-1)
    k = k[..., None]
    square = dd + n * shift * shift + k * k * ee
    return (square - 2 * shift * d - 2 * k * ed + 2 * k * shift * e).sum(1).clamp(min=0)


def measure_errors(
    reference: fx.GraphModule,
    gm: fx.GraphModule,
    chunks: Iterable[Sequence[Tensor]],
    *,
    timesteps: Tensor,
) -> OutputErrors:
    """The error of `gm`'s first output against `reference`'s at each of `timesteps` (K,), sorted.

    chunks: for each batch the placeholder values in order; one batch is in memory at a time, and
    its samples may have different timesteps.  Samples of one timestep fall into two halves in
    turn.  A graph whose output cannot be corrected (`obstacle`) is not run: nothing is measured.
    Raises CalibrationError for a timestep that is not in the set, NaN and Inf.
    """
    channels = 0 if obstacle(gm) else int(channel_count(first_output(gm)))
    samples = torch.zeros(2, len(timesteps), dtype=torch.int64)
    sums = torch.zeros(2, len(timesteps), channels, 6, dtype=torch.float64)
    if not channels:
        return OutputErrors(timesteps, samples, sums)
    position = timestep_position(gm)

    def compared(chunk: Sequence[Tensor]) -> tuple[list[float], list[int], Tensor]:
        """The timestep of each sample, its index, and its terms of the sums: (B, C, 6)."""
        t = chunk[position]
        if unknown := find_unknown(timesteps.to(t.device), t):
            raise CalibrationError(
                f"a calibration sample is of timestep {unknown[0]}, which is none of the "
                f"{len(timesteps)} that the output is corrected for"
            )
        with torch.no_grad():
            e = _by_channel(reference(*chunk))
            d = _by_channel(gm(*chunk)) - e
        values = (torch.ones_like(e), e, d, e * e, d * d, e * d)
        of_sample = torch.stack([value.sum(1) for value in values], -1).cpu()
        return t.tolist(), timestep_index(timesteps.to(t.device), t).tolist(), of_sample

    for steps, rows, of_sample in in_order(chunks, compared, "errors of the output"):
        for step, row, sample in zip(steps, rows, of_sample, strict=True):
            if not bool(torch.isfinite(sample).all()):
                raise CalibrationError(
                    f"the output holds NaN or Inf on calibration data at timestep {step}"
                )
            half = int(samples[:, row].sum()) % 2
            samples[half, row] += 1
            sums[half, row] += sample
    return OutputErrors(timesteps, samples, sums)


def first_output(gm: fx.GraphModule) -> Any:
    """The first or only value that the graph returns: a node, or a constant."""
    (output,) = gm.graph.find_nodes(op="output")
    value = output.args[0]
    return value[0] if isinstance(value, (tuple, list)) and value else value


def channel_dim(shape: Sequence[Any]) -> int:
    """The dimension of channels: 1 of images and videos, the last one of tokens."""
    return 1 if len(shape) in (4, 5) else len(shape) - 1


def channel_count(node: fx.Node) -> Any:
    """The number of channels of a value."""
    shape = node.meta["val"].shape
    return shape[channel_dim(shape)]


def obstacle(gm: fx.GraphModule) -> str:
    """Why the graph's first output cannot be corrected by timestep; "" where it can."""
    node = first_output(gm)
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return "it is no floating-point tensor"
    batch = str(timestep_node(gm).meta["val"].shape[0])
    if value.dim() < 2 or str(value.shape[0]) != batch:
        return f"dim 0 of its shape {tuple(value.shape)} is not the batch"
    if not isinstance(value.shape[channel_dim(value.shape)], int):
        return f"the channels of its shape {tuple(value.shape)} are not fixed"
    return ""


def _by_channel(outputs: Any) -> Tensor:
    """The first of a graph's outputs as (B, values, C) float64."""
    x = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    assert isinstance(x, Tensor)
    moved = x.detach().double().movedim(channel_dim(x.shape), -1)
    return moved.reshape(len(x), -1, moved.shape[-1])
