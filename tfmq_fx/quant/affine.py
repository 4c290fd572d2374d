"""Quantize tensors affinely: scales and zero points, rounding to codes and back.

Codes of b bits run over [0, 2**b - 1]; the value of code q is scale * (q - zero). Codes of format
"fp8" are e4m3 floats, whose zero point is 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tfmq_fx.core.layer_config import Format, WeightSpec

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest e4m3 float
TINY_SCALE = 2.0**-126  # the least scale of an input: 1 / it is finite
SEARCH_POWER = 2.4  # exponent of the range search in TFMQ-DM's released settings
_SHRINK = 0.01  # each further candidate of the search clips one hundredth of the range more


@dataclass(frozen=True, slots=True)
class QParams:
    """Scale and zero point of one grid per channel, or of several for equal runs of its columns.

    scale: (channels,) or (channels, groups) float, > 0, in the units of the tensor.
    zero: the same shape, float holding integers in [0, 2**bits - 1]; 0 where the format is "fp8".
    """

    scale: Tensor
    zero: Tensor
    bits: int
    format: Format = "int"

    def over(self, columns: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point that broadcast over rows (channels, columns)."""
        if self.scale.dim() == 1:
            return self.scale[:, None], self.zero[:, None]
        run = columns // self.scale.shape[1]
        return self.scale.repeat_interleave(run, 1), self.zero.repeat_interleave(run, 1)

    def rows(self, start: int, stop: int) -> QParams:
        """The grids of channels [start, stop)."""
        return QParams(self.scale[start:stop], self.zero[start:stop], self.bits, self.format)


def levels(bits: int) -> int:
    """The largest code of `bits` bits."""
    return int(2**bits) - 1


def to_fp8(x: Tensor) -> Tensor:
    """Round every value to the nearest e4m3 float, saturating; NaN stays NaN."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def rounded_to_fp8(x: Tensor) -> Tensor:
    """`to_fp8` in x's own dtype, with the gradient of clipping: straight through the rounding."""
    nearest = to_fp8(x).to(x.dtype)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return nearest
    clipped = x.clamp(-FP8_MAX, FP8_MAX)
    return nearest.detach() + (clipped - clipped.detach())


def symmetric_steps(bits: int, format: Format) -> float:
    """The number of steps from 0 to the bound of a symmetric range; scale = bound / steps."""
    return FP8_MAX if format == "fp8" else 2.0 ** (bits - 1) - 1


def dynamic_scale(x: Tensor, dims: tuple[int, ...], steps: float) -> Tensor:
    """The scale of the symmetric range of x: float32, of size 1 in `dims`.

    steps: from `symmetric_steps`.
    """
    largest = x.detach().float().abs().amax(dims, keepdim=True)
    return (largest / steps).clamp(min=TINY_SCALE)


def rounded(x: Tensor) -> Tensor:
    """Round x, with a straight-through gradient."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x.round()
    return x + (x.round() - x).detach()  # exactly round(x)


def finite_only(codes: Tensor, x: Tensor) -> Tensor:
    """Replace `codes` by NaN where x is NaN or infinite, which no code can represent."""
    return codes + (x - x).detach()


def qparams(low: Tensor, high: Tensor, *, bits: int) -> QParams:
    """Scale and zero point of asymmetric quantization over [low, high].

    low, high: (channels,), in the units of the tensor; the range is widened to contain 0.
    scale = (high - low) / (2**bits - 1); a channel that is zero throughout gets scale 1.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / levels(bits)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / scale).round().clamp(0, levels(bits))
    return QParams(scale, zero, bits)


def symmetric_qparams(bound: Tensor, *, bits: int) -> QParams:
    """Scale and zero point of symmetric quantization over [-bound, bound].

    bound: (channels,), >= 0.  The zero point is 2**(bits - 1), so that codes less the zero point
    are signed integers; the scale is bound / (2**(bits - 1) - 1), or 1 for an all-zero channel.
    """
    scale = bound / (2 ** (bits - 1) - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return QParams(scale, torch.full_like(scale, 2 ** (bits - 1)), bits)


def quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Round `x` to codes in [0, 2**bits - 1], as floats; scale and zero broadcast to x."""
    return (torch.round(x / scale) + zero).clamp(0, levels(bits))


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The values of `codes`, in the dtype of `scale`."""
    return (codes - zero) * scale


def weight_qparams(weight: Tensor, spec: WeightSpec) -> QParams:
    """Choose scales and zero points of a weight (channels, in, ...) by search over clipped ranges.

    There is one of each per output channel or, where `spec.group_size` divides the input channels,
    per group of them.  The search keeps, per channel, the candidate that minimises
    sum |w - what|^2.4.  All-zero channels get scale 1, constant ones a grid that holds their value.
    8 bits and `spec.symmetric` give symmetric grids.  fp8 has scale amax / 448, without a search.
    """
    rows = weight.detach().flatten(1).float()
    if spec.format == "fp8":
        bound = rows.abs().amax(1)
        scale = torch.where(bound > 0, bound / FP8_MAX, torch.ones_like(bound))
        return QParams(scale, torch.zeros_like(scale), 8, "fp8")
    groups = weight_groups(weight.shape, spec)
    if groups > 1:
        parts = rows.reshape(len(rows) * groups, -1)
        flat = weight_qparams(parts, dataclasses.replace(spec, group_size=None))
        shape = (len(rows), groups)
        return QParams(flat.scale.view(shape), flat.zero.view(shape), spec.bits)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    symmetric = spec.symmetric or spec.bits == 8

    def candidate(share: float) -> QParams:
        if symmetric:
            bound = torch.maximum(-low, high)
            return symmetric_qparams(bound * share, bits=spec.bits)
        return qparams(low * share, high * share, bits=spec.bits)

    best = candidate(1.0)
    scale, zero = best.scale.clone(), best.zero.clone()
    loss = _search_loss(rows, best)
    for i in range(1, min(spec.search, 100)):  # the range vanishes at 100 times _SHRINK
        trial = candidate(1.0 - i * _SHRINK)
        trial_loss = _search_loss(rows, trial)
        better = trial_loss < loss
        loss = torch.where(better, trial_loss, loss)
        scale = torch.where(better, trial.scale, scale)
        zero = torch.where(better, trial.zero, zero)
    return QParams(scale, zero, spec.bits)


def weight_groups(shape: Sequence[int], spec: WeightSpec) -> int:
    """The number of scales of each output channel of a weight (out, in, ...) under `spec`."""
    size = spec.group_size
    return 1 if size is None or shape[1] % size else shape[1] // size


def _search_loss(rows: Tensor, grid: QParams) -> Tensor:
    scale, zero = grid.scale[:, None], grid.zero[:, None]
    restored = dequantize(quantize(rows, scale, zero, grid.bits), scale, zero)
    return (rows - restored).abs().pow(SEARCH_POWER).sum(1)


def activation_scales(
    low: Tensor, high: Tensor, *, bits: int, format: Format = "int"
) -> tuple[Tensor, int]:
    """The scales (K,) of an input with ranges low, high (K,), and their common zero point.

    fp8: the largest magnitude / 448, zero point 0; an empty range gets the median of the others.
    """
    if format == "int":
        return shared_zero_scales(low, high, bits=bits)
    scale = torch.maximum(-low.double(), high.double()) / FP8_MAX
    seen = scale > 0
    if not bool(seen.any()):
        return torch.ones(len(low), dtype=torch.float32, device=low.device), 0
    return torch.where(seen, scale, scale[seen].median()).float().clamp(min=TINY_SCALE), 0


def shared_zero_scales(low: Tensor, high: Tensor, *, bits: int) -> tuple[Tensor, int]:
    """The scales (K,) of all timesteps under one zero point, and that zero point.

    low, high: (K,) range at each timestep, widened to contain 0.
    s[t] = max(-low[t] / z, high[t] / (2**bits - 1 - z)); z minimises the relative rounding error,
    sum_t (s[t] / span[t])^2.  One z for all t keeps zero-padded borders exact in integer
    kernels.
    A timestep whose range is empty gets the median scale of the others (1 if there is none).
    """
    top = levels(bits)
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    span = high - low
    seen = span > 0
    if not bool(seen.any()):
        return torch.ones(len(low), dtype=torch.float32, device=low.device), 0
    zeros = _zero_candidates(low[seen], high[seen], top)
    negative = -low[seen][:, None] / zeros.clamp(min=0.5)  # z = 0 only stands where low is 0
    positive = high[seen][:, None] / (top - zeros).clamp(min=0.5)
    scales = torch.maximum(negative, positive)  # (seen, candidates)
    error = ((scales / span[seen][:, None]) ** 2).sum(0)
    pick = int(error.argmin())
    scale = torch.full_like(span, float(scales[:, pick].median()))
    scale[seen] = scales[:, pick]
    return scale.float().clamp(min=TINY_SCALE), int(zeros[pick])


def _zero_candidates(low: Tensor, high: Tensor, top: int) -> Tensor:
    """The zero points to try: the whole grid for small bit widths, else the ideal one of each
    timestep and 257 spread over the grid."""
    candidates = torch.linspace(
        0, top, min(top, 256) + 1, dtype=torch.float64, device=low.device
    ).round()
    if top > 255:
        ideal = (-low / (high - low) * top).round()
        candidates = torch.unique(torch.cat([candidates, ideal]))
    if bool((low < 0).any()):
        candidates = candidates[candidates > 0]
    if bool((high > 0).any()):
        candidates = candidates[candidates < top]
    return candidates
