"""affine: grids hold the range they are given, searches are never worse than min-max."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tfmq_fx.core.layer_config import WeightSpec
from tfmq_fx.quant.affine import (
    FP8,
    SEARCH_POWER,
    activation_scales,
    dequantize,
    levels,
    qparams,
    quantize,
    shared_zero_scales,
    symmetric_qparams,
    to_fp8,
    weight_qparams,
)

# Values far from where float32 itself runs out of digits or exponents.
ENDS = st.floats(-1000, 1000, width=32).map(lambda v: v if abs(v) > 1e-6 else 0.0)
EPS = 2.0**-23


def between(low, high, seed, count=200):
    """(channels, count) values in [low, high] of each channel, the ends among them."""
    share = torch.rand(len(low), count, generator=torch.Generator().manual_seed(seed))
    share[:, 0], share[:, 1] = 0, 1
    return low[:, None] + share * (high - low)[:, None]


@settings(deadline=None, max_examples=60)
@given(
    ends=st.lists(st.tuples(ENDS, ENDS), min_size=1, max_size=4),
    bits=st.integers(2, 8),
    seed=st.integers(0, 9),
)
def test_values_inside_the_range_move_half_a_step_at_most(ends, bits, seed):
    low, high = (torch.tensor(v) for v in zip(*map(sorted, ends), strict=True))
    grid = qparams(low, high, bits=bits)
    scale, zero = grid.scale[:, None], grid.zero[:, None]
    x = between(low, high, seed)
    codes = quantize(x, scale, zero, bits)
    assert bool((codes == codes.round()).all())
    assert float(codes.min()) >= 0 and float(codes.max()) <= levels(bits)
    error = (dequantize(codes, scale, zero) - x).abs()
    # A value moves scale / 2 by rounding. The zero point is rounded as well, so that an end of the
    # range may be clipped by up to half a step: another scale / 2, but never both for one value
    # (a clipped value lies between the last code and half a step beyond it). Then float32 rounding.
    assert bool((error <= scale / 2 + 8 * EPS * levels(bits) * scale).all())
    assert torch.equal(
        dequantize(quantize(torch.zeros(1, 1), scale, zero, bits), scale, zero), 0 * scale
    )


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_range_of_nothing_gets_scale_one_and_holds_zero(bits):
    grid = qparams(torch.zeros(1), torch.zeros(1), bits=bits)
    assert grid.scale.tolist() == [1.0] and grid.zero.tolist() == [0.0]
    grid = symmetric_qparams(torch.zeros(1), bits=bits)
    assert grid.scale.tolist() == [1.0] and grid.zero.tolist() == [2.0 ** (bits - 1)]


@settings(deadline=None, max_examples=40)
@given(bound=st.floats(2**-10, 2**10, width=32), bits=st.integers(2, 8))
def test_symmetric_grids_hold_both_ends_and_are_signed(bound, bits):
    grid = symmetric_qparams(torch.tensor([bound]), bits=bits)
    ends = torch.tensor([-bound, bound])
    codes = quantize(ends, grid.scale, grid.zero, bits)
    most = 2 ** (bits - 1) - 1
    assert (codes - grid.zero).tolist() == [-most, most]


def search_loss(rows, grid):
    scale, zero = grid.scale[:, None], grid.zero[:, None]
    restored = dequantize(quantize(rows, scale, zero, grid.bits), scale, zero)
    return (rows - restored).abs().pow(SEARCH_POWER).sum(1)


@settings(deadline=None, max_examples=40)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
    search=st.integers(2, 120),
)
def test_the_search_is_never_worse_than_min_max(bits, symmetric, seed, search):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 3, 2, 2, generator=generator)
    weight[0, 0, 0, 0] = 20.0  # an outlier, so that clipping may pay
    weight[1] = 0
    weight[2] = 0.7
    spec = WeightSpec(bits=bits, symmetric=symmetric, search=search)
    rows = weight.flatten(1)
    plain = weight_qparams(weight, WeightSpec(bits=bits, symmetric=symmetric, search=1))
    found = weight_qparams(weight, spec)
    assert bool((search_loss(rows, found) <= search_loss(rows, plain)).all())
    if symmetric or bits == 8:
        assert bool((found.zero == 2 ** (bits - 1)).all())


def test_the_search_clips_an_outlier_at_two_bits():
    rows = torch.cat([torch.linspace(-1, 1, 200), torch.tensor([3.0])])[None]
    plain = weight_qparams(rows, WeightSpec(bits=2, search=1))
    found = weight_qparams(rows, WeightSpec(bits=2, search=80))
    assert float(search_loss(rows, found)) < float(search_loss(rows, plain))
    assert float(found.scale) < float(plain.scale)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
def test_constant_channels_are_held_to_float_rounding(bits, value):
    grid = weight_qparams(torch.full((1, 9), value), WeightSpec(bits=bits))
    x = torch.full((1, 1), value)
    restored = dequantize(quantize(x, grid.scale, grid.zero, bits), grid.scale, grid.zero)
    # scale = |value| / n is rounded once, and n * scale once more
    assert abs(float(restored) - value) <= 2 * EPS * abs(value)


# ---------------------------------------------------------------- one zero point for all timesteps

RANGES = st.lists(
    st.tuples(
        st.sampled_from((0.0, 1e-9, 0.01, 0.3, 1.0, 7.0)),
        st.sampled_from((0.0, 1e-9, 0.02, 0.3, 1.5, 50.0)),
    ),
    min_size=1,
    max_size=6,
)


def relative_error(low, high, zero, top):
    """sum_t (s[t] / span[t])^2 of the least scales with that zero point, or inf."""
    total = 0.0
    for a, b in zip(low, high, strict=True):
        if b - a == 0:
            continue
        if (a < 0 and zero == 0) or (b > 0 and zero == top):
            return float("inf")
        scale = max(-a / max(zero, 0.5), b / max(top - zero, 0.5))
        total += (scale / (b - a)) ** 2
    return total


@settings(deadline=None, max_examples=60)
@given(ends=RANGES, bits=st.sampled_from((4, 5, 8)))
def test_a_shared_zero_point_is_the_best_by_brute_force(ends, bits):
    low, high = [-a for a, _ in ends], [b for _, b in ends]
    low32, high32 = torch.tensor(low), torch.tensor(high)
    scale, zero = shared_zero_scales(low32, high32, bits=bits)
    top = levels(bits)
    # judged on the float32 ends that the function was given
    low, high = low32.double().tolist(), high32.double().tolist()
    best = min(relative_error(low, high, z, top) for z in range(top + 1))
    if not any(b - a for a, b in zip(low, high, strict=True)):
        assert scale.tolist() == [1.0] * len(ends) and zero == 0
        return
    # both sides in float64 over at most 6 terms
    assert relative_error(low, high, zero, top) <= best * (1 + 1e-12)


@settings(deadline=None, max_examples=60)
@given(ends=RANGES, bits=st.sampled_from((4, 8, 16)))
def test_every_timestep_is_covered(ends, bits):
    low, high = (torch.tensor(v) for v in zip(*((-a, b) for a, b in ends), strict=True))
    scale, zero = shared_zero_scales(low, high, bits=bits)
    assert scale.dtype == torch.float32 and bool((scale > 0).all())
    assert 0 <= zero <= levels(bits)
    # the scale is rounded to float32 once, and so is each product here
    slack = 4 * EPS * torch.maximum(-low, high)
    assert bool((-zero * scale <= low + slack).all())
    assert bool(((levels(bits) - zero) * scale >= high - slack).all())


@settings(deadline=None, max_examples=60)
@given(ends=RANGES)
def test_sixteen_bits_waste_next_to_nothing(ends):
    low, high = [-a for a, _ in ends], [b for _, b in ends]
    _, zero = shared_zero_scales(torch.tensor(low), torch.tensor(high), bits=16)
    top = levels(16)
    coarse = [0, *range(1, top, 37), top - 1, top]
    best = min(relative_error(low, high, z, top) for z in coarse)
    if best > 0:
        # Candidates are the timesteps' ideals and a grid of spacing g = top / 256. Next to an end
        # of the codes the best zero point may be 1 and the candidate g: scales grow by 256 / 255,
        # their squares by 0.8 %. Elsewhere neighbours are at most g apart, and the error is flat
        # between two ideals that pull in opposite directions: below 2 % in all.
        assert relative_error(low, high, zero, top) <= 1.02 * best


def test_a_timestep_that_was_always_zero_takes_the_median_scale():
    low, high = torch.tensor([-1.0, 0.0, -2.0, -3.0]), torch.tensor([1.0, 0.0, 2.0, 3.0])
    scale, _ = shared_zero_scales(low, high, bits=8)
    assert float(scale[1]) == float(scale[2])


def test_fp8_scales_put_the_largest_magnitude_at_448_and_have_no_zero_point():
    low, high = torch.tensor([-1.0, 0.0, 0.5, -4.0]), torch.tensor([0.5, 0.0, 2.0, -3.0])
    scale, zero = activation_scales(low, high, bits=8, format="fp8")
    median = 2 / 448  # of 1, 2 and 4; the empty range takes it
    expected = torch.tensor([1 / 448, median, 2 / 448, 4 / 448])
    assert zero == 0 and scale.dtype == torch.float32 and torch.equal(scale, expected)
    empty, zero = activation_scales(torch.zeros(2), torch.zeros(2), bits=8, format="fp8")
    assert empty.tolist() == [1, 1] and zero == 0
    integers = activation_scales(low, high, bits=8)
    shared = shared_zero_scales(low, high, bits=8)
    assert torch.equal(integers[0], shared[0]) and integers[1] == shared[1]


def test_every_fp8_float_is_its_own_nearest_and_more_is_clamped():
    floats = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    finite = floats[~floats.isnan()]
    assert len(finite) == 254 and float(finite.max()) == 448
    assert torch.equal(to_fp8(finite).float(), finite)
    assert to_fp8(torch.tensor([1e9, -torch.inf])).float().tolist() == [448, -448]
    assert bool(to_fp8(torch.tensor([torch.nan])).float().isnan())


def test_a_range_that_does_not_reach_zero_is_widened_to_it():
    scale, zero = shared_zero_scales(torch.tensor([2.0]), torch.tensor([5.0]), bits=8)
    assert zero == 0 and float(scale) == pytest.approx(5 / 255, rel=EPS)
    scale, zero = shared_zero_scales(torch.tensor([-5.0]), torch.tensor([-2.0]), bits=8)
    assert zero == 255 and float(scale) == pytest.approx(5 / 255, rel=EPS)
