"""likelihood: drawn samples of both laws are told apart, and degenerate ones decide nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tfmq_fx.likelihood import (
    UNDECIDED,
    choose_x_min,
    exponential_rate,
    likelihood_test,
    power_law_exponent,
)


def uniform(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator).double().clamp(min=1e-12)


def power_law(alpha, x_min, count=2000, seed=0):
    return x_min * uniform(count, seed) ** (-1 / (alpha - 1))


def exponential(rate, count=2000, seed=0):
    return -uniform(count, seed).log() / rate


@settings(deadline=None, max_examples=20)
@given(
    alpha=st.floats(1.3, 4),
    x_min=st.sampled_from((1e-6, 1e-2, 3.0)),
    seed=st.integers(0, 9),
)
def test_a_power_law_is_recognised_and_fitted(alpha, x_min, seed):
    x = power_law(alpha, x_min, seed=seed)
    # the deviation of the estimate is (alpha - 1) / sqrt(n), Clauset et al.; 5 of them
    assert abs(power_law_exponent(x, x_min) - alpha) < 5 * (alpha - 1) / math.sqrt(len(x))
    found = likelihood_test(x)
    assert found.power_law and found.ratio > 2 and found.p_value < 0.05
    # half of the values remain at least, and 20 candidates of x_min do not spoil the fit
    assert found.count >= 1000
    assert abs(found.exponent - alpha) < 10 * (alpha - 1) / math.sqrt(found.count)


@settings(deadline=None, max_examples=20)
@given(rate=st.sampled_from((1e-3, 1.0, 1e4)), seed=st.integers(0, 9))
def test_an_exponential_law_is_recognised_and_fitted(rate, seed):
    x = exponential(rate, seed=seed)
    # relative deviation of the estimate 1 / sqrt(n); 5 of them
    assert abs(exponential_rate(x, 0.0) / rate - 1) < 5 / math.sqrt(len(x))
    found = likelihood_test(x)
    assert not found.power_law and found.ratio < -2 and found.p_value < 0.05


def test_the_unit_does_not_matter():
    x = power_law(2.0, 1.0)
    a, b = likelihood_test(x), likelihood_test(x * 2.0**-20)
    assert math.isclose(a.ratio, b.ratio, rel_tol=1e-9)
    assert math.isclose(a.x_min * 2.0**-20, b.x_min, rel_tol=1e-12)
    assert math.isclose(a.rate, b.rate * 2.0**-20, rel_tol=1e-9)


def test_zeros_do_not_count():
    x = power_law(2.0, 0.1)
    assert likelihood_test(torch.cat([x, torch.zeros(5000)])) == likelihood_test(x)


def test_x_min_passes_over_values_that_follow_no_power_law():
    bulk = uniform(600, 1) * 0.01 + 1e-4
    x = torch.cat([bulk, power_law(2.0, 0.1, count=1400)])
    assert 0.05 < choose_x_min(x) < 0.5


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(100),
        torch.full((100,), 0.25),
        torch.tensor([0.5]),
        torch.empty(0),
        power_law(2.0, 0.1, count=15),
        torch.zeros(4, 25).index_fill(1, torch.tensor([0]), 1.0),
    ],
    ids=["zeros", "constant", "one value", "none", "too few", "one-hot rows"],
)
def test_samples_that_say_nothing_decide_nothing(values):
    assert likelihood_test(values) == UNDECIDED
    assert not UNDECIDED.power_law and UNDECIDED.p_value == 1


def test_any_shape_and_precision_is_read():
    x = power_law(2.0, 0.01, count=1024)
    square = likelihood_test(x.view(32, 32))
    assert square == likelihood_test(x)
    half = likelihood_test(x.to(torch.bfloat16))
    assert half.power_law and abs(half.exponent - square.exponent) < 0.3
