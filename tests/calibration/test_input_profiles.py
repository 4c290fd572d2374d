"""profiles: what observers keep of a layer's input, and the ranges made of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfmq_fx.calibration import input_profiles
from tfmq_fx.calibration.input_profiles import (
    ProfileObserver,
    clipped_range,
    input_ranges,
    timestep_groups,
)
from tfmq_fx.core.errors import CalibrationError
from tfmq_fx.core.layer_config import ActivationSpec
from tfmq_fx.quant.affine import levels


def observed(calls, channel_dim=1):
    observer = ProfileObserver("layer", channel_dim=channel_dim, seed=0)
    for x, t in calls:
        assert observer(x, torch.tensor(t)) is x
    return observer.profile()


@pytest.mark.parametrize("shape, dim", [((4, 3, 5, 5), 1), ((4, 7, 3), -1), ((4, 3), -1)])
def test_what_is_recorded_is_what_the_values_were(shape, dim):
    x, y = torch.randn(shape), 2 * torch.randn(shape)
    profile = observed([(x, [9, 1, 9, 1]), (y, [1, 1, 1, 1])], dim)
    assert profile.steps.tolist() == [1, 9]
    at = {9: x[[0, 2]], 1: torch.cat([x[[1, 3]], y])}
    for i, step in enumerate((1, 9)):
        rows = at[step].movedim(dim, -1).flatten(0, -2)
        assert profile.low[i] == rows.min() and profile.high[i] == rows.max()
        assert torch.equal(profile.peaks[i], rows.abs().amax(0))
        kept = zip(profile.values[i].tolist(), profile.channels[i].tolist(), strict=True)
        assert all(value in rows[:, channel] for value, channel in kept)
    every = torch.cat(list(at.values())).movedim(dim, -1).flatten(0, -2)
    torch.testing.assert_close(profile.power, every.square().mean(0))


def test_an_input_with_several_rows_for_each_sample_is_told_apart_by_timestep():
    x = torch.cat([torch.full((2, 3), 1.0), torch.full((2, 3), 5.0)])  # two rows a sample
    profile = observed([(x, [0, 1])], -1)
    assert profile.high.tolist() == [1, 5]


def test_an_input_without_a_batch_counts_for_every_timestep():
    profile = observed([(torch.tensor([[1.0, -2.0]]), [0, 1])], -1)
    assert profile.low.tolist() == [-2, -2]


def test_rows_are_bounded_and_drawn_from_all_calls():
    calls = [(torch.full((1, 64, 16, 16), float(i)), [3]) for i in range(8)]
    (values,) = observed(calls).values
    assert len(values) == 4096
    counts = torch.bincount(values.long(), minlength=8)
    assert counts.min() > 400 and counts.max() < 630  # 512 each, six standard deviations


def test_few_positions_of_a_wide_layer_with_an_outlier_are_not_clipped_away():
    x = torch.randn(2, 77, 2048)
    x[:, 0] *= 40  # a first token that dwarfs the others, as text encoders make
    profile = observed([(x, [1, 1])], -1)
    spec = ActivationSpec(bits=8, ranges="mse")
    found = input_ranges(profile, spec, torch.tensor([1]), torch.ones(2048))
    assert found.high[0] > 0.5 * profile.high[0]


def test_values_that_are_no_numbers_are_named():
    with pytest.raises(CalibrationError, match="input of layer holds NaN or Inf at timestep 4"):
        observed([(torch.tensor([[1.0, float("nan")]]), [4])], -1)
    with pytest.raises(CalibrationError, match="never computed"):
        observed([])


@given(seed=st.integers(0, 500), bits=st.sampled_from([4, 6, 8]))
def test_the_searched_range_loses_no_more_than_the_whole_one(seed, bits):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(200, 6, generator=generator) ** 3
    importance = torch.rand(6, generator=generator)
    low, high = rows.min(), rows.max()

    def loss(low, high):
        scale = (high - low) / levels(bits)
        zero = (-low / scale).round()
        codes = ((rows / scale).round() + zero).clamp(0, levels(bits))
        return float((((codes - zero) * scale - rows).square() * importance).sum())

    weights = importance.expand_as(rows).flatten()
    found = clipped_range(rows.flatten(), low, high, bits=bits, weights=weights)
    assert low <= found[0] <= 0 <= found[1] <= high
    assert loss(*found) <= loss(low, high) * (1 + 1e-5)  # float32 sums of 1,200 values
    if bits == 4:
        assert loss(*found) < loss(low, high)  # heavy tails are worth clipping


@pytest.mark.parametrize("bits", [8, 16])
def test_ranges_of_least_error_are_searched_at_every_width(bits, monkeypatch):
    asked = []

    def search(values, low, high, *, bits, weights):
        asked.append(bits)
        return low / 2, high / 2

    monkeypatch.setattr(input_profiles, "clipped_range", search)
    profile = observed([(torch.tensor([[-2.0, 8.0]]), [1])], -1)
    spec = ActivationSpec(bits=bits, ranges="mse")
    found = input_ranges(profile, spec, torch.tensor([1]), torch.ones(2))
    assert asked == [bits] and (float(found.low[0]), float(found.high[0])) == (-1.0, 4.0)


def test_channels_of_no_importance_do_not_widen_the_range():
    rows = torch.randn(500, 2)
    rows[:, 1] *= 3
    low, high = rows.min(), rows.max()
    weights = torch.tensor([1.0, 0.0]).expand_as(rows).flatten()
    aware = clipped_range(rows.flatten(), low, high, bits=4, weights=weights)
    blind = clipped_range(rows.flatten(), low, high, bits=4, weights=torch.ones(1000))
    assert aware[1] < 0.7 * blind[1]


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_an_input_that_is_always_the_same_has_a_range_that_holds_it(value):
    profile = observed([(torch.full((2, 3), value), [0, 1])], -1)
    for estimator in ("minmax", "mse"):
        spec = ActivationSpec(bits=4, ranges=estimator)
        found = input_ranges(profile, spec, torch.tensor([0, 1]), torch.ones(3))
        low, high = found.low.clamp(max=0), found.high.clamp(min=0)
        assert torch.isfinite(low).all() and torch.isfinite(high).all()
        assert (low <= value).all() and (high >= value).all()


def test_ranges_of_groups_static_ones_and_timesteps_not_visited():
    calls = [(torch.tensor([[float(-t), float(t)]]), [t]) for t in (0, 10, 20, 30)]
    profile, steps = observed(calls, -1), torch.tensor([0, 10, 20, 30])

    def high(spec, at=steps):
        return input_ranges(profile, spec, at, torch.ones(2)).high.tolist()

    assert high(ActivationSpec()) == [0, 10, 20, 30]
    assert high(ActivationSpec(timestep_groups=2)) == [10, 10, 30, 30]
    assert high(ActivationSpec(per_timestep=False)) == [30, 30, 30, 30]
    found = input_ranges(profile, ActivationSpec(), torch.tensor([5, 10]), torch.ones(2))
    assert found.high.tolist() == [5, 10] and found.interpolated == 1
    assert high(ActivationSpec(timestep_groups=2), torch.arange(0, 40, 5))[-1] == 30


def test_a_group_covers_what_was_seen_of_it_when_a_timestep_of_it_was_not():
    calls = [(torch.full((1, 2), 10.0 if t < 5 else 1.0), [t]) for t in range(10) if t != 4]
    spec = ActivationSpec(timestep_groups=2)
    found = input_ranges(observed(calls, -1), spec, torch.arange(10), torch.ones(2))
    assert found.high.tolist() == [10] * 5 + [1] * 5 and found.interpolated == 1


def test_groups_are_neighbours_of_about_equal_size():
    groups = timestep_groups(10, 4)
    assert (np.diff(groups) >= 0).all() and set(groups) == {0, 1, 2, 3}
    assert min(np.bincount(groups)) >= 2
    assert timestep_groups(3, 3) is None and timestep_groups(3, None) is None
