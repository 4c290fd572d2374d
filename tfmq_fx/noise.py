"""Energy of a signal and of its error, sample by sample, and their ratio in decibels."""

from __future__ import annotations

import torch
from torch import Tensor


def energies(expected: Tensor, found: Tensor, samples: int) -> Tensor:
    """Squares of `expected` and of its error in `found`, summed for each sample: (2, samples),
    float64.

    expected, found: one shape, (n samples, ...), sample by sample; where the first dimension is no
    multiple of `samples`, each gets an equal share of everything.
    """
    return torch.stack([squares(expected, samples), squares(expected - found, samples)])


def squares(x: Tensor, samples: int) -> Tensor:
    """Squares of `x` (n samples, ...) summed for each sample: (samples,), float64."""
    batched = x.dim() > 0 and len(x) > 0 and len(x) % samples == 0
    rows = x.detach().reshape(samples if batched else 1, -1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu()
    return norms.square() if batched else (norms.square() / samples).expand(samples)


def decibels(energy: Tensor) -> Tensor:
    """Signal to noise in dB of `energies` (2, ...): (...), inf without error, -inf for an error
    with no signal, nan where either is nan."""
    signal, error = energy
    # two logarithms: the quotient itself could overflow or vanish
    ratio: Tensor = 10 * (signal.log10() - error.log10())
    return ratio.masked_fill((error == 0) & ~signal.isnan(), torch.inf)


def pooled(energy: Tensor) -> float:
    """Signal to noise in dB of `energies` (2, samples), summed over all samples."""
    return float(decibels(energy.sum(1)))
