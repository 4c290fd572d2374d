"""observers: ranges belong to values of t, and the sample that is kept is bounded and even."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tfmq_fx.calibration.observers import RangeObserver, SampleCache
from tfmq_fx.core.errors import CalibrationError


@settings(deadline=None, max_examples=40)
@given(
    steps=st.lists(st.sampled_from((0, 3, 7, 999)), min_size=1, max_size=12),
    split=st.integers(0, 12),
    fold=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_ranges_go_by_the_value_of_t_in_whatever_order_it_comes(steps, split, fold, seed):
    t = torch.tensor(steps)
    x = torch.randn(len(steps), fold, 5, generator=torch.Generator().manual_seed(seed))
    observer = RangeObserver("layer")
    for part in (slice(0, split), slice(split, None)):
        if len(t[part]):  # rows of one sample stand together, as layers that fold tokens see them
            rows = x[part].flatten(0, 1)
            assert observer(rows, t[part]) is rows
    keys = t.unique()
    found = observer.ranges(keys)
    for i, key in enumerate(keys.tolist()):
        assert float(found.low[i]) == float(x[t == key].amin())
        assert float(found.high[i]) == float(x[t == key].amax())
    assert found.interpolated == 0


@settings(deadline=None, max_examples=40)
@given(
    ends=st.dictionaries(st.integers(0, 999), st.floats(0, 9, width=32), min_size=1, max_size=6),
    wanted=st.lists(st.integers(0, 999), min_size=1, max_size=6, unique=True),
)
def test_steps_not_visited_are_interpolated_in_t(ends, wanted):
    observer = RangeObserver("layer")
    for step, end in ends.items():
        observer(torch.tensor([[-end, 2 * end]]), torch.tensor([step]))
    found = observer.ranges(torch.tensor(wanted))
    known = sorted(ends)
    expected = np.interp(wanted, known, [ends[s] for s in known])
    # one rounding to float32 of a float64 interpolation
    assert np.allclose(-found.low.numpy(), expected, rtol=2**-23, atol=0)
    assert np.allclose(found.high.numpy(), 2 * expected, rtol=2**-23, atol=0)
    assert found.interpolated == len(set(wanted) - set(known))


def test_interpolation_is_linear_inside_and_constant_outside():
    observer = RangeObserver("layer")
    observer(torch.tensor([[-1.0, 2.0], [-3.0, 6.0]]), torch.tensor([10.0, 20.0]))
    found = observer.ranges(torch.tensor([0.0, 15.0, 20.0, 99.0]))
    assert found.low.tolist() == [-1.0, -2.0, -3.0, -3.0]
    assert found.high.tolist() == [2.0, 4.0, 6.0, 6.0]
    assert found.interpolated == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_name_the_layer_and_the_timestep(value):
    x = torch.zeros(2, 3)
    x[1, 2] = value
    with pytest.raises(
        CalibrationError, match=r"input of down\.conv holds NaN or Inf at timestep 7"
    ):
        RangeObserver("down.conv")(x, torch.tensor([3, 7]))


@pytest.mark.parametrize("shape", [(1, 4), (5, 3), (2, 7, 1)])
def test_an_input_without_the_batch_counts_for_every_timestep(shape):
    x = torch.randn(shape)
    observer = RangeObserver("layer")
    assert observer(x, torch.tensor([1, 2, 3])) is x
    found = observer.ranges(torch.tensor([1, 2, 3]))
    assert found.low.tolist() == [float(x.min())] * 3
    assert found.high.tolist() == [float(x.max())] * 3


# ---------------------------------------------------------------- samples


def fill(cache, steps, batch=4, width=8, start=0):
    """One call for each step; every sample is marked by its own number."""
    for i, step in enumerate(steps):
        x = torch.arange(start + i * batch, start + (i + 1) * batch)[:, None].expand(batch, width)
        cache.add([x.float(), torch.full((batch,), step)], [True, True], 1)


def kept_bytes(cache):
    chunks = cache.chunks(10**6, batched=[True, True], batch_size=1, seed=0)
    return sum(v.nbytes for chunk in chunks for v in chunk)


@settings(deadline=None, max_examples=40)
@given(
    capacity=st.integers(40, 4000),
    steps=st.lists(st.integers(0, 20), min_size=1, max_size=60),
)
def test_no_more_is_kept_than_the_capacity(capacity, steps):
    cache = SampleCache(capacity=capacity, seed=0)
    fill(cache, steps)
    row = 8 * 4 + 8  # a float32 sample of 8 values and an int64 timestep
    assert 0 < len(cache) <= capacity // row
    assert kept_bytes(cache) == len(cache) * row <= capacity
    assert cache.visits == {s: 4 * steps.count(s) for s in set(steps)}


def test_samples_are_spread_evenly_over_timesteps():
    cache = SampleCache(capacity=40 * 30, seed=0)
    fill(cache, [0] * 20 + [5, 9] * 10)
    chunks = cache.chunks(100, batched=[True, True], batch_size=7, seed=0)
    t = torch.cat([chunk[1] for chunk in chunks])
    assert {s: int((t == s).sum()) for s in (0, 5, 9)} == {0: 10, 5: 10, 9: 10}
    assert [len(chunk[1]) for chunk in chunks] == [7, 7, 7, 7, 2]
    few = cache.chunks(6, batched=[True, True], batch_size=7, seed=0)
    assert sorted(few[0][1].tolist()) == [0, 0, 5, 5, 9, 9]


def test_late_samples_of_a_timestep_are_as_likely_as_early_ones():
    counts = torch.zeros(40)
    for seed in range(300):
        cache = SampleCache(capacity=40 * 8, seed=seed)
        fill(cache, [3] * 10)
        (chunk,) = cache.chunks(8, batched=[True, True], batch_size=8, seed=0)
        counts[chunk[0][:, 0].long()] += 1
    # 300 draws with p = 8 / 40 for each: mean 60, deviation 6.9; five deviations
    assert float(counts.min()) > 60 - 35 and float(counts.max()) < 60 + 35


@pytest.mark.parametrize(("steps", "room"), [(4, 8), (6, 13), (7, 4)])
def test_every_sample_is_as_likely_as_any_other_however_often_room_is_cut(steps, room):
    """Each timestep that comes, and each larger sample, leaves less room for those before it; the
    first half of each call stands for the unconditional one of guidance."""
    draws, batch, counts = 600, 8, np.zeros((steps, 16))
    for seed in range(draws):
        cache = SampleCache(capacity=40 * room, seed=seed)
        for step in range(steps):
            fill(cache, [step] * 2, batch=batch)
        for step, rows in cache.rows.items():
            for row in rows:
                counts[step, int(row[0][0, 0])] += 1
    share = max(1, room // steps) * min(1, room / steps) / 16  # of 16 samples of each timestep
    # 5.5 deviations of a binomial count: one of 16 x 7 fails by chance once in 200,000 times
    assert np.abs(counts - draws * share).max() < 5.5 * np.sqrt(draws * share * (1 - share))
    halves = counts.reshape(steps, 2, 2, batch // 2).sum((0, 1, 3))
    total = halves.sum()
    assert abs(halves[0] - total / 2) < 5 * np.sqrt(total / 4)


def test_larger_samples_keep_to_the_capacity_and_are_as_likely_as_small_ones():
    counts = torch.zeros(24)
    for seed in range(400):
        cache = SampleCache(capacity=1200, seed=seed)
        for start, width in ((0, 8), (8, 68), (16, 8)):
            fill(cache, [3], batch=8, width=width, start=start)
            assert sum(v.nbytes for rows in cache.rows.values() for r in rows for v in r) <= 1200
        for row in cache.rows[3]:
            counts[int(row[0][0, 0])] += 1
    # 4 of 24 each time, as 4 of the largest, of 280 bytes, fit; five deviations
    assert float((counts - 400 / 6).abs().max()) < 5 * (400 * 1 / 6 * 5 / 6) ** 0.5


def test_a_seed_decides_what_is_kept():
    def kept(seed):
        cache = SampleCache(capacity=40 * 8, seed=seed)
        fill(cache, [3, 4] * 10)
        return [
            c[0][:, 0].tolist() for c in cache.chunks(9, batched=[1, 1], batch_size=9, seed=seed)
        ]

    assert kept(0) == kept(0) != kept(1)


def test_samples_are_copies_and_stay_together():
    cache = SampleCache(capacity=10**6, seed=0)
    x, t, fixed = torch.randn(3, 4), torch.tensor([1, 2, 3]), torch.ones(2, 2)
    original = x.clone()
    cache.add([x, t, fixed], [True, True, False], 1)
    x.zero_()
    (chunk,) = cache.chunks(3, batched=[True, True, False], batch_size=3, seed=0)
    assert torch.equal(chunk[0], original[chunk[1] - 1]) and torch.equal(chunk[2], fixed)


# ---------------------------------------------------------------- which timesteps count how much


@pytest.mark.parametrize("center", [0.0, 0.4, 1.0])
def test_timesteps_follow_a_normal_distribution(center):
    cache = SampleCache(capacity=10**7, seed=0)
    steps = [10 * i for i in range(20)]
    fill(cache, steps, batch=400, width=1)
    chunks = cache.chunks(2000, batched=[True, True], batch_size=64, seed=0, center=center)
    drawn = torch.cat([t for _, t in chunks])
    assert len(drawn) == 2000
    counts = np.array([int((drawn == step).sum()) for step in steps])
    places = (np.arange(20) + 0.5) / 20
    density = np.exp(-0.5 * ((places - center) / 0.5) ** 2)
    expected = 2000 * density / density.sum()
    # five deviations of a binomial count
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    samples = torch.cat([x[:, 0] for x, _ in chunks])
    assert len(samples.unique()) == 2000  # each but once


def test_normal_draws_depend_on_the_seed_and_take_what_there_is():
    cache = SampleCache(capacity=10**7, seed=0)
    fill(cache, range(4), batch=5, width=1)

    def drawn(seed, count=12):
        chunks = cache.chunks(count, batched=[1, 1], batch_size=99, seed=seed, center=0.5)
        return chunks[0][1].tolist()

    assert drawn(0) == drawn(0) != drawn(1)
    assert sorted(drawn(0, count=1000)) == sorted([0, 1, 2, 3] * 5)


def weights_of(cache, count=10**6):
    chunks = cache.chunks(count, batched=[True, True], batch_size=3, seed=0)
    steps = [t for _, t in chunks]
    return torch.cat(steps), cache.weights(steps)


def test_equal_visits_need_no_weights():
    cache = SampleCache(capacity=10**7, seed=0)
    fill(cache, [3, 4, 5] * 2)
    assert weights_of(cache)[1] is None
    assert weights_of(cache, count=4)[1] is None  # though one timestep has two samples


def test_weights_make_timesteps_count_as_often_as_they_were_visited():
    cache = SampleCache(capacity=40 * 12, seed=0)  # of samples of 40 bytes, 12
    fill(cache, [7] * 9 + [8] + [9] * 2)
    steps, weights = weights_of(cache)
    assert [len(w) for w in weights] == [3, 3, 3, 3]
    total = torch.cat(weights)
    assert float(total.mean()) == pytest.approx(1)
    share = [float(total[steps == step].sum() / total.sum()) for step in (7, 8, 9)]
    assert share == pytest.approx([9 / 12, 1 / 12, 2 / 12])
    assert int((steps == 7).sum()) == int((steps == 8).sum()) == 4


def test_samples_in_proportion_to_visits_weigh_the_same():
    cache = SampleCache(capacity=10**7, seed=0)
    fill(cache, [7] * 9 + [8])
    _, weights = weights_of(cache)
    assert torch.equal(torch.cat(weights), torch.ones(40))


@pytest.mark.parametrize("center", [None, 0.4])
@pytest.mark.parametrize("count", [1, 5, 12, 100])
def test_the_samples_that_are_needed_give_the_same_chunks(center, count):
    cache = SampleCache(capacity=1 << 20, seed=0)
    fill(cache, [0, 0, 0, 7, 7, 30])
    options = {"batched": [True, True], "batch_size": 4, "seed": 3, "center": center}
    kept = SampleCache.holding(cache.needed(count, seed=3, center=center), cache.visits)
    assert len(kept) <= len(cache) and kept.rows.keys() == cache.rows.keys()
    for found, expected in zip(
        kept.chunks(count, **options), cache.chunks(count, **options), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    steps = [torch.tensor([0, 7, 30])]
    assert torch.equal(kept.weights(steps)[0], cache.weights(steps)[0])


def test_no_more_samples_are_needed_than_are_drawn():
    cache = SampleCache(capacity=1 << 20, seed=0)
    fill(cache, [0, 0, 0, 7, 7, 7])
    assert {step: len(rows) for step, rows in cache.needed(6, seed=0).items()} == {0: 3, 7: 3}
