"""The sizes of one convolution or matrix product on codes, and how a kernel tiles it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

Format = Literal["int8", "fp8", "int4"]  # of the weights; inputs of int4 weights are int8


class Tile(NamedTuple):
    """The part of the work that one program of a kernel handles at a time.

    m: output pixels.  n: output channels.  k: input channels of one step of the sum.  group: rows
    of tiles that run side by side and share weights in the cache.  split: programs that share one
    sum.  warps: of the program.  stages: steps in flight.
    """

    m: int = 128
    n: int = 128
    k: int = 64
    group: int = 8
    split: int = 1
    warps: int = 8
    stages: int = 4


@dataclass(frozen=True, slots=True)
class Problem:
    """The sizes of one convolution, height and width with borders; a linear layer has taps (1, 1).

    half: of packed 4-bit weights, else 0.
    """

    batch: int
    height: int
    width: int
    channels: int
    out_channels: int
    taps: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    format: Format
    half: int

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the result."""
        sizes = zip((self.height, self.width), self.taps, self.stride, self.dilation, strict=True)
        high, wide = ((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in sizes)
        return high, wide

    @property
    def rows(self) -> int:
        """Pixels of the result, all samples together."""
        return self.batch * math.prod(self.out_size)
