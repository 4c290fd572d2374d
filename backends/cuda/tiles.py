"""List tile sizes to try for the CUDA convolution kernel, by estimated cost."""

from __future__ import annotations

import math

from tfmq_fx.backends.codes.problem import Problem, Tile

SHARED = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227}  # KiB of shared memory of a program
_LEAST_SHARED = 99
_SHAPES = [  # m, n, k, warps, stages; with few warps several programs share a multiprocessor
    (128, 256, 128, 8, 3),
    (256, 128, 128, 8, 3),
    (128, 128, 128, 8, 3),
    (128, 128, 128, 4, 3),
    (128, 128, 64, 8, 4),
    (128, 64, 128, 4, 3),
    (64, 128, 128, 4, 3),
    (64, 64, 128, 4, 4),
    (64, 64, 64, 4, 5),
    (32, 64, 128, 4, 4),
    (16, 64, 128, 4, 4),
    (16, 32, 64, 2, 4),
]
_LAUNCH = 2e5  # multiply-adds that a program's start and end cost as much time as


def candidates(
    problem: Problem, capability: tuple[int, int] = (9, 0), processors: int = 132
) -> list[Tile]:
    """Tiles worth trying for a problem, the most promising by `cost` first."""
    budget = SHARED.get(capability, _LEAST_SHARED) * 1024
    tiles = set()
    for m, n, k, warps, stages in _SHAPES:
        tile = Tile(m, n, 2 * problem.half or k, 8, 1, warps, stages)
        if not _fits(problem, tile):
            continue
        while (tile.m + tile.n) * tile.k * tile.stages > budget and tile.stages > 2:
            tile = tile._replace(stages=tile.stages - 1)
        if (tile.m + tile.n) * tile.k * tile.stages > budget:
            continue
        programs = _programs(problem, tile)
        steps = math.prod(problem.taps) * -(-problem.channels // tile.k)
        tiles |= {
            tile._replace(split=split)
            for split in (1, 2, 4, 8)
            if split == 1 or (programs * split <= 2 * processors and steps >= 4 * split)
        }
    return sorted(tiles, key=lambda tile: (cost(problem, tile, processors), tile))


def cost(problem: Problem, tile: Tile, processors: int = 132) -> float:
    """The estimated cost of a tile: multiply-adds of the busiest multiprocessor, weighted up for
    narrow tiles, which load more for each."""
    steps = math.prod(problem.taps) * -(-problem.channels // tile.k)
    each = tile.m * tile.n * tile.k * -(-steps // tile.split)
    slowness = 1 + 64 * (tile.m + tile.n) / (tile.m * tile.n)
    programs = _programs(problem, tile) * tile.split
    partial = 2 * problem.rows * problem.out_channels * tile.split if tile.split > 1 else 0
    return -(-programs // processors) * (each * slowness + _LAUNCH) + 64 * partial / processors


def default_tile(problem: Problem, capability: tuple[int, int] = (9, 0)) -> Tile:
    """The tile to use without a trial."""
    return candidates(problem, capability)[0]


def _programs(problem: Problem, tile: Tile) -> int:
    return -(-problem.rows // tile.m) * -(-problem.out_channels // tile.n)


def _fits(problem: Problem, tile: Tile) -> bool:
    """Whether no side of a tile is more than twice the problem's; the smallest tiles always fit."""
    if tile.m <= 16:
        return tile.n <= max(32, 2 * problem.out_channels)
    return (
        tile.m < 2 * problem.rows
        and tile.n < 2 * max(32, problem.out_channels)
        and (problem.half > 0 or tile.k < 2 * max(33, problem.channels))
    )
