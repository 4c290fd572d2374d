"""Whether values follow a power law: the test by which a logarithmic grid is chosen or not.

TCAQ-DM (AAAI 2025, arXiv 2412.16700) fits a power law to attention probabilities by maximum
likelihood and takes a log2 quantizer where it beats an alternative by the ratio of likelihoods. The
alternative is not named in what we have of it: the exponential law is ours, as are the choice of
x_min and the normalisation (Clauset, Shalizi and Newman, SIAM Review 51, 2009, after Vuong 1989).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_CANDIDATES = 20  # values of x_min tried
_TAIL = 0.5  # share of the values that x_min leaves at least
_LEAST = 16  # values below which nothing is concluded


@dataclass(frozen=True, slots=True)
class LikelihoodTest:
    """The outcome for one sample.

    count: values at or above x_min.  exponent: alpha of the density (x / x_min) ** -alpha.
    rate: lambda of the density exp(-lambda (x - x_min)), per unit of x.
    ratio: normalised log-likelihood ratio, > 0 where the power law fits better; it is standard
    normal where both fit alike.  p_value: the chance of so large a ratio, of either sign, then.
    """

    count: int
    x_min: float
    exponent: float
    rate: float
    ratio: float
    p_value: float

    @property
    def power_law(self) -> bool:
        """Whether the power law fits better."""
        return self.ratio > 0


UNDECIDED = LikelihoodTest(0, 0.0, math.inf, math.inf, 0.0, 1.0)
"""Of samples with too few values, or none that differ."""


def power_law_exponent(x: Tensor, x_min: float) -> float:
    """Maximum-likelihood alpha of p(x) = (alpha - 1) / x_min * (x / x_min) ** -alpha.

    x: values >= x_min > 0; inf where all equal x_min.
    """
    total = float((x.double() / x_min).log().sum())
    return 1 + len(x) / total if total > 0 else math.inf


def exponential_rate(x: Tensor, x_min: float) -> float:
    """Maximum-likelihood lambda of p(x) = lambda * exp(-lambda (x - x_min)).

    x: values >= x_min; inf where all equal x_min.
    """
    mean = float((x.double() - x_min).mean())
    return 1 / mean if mean > 0 else math.inf


def choose_x_min(x: Tensor) -> float:
    """Where the power law starts: the candidate under which its fit lies nearest to the sample.

    x: positive values.  Candidates are 20 quantiles of the lower half, so that half the values
    remain; nearness is the Kolmogorov-Smirnov distance of the cumulative distributions.
    """
    values = x.detach().double().flatten().sort().values
    best, best_distance = float(values[0]), math.inf
    for i in range(_CANDIDATES):
        start = int(len(values) * (1 - _TAIL) * i / _CANDIDATES)
        tail, x_min = values[start:], float(values[start])
        alpha = power_law_exponent(tail, x_min)
        if math.isinf(alpha):
            continue
        steps = torch.arange(len(tail) + 1, device=x.device).double() / len(tail)
        fitted = 1 - (tail / x_min) ** (1 - alpha)
        distance = float(torch.maximum(fitted - steps[:-1], steps[1:] - fitted).max())
        if distance < best_distance:
            best, best_distance = x_min, distance
    return best


def likelihood_test(x: Tensor) -> LikelihoodTest:
    """A power law against an exponential law, for the positive ones of values `x` (any shape).

    Both are fitted to the values at or above `choose_x_min`, on which the outcome depends; it says
    which law fits better, not which grid loses less.  Zeros belong to neither law and both
    quantizers keep them, so they do not count.  UNDECIDED below 16 values or where all are equal.
    """
    values = x.detach().double().flatten()
    values = values[values > 0]
    if len(values) < _LEAST:
        return UNDECIDED
    x_min = choose_x_min(values)
    tail = values[values >= x_min]
    alpha, rate = power_law_exponent(tail, x_min), exponential_rate(tail, x_min)
    if math.isinf(alpha) or math.isinf(rate):
        return UNDECIDED
    power = math.log(alpha - 1) - math.log(x_min) - alpha * (tail / x_min).log()
    exponential = math.log(rate) - rate * (tail - x_min)
    difference = power - exponential
    deviation = float(difference.std(correction=0))
    if deviation == 0:
        return UNDECIDED
    ratio = float(difference.mean()) * math.sqrt(len(tail)) / deviation
    p_value = math.erfc(abs(ratio) / math.sqrt(2))
    return LikelihoodTest(len(tail), x_min, alpha, rate, ratio, p_value)
