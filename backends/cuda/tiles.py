"""How the work of one convolution is cut into the programs of a kernel."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """rows x columns of the result by depth of the sum that one program handles at a time.

    m: output pixels.  n: output channels.  k: input channels of one step.  group: rows of tiles
    that run side by side and share weights in the cache.  split: programs that share one sum.
    warps, stages: of the program; steps in flight.
    """

    m: int
    n: int
    k: int
    group: int = 8
    split: int = 1
    warps: int = 8
    stages: int = 3
