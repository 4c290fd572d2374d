"""Measure how long a call takes on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def least_micros(call: Callable[[], Any], *, calls: int, warmups: int = 0) -> float:
    """Microseconds of the fastest of several calls; the others were slowed down by something else.

    warmups: calls before those that are timed, which may compile.
    """
    for _ in range(warmups):
        call()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return min(times)
