"""Times and bytes of calls on a device."""

from __future__ import annotations

import contextlib
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo.utils

LAUNCHES = 24  # in one graph, about
REPEATS = 11  # of a graph


def synchronize(device: str) -> None:
    """Wait for all that was asked of the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """How long the device, idle before, takes for one call."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def allocated(device: str) -> int:
    """Bytes of live tensors on the device, once what nobody holds is gone."""
    gc.collect()
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated())


def micros(calls: Sequence[Callable[[], Any]], device: str) -> float:
    """Microseconds of a call, the calls taken in turn: the median over repeats."""
    if device != "cuda":
        times = []
        for call in calls:
            start = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - start))
        return statistics.median(times)
    rounds = -(-LAUNCHES // len(calls))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile, and let libraries choose, before the capture
        for call in calls[:2]:
            call()
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for i in range(REPEATS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(1000 * begin.elapsed_time(end) / (rounds * len(calls)))
    return statistics.median(times)


def graph_count() -> int:
    """Graphs that Dynamo has made so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def is_usable(device: str) -> bool:
    """Whether the device still answers: after some errors, it does no more in this process."""
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Neither gradients nor TF32 inside; after it as before."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        with torch.no_grad():
            yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
