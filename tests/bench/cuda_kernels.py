"""Convolutions and matrix products of int8, fp8 and 4-bit weights, shape by shape, on CUDA.

Each against cuDNN's bf16 convolution (or the bf16 matrix product), torch's integer or fp8 product
of the equal size, and the roofline. Random data; operands rotate beyond the L2 cache; calls are
replayed from a CUDA graph, so that launching costs nothing; every result is compared with the
reference. Times are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bench.cuda_results import BROKEN, Results, reason_of
from tests.bench.cuda_timing import is_usable, machine, micros, synchronize
from tests.bench.problem_size import depth, moved_bytes, operations
from tfmq_fx.backends.codes.arithmetic import packed_half
from tfmq_fx.backends.codes.problem import Format, Problem
from tfmq_fx.backends.cuda.autotune import arguments, best_convolutions
from tfmq_fx.backends.cuda.conv import conv2d, conv2d_reference, conv2d_triton
from tfmq_fx.backends.cuda.tiles import candidates
from tfmq_fx.quant.affine import FP8

TORCH = "torch"  # what the kernels are held against, as one of the things to time
FORMATS: tuple[Format, ...] = ("int8", "fp8", "int4")
PEAK = 1979e12  # multiplications and additions a second in int8 or fp8, dense, by the data sheet
_CACHE = 60 * 2**20  # bytes of the L2
_SETS = 16  # of operands at most
_TRIED = 3  # shapes, before a format that ran at none is left out
_LEAST = 15.0  # seconds in which nothing is measured

# channels in, channels out, height of a square image, samples, taps, stride
_SDXL = [
    (320, 320, 128, 2, 3, 1),
    (640, 640, 64, 2, 3, 1),
    (1280, 1280, 32, 2, 3, 1),
    (2560, 1280, 32, 2, 3, 1),
    (1920, 1280, 32, 2, 3, 1),
    (1920, 640, 64, 2, 3, 1),
    (1280, 640, 64, 2, 3, 1),
    (960, 640, 64, 2, 3, 1),
    (960, 320, 128, 2, 3, 1),
    (640, 320, 128, 2, 3, 1),
    (1280, 1280, 64, 2, 3, 1),
    (640, 640, 128, 2, 3, 1),
    (320, 320, 128, 2, 3, 2),
    (640, 640, 64, 2, 3, 2),
    (2560, 1280, 32, 2, 1, 1),
    (1920, 640, 64, 2, 1, 1),
    (960, 320, 128, 2, 1, 1),
]
_SD15 = [
    (320, 320, 64, 8, 3, 1),
    (640, 640, 32, 8, 3, 1),
    (1280, 1280, 16, 8, 3, 1),
    (1280, 1280, 8, 8, 3, 1),
    (2560, 1280, 16, 8, 3, 1),
    (960, 320, 64, 8, 3, 1),
    (320, 320, 64, 8, 1, 1),
    (640, 640, 32, 8, 1, 1),
    (1280, 1280, 16, 8, 1, 1),
]
# features in, features out, tokens, samples
_LINEAR = [
    (640, 640, 4096, 2),
    (640, 5120, 4096, 2),
    (2560, 640, 4096, 2),
    (1280, 1280, 1024, 2),
    (1280, 10240, 1024, 2),
    (5120, 1280, 1024, 2),
    (2048, 1280, 77, 2),
    (1152, 1152, 256, 16),
    (1152, 4608, 256, 16),
    (4608, 1152, 256, 16),
    (3072, 3072, 4608, 1),
    (3072, 12288, 4608, 1),
    (12288, 3072, 4608, 1),
]
_TINY = ([(16, 16, 6, 2, 3, 1)], [(20, 24, 5, 1, 3, 2)], [(32, 16, 24, 2)])


def problems(tiny: bool) -> dict[str, Problem]:
    """What is measured, by name; for int8 weights."""
    sdxl, sd15, linear = _TINY if tiny else (_SDXL, _SD15, _LINEAR)
    found = {}
    for model, sizes in (("SDXL", sdxl), ("SD 1.5", sd15)):
        for c, o, side, batch, taps, stride in sizes:
            name = f"{model} {taps}x{taps} {c} > {o} at {side}, batch {batch}"
            name += f", stride {stride}" * (stride > 1)
            border = 2 * (taps // 2)
            found[name] = _problem(batch, side + border, side + border, c, o, taps, stride)
    for c, o, tokens, batch in linear:
        found[f"linear {c} > {o}, {batch} x {tokens}"] = _problem(batch, 1, tokens, c, o, 1, 1)
    return found


def _problem(
    batch: int, height: int, width: int, channels: int, out: int, taps: int, stride: int
) -> Problem:
    return Problem(
        batch=batch,
        height=height,
        width=width,
        channels=channels,
        out_channels=out,
        taps=(taps, taps),
        stride=(stride, stride),
        dilation=(1, 1),
        format="int8",
        half=0,
    )


def with_format(problem: Problem, kind: Format) -> Problem:
    """The same problem with other weights."""
    half = packed_half(problem.channels) if kind == "int4" else 0
    return dataclasses.replace(problem, format=kind, half=half)


# ---------------------------------------------------------------- what it is held against


def sets(problem: Problem) -> int:
    """How many sets of operands outweigh the cache."""
    return max(2, min(_SETS, -(-2 * _CACHE // moved_bytes(problem))))


def ceilings(device: str) -> dict[str, float]:
    """What the device reaches: bytes read and written a second by a copy, and operations a second
    of large products in bf16, int8 and fp8."""
    size, side = (2**30, 8192) if device == "cuda" else (2**20, 64)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    found = {"copy": 2 * size / micros([partial(into.copy_, source)], device) * 1e6}
    for name, make in (("bf16", _bf16_product), ("int8", _int8_product), ("fp8", _fp8_product)):
        with contextlib.suppress(RuntimeError, NotImplementedError):
            call = make(side, side, side, device)
            found[name] = 2 * side**3 / micros([call], device) * 1e6
    return found


def _bf16_product(m: int, n: int, k: int, device: str) -> Callable[[], Tensor]:
    a, b = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
    return lambda: a @ b.t()


def _int8_product(m: int, n: int, k: int, device: str) -> Callable[[], Tensor]:
    a, b = (torch.randint(-128, 128, (rows, k), device=device, dtype=torch.int8) for rows in (m, n))
    return lambda: torch._int_mm(a, b.t())


def _fp8_product(m: int, n: int, k: int, device: str) -> Callable[[], Tensor]:
    a, b = (torch.randn(rows, k, device=device).to(FP8) for rows in (m, n))
    one = torch.ones((), device=device)
    settings: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, **settings)


def _float_call(problem: Problem, device: str) -> Callable[[], Tensor]:
    """The problem in bf16: a convolution that pads by itself, or a matrix product."""
    p = problem
    border = p.taps[0] // 2
    sizes = (p.batch, p.channels, p.height - 2 * border, p.width - 2 * border)
    bias = torch.randn(p.out_channels, device=device, dtype=torch.bfloat16)
    if p.height == 1:
        tokens = torch.randn(p.rows, p.channels, device=device, dtype=torch.bfloat16)
        matrix = torch.randn(p.out_channels, p.channels, device=device, dtype=torch.bfloat16)
        return lambda: F.linear(tokens, matrix, bias)
    x = torch.randn(sizes, device=device, dtype=torch.bfloat16)
    w = torch.randn(p.out_channels, p.channels, *p.taps, device=device, dtype=torch.bfloat16)
    x, w = (value.contiguous(memory_format=torch.channels_last) for value in (x, w))
    return lambda: F.conv2d(x, w, bias, p.stride, border)


# ---------------------------------------------------------------- one problem


def ours(problem: Problem, device: str, tiles: int) -> dict[str, Any]:
    """Time and error of the kernel, with the best of the `tiles` most promising tiles."""
    given = [arguments(problem, torch.device(device)) for _ in range(sets(problem))]
    run = conv2d_triton if device == "cuda" else conv2d
    best: dict[str, Any] = {"us": math.inf}
    declined = []
    for tile in candidates(problem)[:tiles]:
        calls = [partial(run, **each, dtype=torch.bfloat16, tile=tile) for each in given]
        try:
            taken = micros(calls, device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a tile that does not fit this device
            synchronize(device)  # raises where nothing can be run any more
            declined.append(f"{tuple(tile)}: {str(error)[:80]}")
            continue
        if taken < best["us"]:
            best = {"us": taken, "tile": tuple(tile)}
    if "tile" not in best:
        raise RuntimeError(f"no tile runs: {'; '.join(declined)}")
    tile = best["tile"]
    found = run(**given[0], dtype=torch.bfloat16, tile=tile).double()
    wanted = conv2d_reference(**given[0], dtype=torch.bfloat16, tile=tile).double()
    best["error"] = float((found - wanted).norm() / wanted.norm())
    best["wrong"] = not best["error"] <= allowed(problem)  # NaN is wrong
    if declined:
        best["declined"] = declined
    return best


def allowed(problem: Problem) -> float:
    """The relative error that a right kernel may have.

    Integer sums are exact, and what follows may round to the other neighbour in bf16: 2^-7 of a
    value at most.  Hopper's fp8 products are added to sums of which 14 bits are kept: a step of 32
    terms is cut at 2^-13 of the sum at most.
    """
    least = 2.0**-7
    return least + 2.0**-13 * depth(problem) / 32 if problem.format == "fp8" else least


def torch_times(problem: Problem, device: str) -> dict[str, Any]:
    """Microseconds of bf16, and of torch's integer and fp8 products of equal size."""
    p, count = problem, sets(problem)
    with best_convolutions():
        calls = [_float_call(p, device) for _ in range(count)]
        row: dict[str, Any] = {"bf16": micros(calls, device)}
    for name, make in (("int8", _int8_product), ("fp8", _fp8_product)):
        try:
            products = [make(p.rows, p.out_channels, depth(p), device) for _ in range(count)]
            row[name] = micros(products, device)
        except (RuntimeError, NotImplementedError) as error:  # sizes that torch does not take
            synchronize(device)
            row[f"{name} failed"] = str(error)[:120]
    return row


# ---------------------------------------------------------------- the table


def work(args: argparse.Namespace, results: Results, deadline: float) -> int:
    """Measure the shapes that are not known yet; returns the exit status."""
    if "ceilings" not in results.data:
        results.write(machine=machine(args.device), started="ceilings")
        results.write(ceilings=ceilings(args.device), started=None)
    for name, problem in problems(args.tiny).items():
        for kind in (TORCH, *FORMATS):
            key = f"{name} / {kind}"
            if key in results.data["rows"] or key in results.data["failed"]:
                continue
            if time.time() > deadline - (0 if args.tiny else _LEAST):
                results.fail(key, "skipped: out of time")
                continue
            if is_hopeless(kind, results):
                results.fail(key, f"skipped: {_TRIED} shapes failed")
                continue
            results.write(started=key)
            try:
                if kind == TORCH:
                    row = torch_times(problem, args.device)
                else:
                    row = ours(with_format(problem, kind), args.device, args.tiles)
                results.add(key, row)
            except Exception as error:
                results.fail(key, reason_of(error))
                if not is_usable(args.device):
                    return BROKEN
            results.write(started=None)
        print(name, file=sys.stderr, flush=True)
    return 0


def is_hopeless(kind: str, results: Results) -> bool:
    """Whether several shapes failed and none ran."""
    ran, failed = (
        [key for key in results.data[part] if key.endswith(f" / {kind}")]
        for part in ("rows", "failed")
    )
    return not ran and len(failed) >= _TRIED


def table(results: Results, args: argparse.Namespace) -> Iterator[str]:
    """The lines to print: for each format the time, that of bf16 over it, that of torch's product
    of equal size over it, and that of the roofline over it."""
    found, rows, failed = (results.data.get(part, {}) for part in ("ceilings", "rows", "failed"))
    shown = ", ".join(f"{name} {rate / 1e12:.2f} T/s" for name, rate in found.items())
    yield f"measured: {shown}; roofline: {PEAK / 1e12:.0f} T/s by the data sheet, and that copy"
    heads = " | ".join(f"{kind} us | x bf16 | of product | of roof" for kind in FORMATS)
    yield f"| shape | bf16 us | {heads} |"
    yield "|---" * (2 + 4 * len(FORMATS)) + "|"
    for name, problem in problems(args.tiny).items():
        torchs = rows.get(f"{name} / {TORCH}", {})
        bf16 = torchs.get("bf16", math.nan)
        cells = [f"{bf16:.1f}"]
        for kind in FORMATS:
            key, product = f"{name} / {kind}", torchs.get("fp8" if kind == "fp8" else "int8")
            if key not in rows:
                cells += [failed.get(key, "skipped: out of time")[:60], "", "", ""]
                continue
            row, p = rows[key], with_format(problem, kind)
            us = row["us"]
            roof = 1e6 * max(operations(p) / PEAK, moved_bytes(p) / found["copy"])
            cells += [f"{us:.1f}{' WRONG' if row['wrong'] else ''}", f"{bf16 / us:.2f}"]
            cells += [f"{100 * product / us:.0f} %" if product else "", f"{100 * roof / us:.0f} %"]
        yield f"| {name} | {' | '.join(cells)} |"
