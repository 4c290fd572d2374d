"""channel_scaling: the formulas by hand, and factors that stay usable whatever the statistics."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.quant.channel_scaling import smoothing_factors, tcr_factors

PEAK = st.one_of(st.just(0.0), st.floats(1e-30, 1e30))


@st.composite
def peak_tables(draw):
    rows, channels = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    values = draw(st.lists(PEAK, min_size=rows * channels, max_size=rows * channels))
    return torch.tensor(values, dtype=torch.float64).view(rows, channels)


def test_tcr_by_hand():
    peaks = torch.tensor([[1.0, 2.0], [3.0, 3.0]], dtype=torch.float64)
    # The floor is the 1st percentile, here 1.01 of [1, 2] and 3 of [3, 3].
    low = (1.01 * 1 + 3.0 * 1) / (1.01 + 3.0)
    high = (2.0 * 2 / 1.01 + 3.0 * 1) / (2.0 + 3.0)
    assert_close(tcr_factors(peaks, limit=10), torch.tensor([low, high], dtype=torch.float64))
    assert tcr_factors(peaks, limit=1.2)[1] == 1.2


def test_one_dead_channel_leaves_the_others_factors_near_what_they_were():
    peaks = torch.rand(5, 200, dtype=torch.float64) + 1
    nearly = peaks.clone()
    nearly[:, 7] = 1e-9  # never quite zero: the floor is what helps
    dead = peaks.clone()
    dead[:, 7] = 0
    others = torch.arange(200) != 7
    expected = tcr_factors(peaks, limit=10)
    for changed in (nearly, dead):
        found = tcr_factors(changed, limit=10)
        assert_close(found[others], expected[others], rtol=0.02, atol=0)  # a percentile apart
    assert tcr_factors(dead, limit=10)[7] == 1 and tcr_factors(nearly, limit=10)[7] == 1


@given(peaks=peak_tables(), limit=st.floats(1, 1e4), power=st.integers(-20, 20))
def test_tcr_factors_are_within_the_limit_and_know_no_units(peaks, limit, power):
    found = tcr_factors(peaks, limit=limit)
    assert bool(((found >= 1) & (found <= limit)).all())
    assert bool((found[(peaks == 0).all(0)] == 1).all())
    assert_close(tcr_factors(peaks * 2.0**power, limit=limit), found)


def test_smoothing_by_hand():
    peaks = torch.tensor([[1.0, 4.0], [16.0, 2.0]], dtype=torch.float64)
    weights = [torch.tensor([[1.0, -2.0], [0.5, 1.0]]), torch.tensor([[[4.0, -1.0], [1.0, 0.0]]])]
    raw = torch.tensor([16**0.75 / 4**0.25, 4**0.75 / 2**0.25], dtype=torch.float64)
    found = smoothing_factors(peaks, weights, alpha=0.75)
    assert_close(found, raw / raw.prod().sqrt())


def test_alpha_says_which_side_is_evened_out():
    peaks, weight = torch.rand(3, 8) + 0.1, torch.randn(5, 8)
    even = peaks.amax(0) / smoothing_factors(peaks, [weight], alpha=1)
    assert_close(even, even[:1].expand(8))
    even = weight.abs().amax(0) * smoothing_factors(peaks, [weight], alpha=0)
    assert_close(even, even[:1].expand(8))


@given(peaks=peak_tables(), alpha=st.floats(0, 1), dead=st.booleans(), seed=st.integers(0, 99))
def test_smoothing_factors_fit_half_precision_and_leave_dead_channels(peaks, alpha, dead, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, peaks.shape[1], 2, generator=generator) * 1e-20
    if dead:
        weight[:, 0] = 0
    found = smoothing_factors(peaks, [weight], alpha=alpha)
    tiny = torch.finfo(torch.float16).tiny
    assert bool(((found > tiny) & (1 / found > tiny)).all())
    silent = (peaks == 0).all(0) | (weight == 0).flatten(2).all(2).all(0)
    assert bool((found[silent] == 1).all())


def test_half_precision_peaks_give_single_precision_factors():
    peaks = torch.rand(2, 3, dtype=torch.float16) + 1
    assert tcr_factors(peaks, limit=2).dtype == torch.float32
    assert smoothing_factors(peaks, [torch.ones(1, 3)], alpha=0.5).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tcr_factors(torch.ones(2, 3), limit=0.5), "limit .* at least 1, got 0.5"),
        (lambda: tcr_factors(torch.ones(3), limit=2), r"must be \(timesteps, channels\), got \(3,"),
        (lambda: tcr_factors(-torch.ones(1, 3), limit=2), "finite and not negative"),
        (lambda: tcr_factors(torch.full((1, 3), torch.nan), limit=2), "finite and not negative"),
        (lambda: smoothing_factors(torch.ones(1, 3), [], alpha=1.5), "0 to 1, got 1.5"),
        (
            lambda: smoothing_factors(torch.ones(1, 3), [torch.ones(3, 4)], alpha=0.5),
            r"shape \(3, 4\) does not read 3 input channels",
        ),
        (
            lambda: smoothing_factors(torch.ones(1, 3), [torch.full((3, 3), torch.inf)], alpha=0.5),
            "weights hold NaN or Inf",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
