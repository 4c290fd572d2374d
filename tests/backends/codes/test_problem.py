"""A problem knows its sizes, and a tile is a plain tuple."""

import dataclasses

from tests.bench.problem_size import moved_bytes, operations
from tfmq_fx.backends.codes.problem import Problem, Tile


def problem(**changes):
    base = Problem(2, 34, 34, 640, 320, (3, 3), (1, 1), (1, 1), "int8", 0)
    return dataclasses.replace(base, **changes)


def test_a_problem_knows_its_size():
    p = problem()
    assert p.out_size == (32, 32) and p.rows == 2048
    assert operations(p) == 2 * 2048 * 320 * 5760
    assert moved_bytes(p) == 2 * 34 * 34 * 640 + 320 * 5760 + 2 * 2048 * 320
    packed = problem(format="int4", half=64)
    assert moved_bytes(p) - moved_bytes(packed) == 320 * 5760 // 2
    assert problem(stride=(2, 2)).out_size == (16, 16)
    assert problem(dilation=(2, 1)).out_size == (30, 32)
    assert problem(taps=(1, 1)).out_size == (34, 34)


def test_a_tile_is_a_plain_tuple():
    assert list(Tile()) == [128, 128, 64, 8, 1, 8, 4] and Tile(*list(Tile())) == Tile()
