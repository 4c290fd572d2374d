"""Operations and bytes of a convolution or matrix product, for rooflines."""

import math

from tfmq_fx.backends.codes.problem import Problem


def depth(problem: Problem) -> int:
    """The number of products that each output element sums."""
    return math.prod(problem.taps) * problem.channels


def operations(problem: Problem) -> int:
    """Multiplications and additions."""
    return 2 * problem.rows * problem.out_channels * depth(problem)


def moved_bytes(problem: Problem) -> int:
    """Bytes that must move: codes and weights read once, a 16-bit result written once."""
    read = problem.batch * problem.height * problem.width * problem.channels
    weights = problem.out_channels * depth(problem)
    written = 2 * problem.rows * problem.out_channels
    return read + (weights // 2 if problem.half else weights) + written
