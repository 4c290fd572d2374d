"""Measure the signal-to-quantization-noise ratio (SQNR) in decibels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tfmq_fx.core.errors import ConfigError


def energies(expected: Tensor, actual: Tensor, samples: int) -> Tensor:
    """The sums of squares of `expected` and of the error of `actual`: (2, samples), float64.

    expected, actual: the same shape (n samples, ...), sample by sample; where the first dimension
    is no multiple of `samples`, each sample gets an equal share of everything.
    """
    return torch.stack([squares(expected, samples), squares(expected - actual, samples)])


def squares(x: Tensor, samples: int) -> Tensor:
    """The sum of squares of each sample of `x` (n samples, ...): (samples,), float64."""
    batched = x.dim() > 0 and len(x) > 0 and len(x) % samples == 0
    rows = x.detach().reshape(samples if batched else 1, -1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu()
    return norms.square() if batched else (norms.square() / samples).expand(samples)


def decibels(energy: Tensor) -> Tensor:
    """The signal-to-noise ratio in dB of `energies` (2, ...): (...).

    inf without error, -inf for an error without signal, nan where either is nan.
    """
    signal, error = energy
    # two logarithms: the quotient itself could overflow or vanish
    ratio: Tensor = 10 * (signal.log10() - error.log10())
    return ratio.masked_fill((error == 0) & ~signal.isnan(), torch.inf)


def pooled(energy: Tensor) -> float:
    """The signal-to-noise ratio in dB of `energies` (2, samples), summed over all samples."""
    return float(decibels(energy.sum(1)))


def same_shape(a: Tensor, b: Tensor) -> None:
    """Raise ConfigError unless both tensors have the same shape and some elements."""
    if a.shape != b.shape:
        raise ConfigError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    if a.numel() == 0:
        raise ConfigError(f"nothing to compare: the shape is {tuple(a.shape)}")


def _energies(reference: Tensor, estimate: Tensor) -> Tensor:
    """The sums of squares of reference and error, (2, 1), computed in float64."""
    return energies(reference.detach().double(), estimate.detach().double(), 1)


def sqnr(reference: Tensor, estimate: Tensor) -> float:
    """The SQNR in dB: 10 log10(sum f^2 / sum (f - fhat)^2) over all elements.

    reference, estimate: one shape, any real dtype, summed in float64. inf where they are equal,
    -inf where only the reference is zero, nan where either has a nan. Raises ConfigError for
    unequal or empty shapes.
    """
    same_shape(reference, estimate)
    return pooled(_energies(reference, estimate))


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSqnr:
    """The SQNR of a denoiser's outputs along a trajectory, in dB.

    per_step: one ratio for each denoising step, over all images.
    mean: their arithmetic mean; inf as soon as one step is exact.
    pooled: one ratio of the energies summed over all steps.
    """

    per_step: list[float]
    mean: float
    pooled: float


def output_sqnr(reference_outputs: Tensor, outputs: Tensor) -> OutputSqnr:
    """The SQNR of outputs (steps, n, ...) against the full-precision ones.

    Each step: 10 log10(sum f^2 / sum (f - fhat)^2) over the n images and their elements, as in
    `sqnr`. Raises ConfigError for unequal, empty or one-dimensional shapes.
    """
    same_shape(reference_outputs, outputs)
    if outputs.dim() < 2:
        raise ConfigError(f"outputs must be (steps, n, ...), got {tuple(outputs.shape)}")
    pairs = zip(reference_outputs, outputs, strict=True)
    energy = torch.cat([_energies(f, fhat) for f, fhat in pairs], 1)
    per_step = decibels(energy).tolist()
    return OutputSqnr(per_step=per_step, mean=sum(per_step) / len(per_step), pooled=pooled(energy))
