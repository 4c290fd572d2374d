"""Choose the kernel that runs a layer on the CPU by timing it, once for each shape.

Choices are kept for the next start in `cache_folder()`, by processor, threads, versions, kernels.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfmq_fx.backends.codes.choice import Choice, Chooser, Timer, cached_chooser
from tfmq_fx.backends.codes.problem import Problem, Tile
from tfmq_fx.backends.cpu.kernels import fast_dtype
from tfmq_fx.backends.timing import least_micros
from tfmq_fx.core.files import cache_folder

from . import kernels, library

CALLS = 9  # that are timed of each kernel
MARGIN = 0.9  # of our kernel's time that another must stay below: ours takes sums and codes along


def timed_chooser(*, timer: Timer | None = None, cache: Path | None = None) -> Chooser:
    """A chooser that times our kernel, oneDNN's and floating point for each problem.

    What makes the codes is not timed: it is fused into what computes the input.
    timer: how calls are timed; None is the least of some.  cache: file of earlier results; None is
    the one of this machine.
    """
    timer = timer or functools.partial(least_micros, calls=CALLS)
    return cached_chooser(lambda problem, dtype: _try(problem, timer), cache or cache_file())


def untimed_choice(problem: Problem, dtype: torch.dtype) -> Choice:
    """Choose the kernel of this package without timing anything."""
    return Choice("cpu", Tile())


def cache_file() -> Path:
    """The file of choices for this machine, with these versions, kernels and threads."""
    threads = str(torch.get_num_threads())
    words = (kernels.processor(), torch.__version__, library.sources(), threads)
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
    return cache_folder() / f"cpu-{digest}.json"


def _try(problem: Problem, timer: Timer) -> Choice:
    with torch.no_grad():
        micros = {name: timer(call) for name, call in calls(problem).items()}
    least = {name: t * (MARGIN if name == "cpu" else 1.0) for name, t in micros.items()}
    engine: Any = min(least, key=lambda name: least[name])
    return Choice(engine, Tile(), micros)


def calls(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """A function for each engine that can run a problem, which runs it on random values."""
    p = problem
    x = torch.randint(0, 256, (p.batch, p.height, p.width, p.channels), dtype=torch.uint8)
    most = 7 if p.half else 127
    filters = torch.randint(-most, most + 1, (p.out_channels, *p.taps, p.channels)).to(torch.int8)
    scale, one = torch.rand(p.out_channels, dtype=torch.float32), torch.ones(1, dtype=torch.float32)
    stride, dilation = list(p.stride), list(p.dilation)
    images, weights = x.permute(0, 3, 1, 2), filters.permute(0, 3, 1, 2).contiguous()
    dtype = fast_dtype()
    floats, float_weights = images.to(dtype), weights.to(dtype)
    engines: dict[str, Callable[[], Tensor]] = {
        "float": lambda: F.conv2d(floats, float_weights, None, stride, 0, dilation)
    }
    zeros = torch.zeros(p.out_channels, dtype=torch.int64)
    ops = torch.ops.onednn
    if p.taps == (1, 1) and p.stride == (1, 1):
        rows, matrix = x.view(-1, p.channels), weights.view(p.out_channels, -1)
        float_rows, float_matrix = rows.to(dtype), matrix.to(dtype)
        engines["float"] = lambda: F.linear(float_rows, float_matrix)
        packed = ops.qlinear_prepack(matrix, list(rows.shape))
        settings: Any = (packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        engines["onednn"] = lambda: ops.qlinear_pointwise(rows, 1.0, 0, *settings)
    else:
        geometry = (stride, [0, 0], dilation, 1)
        packed = ops.qconv_prepack(weights, scale, 1.0, 0, *geometry, list(images.shape))
        rest: Any = (*geometry, 1.0, 0, torch.float32, "none", [], "")
        engines["onednn"] = lambda: ops.qconv_pointwise(
            images, 1.0, 0, packed, scale, zeros, None, *rest
        )
    if kernels.unavailable() is None and p.channels % 4 == 0:
        kernels.load()
        panels, zero = kernels.panels(filters), torch.zeros(1, dtype=torch.uint8)
        offset = torch.zeros(p.out_channels, dtype=torch.int32)
        sums = ([x], [panels], [zero], [scale], [offset], [one], None, None, None, None, 0, 0)
        shape = (p.out_channels, list(p.taps), stride, dilation, torch.float32)
        engines["cpu"] = lambda: kernels.cpu_conv(*sums, *shape)
    return engines
