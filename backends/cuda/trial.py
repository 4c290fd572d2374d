"""Which kernel runs a convolution or linear layer: decided by timing it, once for each shape.

Results are kept in a file for each kind of device and version of the software, so that the next
start decides at once: $TFMQ_FX_CACHE, or tfmq_fx in the user's cache directory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tfmq_fx.affine import FP8
from tfmq_fx.files import cache_folder, make_private, write_whole

from .conv import conv2d
from .tiles import Problem, Tile, candidates, default_tile

logger = logging.getLogger(__name__)

Engine = Literal["triton", "torch", "cpu", "onednn", "float"]
TRIED = 6  # tiles that are timed for a problem


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs a problem: a kernel of `cuda.kernels` with `tile`, torch's own matrix product, or
    floating point.

    micros: microseconds by what was tried, empty where nothing was timed.
    """

    engine: Engine
    tile: Tile
    micros: dict[str, float] = dataclasses.field(default_factory=dict)


Timer = Callable[[Callable[[], Any]], float]  # microseconds of a call
Chooser = Callable[[Problem, torch.dtype], Choice]  # for results of a dtype


def untried(problem: Problem, dtype: torch.dtype) -> Choice:
    """The kernel with the tile that should suit, where no device can try."""
    return Choice("triton", default_tile(problem))


def by_trial(
    device: torch.device,
    *,
    timer: Timer | None = None,
    cache: Path | None = None,
) -> Chooser:
    """Chooses by timing on `device` what a problem can run on, beside the float layer.

    What makes the codes is not timed: it is fused into what computes the input.
    timer: how calls are timed; None replays them as a CUDA graph, which leaves launching out.
    cache: file of earlier results; None is the one of this device.
    """
    timer = timer or _median_micros
    path = cache or cache_file(device)
    known = read_choices(path)

    def choose(problem: Problem, dtype: torch.dtype) -> Choice:
        key = json.dumps([dataclasses.asdict(problem), str(dtype)], sort_keys=True)
        if key not in known:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                known[key] = _try(problem, device, dtype, timer)
            if "triton" in known[key].micros:  # else it may have been short of memory
                write_choices(path, known)
        return known[key]

    return functools.cache(choose)


def cache_file(device: torch.device) -> Path:
    """Where results for the kind of `device`, with these versions and kernels, are kept."""
    import triton

    name = torch.cuda.get_device_name(device)
    sources = [Path(__file__).with_name(file).read_text() for file in ("kernels.py", "tiles.py")]
    words = (name, torch.__version__, triton.__version__, *sources)
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
    return cache_folder() / f"kernels-{digest}.json"


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
    given = arguments(problem, device)
    with best_convolutions():
        micros = {"float": timer(float_call(problem, device, dtype))}
    best = default_tile(problem, capability)
    for tile in candidates(problem, capability)[:TRIED]:
        try:
            taken = timer(lambda tile=tile: conv2d(**given, dtype=dtype, tile=tile))  # type: ignore[misc]
        except Exception as error:  # out of resources, or a tile that this Triton cannot compile
            logger.info("%s cannot run %s: %s", tile, problem, error)
            continue
        if taken < micros.get("triton", float("inf")):
            micros["triton"], best = taken, tile
    if (call := _torch_call(problem, given, dtype)) is not None:
        micros["torch"] = timer(call)
    engine: Any = min(micros, key=lambda name: micros[name])
    return Choice(engine, best, micros)


def float_call(problem: Problem, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The layer in floating point: cuDNN's convolution, channels last, or a matrix product."""
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
    """Inside, cuDNN tries its algorithms; its other settings stay as they are."""
    cudnn = torch.backends.cudnn
    kept = {"deterministic": cudnn.deterministic, "allow_tf32": cudnn.allow_tf32}
    with cudnn.flags(enabled=cudnn.enabled, benchmark=True, **kept):
        yield


def _torch_call(
    problem: Problem, given: dict[str, Any], dtype: torch.dtype
) -> Callable[[], Tensor] | None:
    """torch's own product of the codes, and a pass over its result as its epilogue will be."""
    if problem.taps != (1, 1) or problem.stride != (1, 1) or not runs_on_torch(problem):
        return None
    codes = given["xs"][0].reshape(-1, problem.channels)
    weight = given["weights"][0].reshape(problem.out_channels, problem.channels).t()
    if problem.format == "int8":
        return lambda: torch._int_mm(codes, weight).to(dtype)
    one = torch.ones((), dtype=torch.float32, device=codes.device)
    return lambda: torch._scaled_mm(codes, weight, one, one, out_dtype=torch.bfloat16).to(dtype)


def runs_on_torch(problem: Problem) -> bool:
    """Whether torch's product of codes takes these sizes on CUDA."""
    aligned = problem.channels % 16 == 0 and problem.out_channels % 16 == 0
    return problem.half == 0 and aligned and problem.rows // problem.batch > 16


def _median_micros(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench_cudagraph

    return 1000.0 * float(do_bench_cudagraph(call, rep=5, return_mode="median"))


def read_choices(path: Path) -> dict[str, Choice]:
    """Earlier results; a file that is missing or damaged holds none."""
    try:
        entries = json.loads(path.read_text())
        return {
            key: Choice(entry["engine"], Tile(*entry["tile"]), entry["micros"])
            for key, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_choices(path: Path, known: dict[str, Choice]) -> None:
    """Keep results, those that another process wrote meanwhile included."""
    merged = read_choices(path) | known
    text = json.dumps({key: dataclasses.asdict(choice) for key, choice in merged.items()})
    try:
        make_private(path.parent)
        write_whole(path, text)
    except OSError as error:
        logger.warning("kernel choices are not kept: %s", error)
