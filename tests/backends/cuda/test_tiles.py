"""Tiles: what a problem amounts to, and which cuts of it are worth trying."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfmq_fx.backends.cuda.tiles import SHARED, Problem, Tile, candidates, cost, default_tile


def problem(**changes):
    base = Problem(2, 34, 34, 640, 320, (3, 3), (1, 1), (1, 1), "int8", 0)
    return dataclasses.replace(base, **changes)


def test_a_problem_knows_its_size():
    p = problem()
    assert p.out_size == (32, 32) and p.rows == 2048 and p.depth == 5760
    assert p.operations == 2 * 2048 * 320 * 5760
    assert p.bytes == 2 * 34 * 34 * 640 + 320 * 5760 + 2 * 2048 * 320
    packed = problem(format="int4", half=64)
    assert p.bytes - packed.bytes == 320 * 5760 // 2
    assert problem(stride=(2, 2)).out_size == (16, 16)
    assert problem(dilation=(2, 1)).out_size == (30, 32)
    assert problem(taps=(1, 1)).out_size == (34, 34)


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


def test_a_tile_is_a_plain_tuple():
    assert list(Tile()) == [128, 128, 64, 8, 1, 8, 4] and Tile(*list(Tile())) == Tile()
