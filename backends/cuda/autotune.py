"""Choose the kernel that runs a layer on CUDA by timing it, once for each shape.

Choices are kept in a file for each kind of device and version of the software, so that the next
start decides at once: $TFMQ_FX_CACHE, or tfmq_fx in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfmq_fx.backends.codes import problem as problems
from tfmq_fx.backends.codes.choice import Choice, Chooser, Timer, cached_chooser, runs_on_torch
from tfmq_fx.backends.codes.problem import Problem
from tfmq_fx.core.files import cache_folder
from tfmq_fx.quant.affine import FP8

from .conv import conv2d
from .tiles import candidates, default_tile

logger = logging.getLogger(__name__)

TRIED = 6  # tiles that are timed for a problem


def untimed_choice(problem: Problem, dtype: torch.dtype) -> Choice:
    """Choose the Triton kernel with the most promising tile without timing anything."""
    return Choice("triton", default_tile(problem))


def timed_chooser(
    device: torch.device,
    *,
    timer: Timer | None = None,
    cache: Path | None = None,
) -> Chooser:
    """A chooser that times each problem on `device`: Triton, torch's product and the float layer.

    What makes the codes is not timed: it is fused into what computes the input.
    timer: how calls are timed; None replays them as a CUDA graph, which leaves launching out.
    cache: file of earlier results; None is the one of this device.
    """
    timer = timer or _median_micros

    def decide(problem: Problem, dtype: torch.dtype) -> Choice:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return _try(problem, device, dtype, timer)

    # where no tile has run, it may have been short of memory
    path = cache or cache_file(device)
    return cached_chooser(decide, path, keeps=lambda choice: "triton" in choice.micros)


def cache_file(device: torch.device) -> Path:
    """The file of choices for the kind of `device`, with these versions and kernels."""
    import triton

    name = torch.cuda.get_device_name(device)
    words = (name, torch.__version__, triton.__version__, *(p.read_text() for p in sources()))
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
    return cache_folder() / f"kernels-{digest}.json"


def sources() -> list[Path]:
    """The source files on which measurements depend: a change in one discards earlier choices."""
    here = Path(__file__).parent
    return [*sorted((here / "kernels").glob("*.py")), here / "tiles.py", Path(problems.__file__)]


def arguments(problem: Problem, device: torch.device) -> dict[str, Any]:
    """Random codes, weights and scales for `conv2d`, all but the result's dtype and tile."""
    p = problem
    is_float = p.format == "fp8"

    def codes(*shape: int) -> Tensor:
        if is_float:
            return torch.randn(shape, dtype=torch.float32, device=device).to(FP8)
        return torch.randint(-128, 128, shape, device=device, dtype=torch.int8)

    weight = codes(p.out_channels, *p.taps, p.channels)
    if p.half:
        width = -(-p.channels // (2 * p.half)) * p.half
        shape = (p.out_channels, *p.taps, width)
        weight = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
    return {
        "xs": [codes(p.batch, p.height, p.width, p.channels)],
        "weights": [weight],
        "zeros": [torch.full((p.out_channels,), 8, dtype=torch.uint8, device=device)],
        "weight_scales": [torch.rand(p.out_channels, dtype=torch.float32, device=device)],
        "offsets": [torch.zeros(p.out_channels, dtype=torch.int32, device=device)],
        "scales": [torch.rand(p.batch, dtype=torch.float32, device=device)],
        "bias": torch.randn(p.out_channels, dtype=torch.float32, device=device),
        "row": None,
        "residual": None,
        "out_scale": None,
        "out_zero": 0,
        "out_levels": 0,
        "stride": p.stride,
        "dilation": p.dilation,
        "halves": [p.half],
    }


def _try(problem: Problem, device: torch.device, dtype: torch.dtype, timer: Timer) -> Choice:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    operands = arguments(problem, device)
    with best_convolutions():
        micros = {"float": timer(float_call(problem, device, dtype))}
    best = default_tile(problem, capability)
    for tile in candidates(problem, capability)[:TRIED]:
        try:
            taken = timer(lambda tile=tile: conv2d(**operands, dtype=dtype, tile=tile))  # type: ignore[misc]
        except Exception as error:  # out of resources, or a tile that this Triton cannot compile
            logger.info("%s cannot run %s: %s", tile, problem, error)
            continue
        if taken < micros.get("triton", float("inf")):
            micros["triton"], best = taken, tile
    if (call := _torch_call(problem, operands, dtype)) is not None:
        micros["torch"] = timer(call)
    engine: Any = min(micros, key=lambda name: micros[name])
    return Choice(engine, best, micros)


def float_call(problem: Problem, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A function that runs the layer in floating point: cuDNN's convolution or a matrix product."""
    p = problem
    x = torch.randn((p.batch, p.height, p.width, p.channels), device=device, dtype=dtype)
    w = torch.randn((p.out_channels, *p.taps, p.channels), device=device, dtype=dtype)
    bias = torch.randn(p.out_channels, device=device, dtype=dtype)
    if p.taps == (1, 1) and p.stride == (1, 1):
        rows, matrix = x.reshape(-1, p.channels), w.reshape(p.out_channels, p.channels)
        return lambda: F.linear(rows, matrix, bias)
    images, filters = x.permute(0, 3, 1, 2), w.permute(0, 3, 1, 2)
    stride, dilation = list(p.stride), list(p.dilation)
    return lambda: F.conv2d(images, filters, bias, stride, 0, dilation)


@contextmanager
def best_convolutions() -> Iterator[None]:
    """A context in which cuDNN tries its algorithms; its other settings stay as they are."""
    cudnn = torch.backends.cudnn
    others = {"deterministic": cudnn.deterministic, "allow_tf32": cudnn.allow_tf32}
    with cudnn.flags(enabled=cudnn.enabled, benchmark=True, **others):
        yield


def _torch_call(
    problem: Problem, operands: dict[str, Any], dtype: torch.dtype
) -> Callable[[], Tensor] | None:
    """A function that runs torch's own product of the codes and one pass over its result, as the
    epilogue will be."""
    if problem.taps != (1, 1) or problem.stride != (1, 1) or not runs_on_torch(problem):
        return None
    codes = operands["xs"][0].reshape(-1, problem.channels)
    weight = operands["weights"][0].reshape(problem.out_channels, problem.channels).t()
    if problem.format == "int8":
        return lambda: torch._int_mm(codes, weight).to(dtype)
    one = torch.ones((), dtype=torch.float32, device=codes.device)
    return lambda: torch._scaled_mm(codes, weight, one, one, out_dtype=torch.bfloat16).to(dtype)


def _median_micros(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench_cudagraph

    return 1000.0 * float(do_bench_cudagraph(call, rep=5, return_mode="median"))
