"""Compute factors that divide the input channels of a layer and multiply its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tfmq_fx.core.errors import ConfigError

_FLOOR = 0.01  # quantile of a timestep's peaks to which lower peaks are raised
_WIDEST = 2.0**13  # bound of smoothing factors and their inverses: normal in half precision


def tcr_factors(peaks: Tensor, *, limit: float) -> Tensor:
    """The factors r of TCAQ-DM's timestep-channel reparameterisation (TCR): (C,) in [1, limit].

    peaks: (K, C), largest |x| of each channel at each of K timesteps.  limit: at least 1.
    r[t,d] = p[t,d] / min_d p[t,d], averaged over t by weights p[t,d]; TCAQ-DM (arXiv 2412.16700).
    Ours: p is floored at the 1st percentile of the timestep's positive peaks, or one dead channel
    would send every other to the limit; a channel that is always zero gets 1.
    """
    p = _peaks(peaks)
    p = p / p.max().clamp(min=torch.finfo(p.dtype).tiny)  # squares must not overflow
    if not limit >= 1:
        raise ConfigError(f"the limit of TCR's factors must be at least 1, got {limit}")
    total, weighted = torch.zeros_like(p[0]), torch.zeros_like(p[0])
    alive = (p > 0).any(0)
    for row in p:
        positive = row[row > 0]
        if not len(positive):
            continue
        floored = row.clamp(min=torch.quantile(positive, _FLOOR))
        total += floored
        weighted += floored * floored / floored[alive].min()
    r = torch.where(alive, weighted / total, 1.0)
    return r.clamp(1, limit).to(_float(peaks))


def smoothing_factors(peaks: Tensor, weights: Sequence[Tensor], *, alpha: float) -> Tensor:
    """SmoothQuant's factors (C,), max|X_j|^alpha / max|W_j|^(1 - alpha), for layers that share an
    input.

    peaks: (K, C), largest |x| of each channel; the largest of K counts.  weights: of each of those
    layers, (out, C, ...).  alpha: 0 to 1; 1 moves all of the difficulty into the weights.
    Ours: the geometric mean of the factors is 1, which changes no quantization error, and they stay
    within 2**-13 and 2**13; a channel where inputs or weights are always zero gets 1.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha of SmoothQuant's factors must be 0 to 1, got {alpha}")
    x = _peaks(peaks).amax(0)
    w = torch.zeros_like(x)
    for weight in weights:
        if weight.dim() < 2 or weight.shape[1] != len(x):
            raise ConfigError(
                f"a weight of shape {tuple(weight.shape)} does not read {len(x)} input channels"
            )
        by_channel = weight.detach().abs().transpose(0, 1).flatten(1).amax(1)
        w = torch.maximum(w, by_channel.to(w))
    if not bool(torch.isfinite(w).all()):
        raise ConfigError("weights hold NaN or Inf")
    alive = (x > 0) & (w > 0)
    log = torch.zeros_like(x)
    if bool(alive.any()):
        log[alive] = alpha * x[alive].log2() - (1 - alpha) * w[alive].log2()
        log[alive] -= log[alive].mean()
    return log.exp2().clamp(1 / _WIDEST, _WIDEST).to(_float(peaks))


def _peaks(peaks: Tensor) -> Tensor:
    """Convert peaks to float64; raises ConfigError unless they are finite and not negative."""
    if peaks.dim() != 2 or peaks.shape[0] == 0:
        raise ConfigError(f"peaks must be (timesteps, channels), got {tuple(peaks.shape)}")
    wide = peaks.detach().double()
    if not bool((torch.isfinite(wide) & (wide >= 0)).all()):
        raise ConfigError("peaks must be finite and not negative")
    return wide


def _float(peaks: Tensor) -> torch.dtype:
    """The dtype of factors for these peaks: float32, or float64 if they are."""
    return torch.float64 if peaks.dtype == torch.float64 else torch.float32
