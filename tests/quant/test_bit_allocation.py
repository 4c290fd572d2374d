"""allocation: the best choice by brute force, under every kind of limit."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tfmq_fx.quant.bit_allocation import allocate


@st.composite
def problems(draw):
    """A few sites of a few options at three steps, one of which was perhaps not seen."""
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    unit = draw(st.sampled_from((1, 1000, 10**7)))
    noise = [10 ** random.uniform(-6, -1, (n, 3)) for n in counts]
    sizes = [random.integers(1, 100, n) * float(unit) for n in counts]
    times = [random.uniform(1, 50, n) for n in counts]
    rest = 10 ** random.uniform(-7, -3, 3)
    if draw(st.booleans()):
        rest[1] = np.nan
        for site in noise:
            site[:, 1] = np.nan
    most = sum(s.max() for s in sizes)
    limits = (draw(st.floats(0.2, 1.2)) * most, draw(st.sampled_from((np.inf, 60.0))))
    return noise, [sizes, times], limits, rest


def quality(choice, noise, rest):
    """The mean over steps that were seen of the logarithm of all noise."""
    total = rest + sum(site[i] for site, i in zip(noise, choice, strict=True))
    return float(np.nanmean(np.log(total)))


@settings(deadline=None, max_examples=60)
@given(problem=problems())
def test_the_choice_keeps_limits_and_no_single_change_within_them_is_better(problem):
    noise, costs, limits, rest = problem

    def fits(choice):
        spent = [sum(p[i] for p, i in zip(kind, choice, strict=True)) for kind in costs]
        # as far as the solver's own tolerance goes
        return all(s <= limit * (1 + 1e-6) for s, limit in zip(spent, limits, strict=True))

    choices = list(itertools.product(*(range(len(site)) for site in noise)))
    found = allocate(noise, costs, limits=limits, rest=rest)
    if found is None:
        spent = [[sum(p[i] for p, i in zip(k, c, strict=True)) for k in costs] for c in choices]
        assert not any(all(s <= m for s, m in zip(each, limits, strict=True)) for each in spent)
        return
    assert fits(found)
    # each round is exact for its weights: a step that lowers them all is never left out
    before = rest + sum(site[i] for site, i in zip(noise, found, strict=True))
    seen = np.isfinite(rest)
    for choice in filter(fits, choices):
        after = rest + sum(site[i] for site, i in zip(noise, choice, strict=True))
        assert not (after[seen] < before[seen] * (1 - 1e-3)).all()


def test_steps_count_by_the_logarithm_of_their_noise():
    # a step with little noise is worth as much as a loud one: to halve is to halve
    noise = [np.array([[1e-2, 1e-6], [1e-2, 1e-8]]), np.array([[1e-2, 1e-9], [6e-3, 1e-9]])]
    costs = [[np.array([1.0, 2.0]), np.array([1.0, 2.0])]]
    rest = np.zeros(2)
    assert allocate(noise, costs, limits=[3.0], rest=rest) == [1, 0]
    assert allocate(noise, costs, limits=[4.0], rest=rest) == [1, 1]
    assert allocate(noise, costs, limits=[2.0], rest=rest) == [0, 0]
    assert allocate(noise, costs, limits=[1.9], rest=rest) is None


def test_of_equals_the_cheaper_is_taken():
    noise = [np.array([[1e-3], [1e-3], [1e-3]])]
    costs = [[np.array([30.0, 10.0, 20.0])]]
    assert allocate(noise, costs, limits=[np.inf], rest=np.zeros(1)) == [1]
