"""Tiles: which cuts of a problem are worth trying."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.backends.codes.test_problem import problem
from tfmq_fx.backends.cuda.tiles import SHARED, candidates, cost, default_tile

problems = st.builds(
    problem,
    batch=st.integers(1, 16),
    height=st.integers(5, 130),
    width=st.integers(5, 130),
    channels=st.integers(1, 2560),
    out_channels=st.integers(1, 2560),
    taps=st.sampled_from([(1, 1), (3, 3)]),
    half=st.sampled_from([0, 32, 64]),
)


@given(problems, st.sampled_from([*SHARED, (12, 0)]))
def test_every_problem_has_tiles_that_the_device_can_hold(p, capability):
    found = candidates(p, capability)
    assert found and len(set(found)) == len(found)
    assert default_tile(p, capability) == found[0]
    room = SHARED.get(capability, 99) * 1024
    for tile in found:
        assert (tile.m + tile.n) * tile.k * tile.stages <= room and tile.stages >= 2
        assert tile.m >= 16 and tile.n >= 16 and tile.k >= 32  # what tensor cores multiply at least
        assert not p.half or tile.k == 2 * p.half
        for side in (tile.m, tile.n, tile.k):
            assert side & (side - 1) == 0  # Triton's sizes are powers of two
    assert [cost(p, tile) for tile in found] == sorted(cost(p, tile) for tile in found)


def test_large_problems_get_large_tiles_and_small_ones_fill_the_device():
    large = default_tile(problem(batch=8, height=130, width=130))
    assert large.m * large.n >= 128 * 128 and large.split == 1
    small = problem(batch=1, height=10, width=10, channels=1280, out_channels=1280)
    tile = default_tile(small)
    programs = math.ceil(small.rows / tile.m) * math.ceil(1280 / tile.n) * tile.split
    assert tile.split > 1 and programs >= 66  # half of the multiprocessors at least


@pytest.mark.parametrize("capability", [(8, 6), (8, 9)])
def test_less_shared_memory_means_fewer_steps_in_flight(capability):
    wide = [t for t in candidates(problem(), (9, 0)) if (t.m, t.n, t.k) == (128, 256, 128)]
    narrow = [t for t in candidates(problem(), capability) if (t.m, t.n, t.k) == (128, 256, 128)]
    assert wide[0].stages > narrow[0].stages
