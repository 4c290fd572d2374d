"""Times, kernels and memory of calls on the CPU."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def interleaved(
    calls: dict[str, Callable[[], Any]], *, repeats: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Milliseconds of each call, taken in turn so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + warmup):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i >= warmup:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def kernels(run: Callable[[], Any]) -> dict[str, int]:
    """Calls of int8 kernels, oneDNN's or ours, that one run makes, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    wanted = ("qconv", "qlinear", "int_mm", "cpu_conv")
    return {e.key: e.count for e in profile.key_averages() if any(w in e.key for w in wanted)}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(found.split()[1])


def resident() -> int:
    """Bytes of this process in memory now."""
    return _status("VmRSS")


def memory_peak() -> int:
    """The most bytes of this process in memory since it began, or since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Give back what is free, and count the peak from here on (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
