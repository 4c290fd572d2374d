"""Whole denoisers on CUDA in one table: compiled bf16, torchao, and this package's int8, fp8, W4A8.

    python -m tests.bench.bench_cuda                     models at full size, random weights
    python -m tests.bench.bench_cuda --only sdxl-b2 --minutes 9
    python -m tests.bench.bench_cuda --kernels           convolutions and products, shape by shape
    python -m tests.bench.bench_cuda --profile sdxl-b2   where the time of a call goes
    python -m tests.bench.bench_cuda --device cpu --tiny    tries the script; times mean nothing

On a machine without a network that has torch, Triton, numpy, scipy, networkx, safetensors, tqdm and
huggingface-hub, the rest comes as wheels, made elsewhere (for Python 3.12) by

    python -m pip download --no-deps --only-binary=:all: --python-version 3.12 \\
        --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \\
        -d .whl torchao==0.18.0 diffusers==0.42.1 importlib_metadata==8.7.0

and is used from the root of the repository by

    python3 -m pip install -q --no-index --no-deps --target .site .whl/*.whl
    PYTHONPATH=.site python3 -m tests.bench.bench_cuda

A row for each model and variant: milliseconds of a call by itself (CUDA events, synchronised before
and after; all variants of a model in turn on the same fresh inputs; median, range of the middle
half), its ratio to the fastest bf16, bytes on the device between calls and at most, bytes of the
saved model, and SQNR of the output against float32.  "no tables": what depends on the timestep
alone stays as quantized layers, and every input has one range.  "prologue": what the conditions fix
is computed once a request, its weights on the host between; the note tells its time.

Models are measured one by one, the most telling first, in two rounds: what matters, then the rest.
What no longer fits into --minutes is a row "skipped", what raises a row "failed", and so is what
ends the process: it is started again for the others.  Rows are in a JSON file as soon as they are
measured: --json, else bench_cuda.json in $OUT or the temporary directory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tests.bench import cuda_kernels
from tests.bench.cuda_models import CASES
from tests.bench.cuda_results import BROKEN, Results, launcher, reason_of, supervise
from tests.bench.cuda_timing import allocated, is_usable, machine, synchronize
from tests.bench.cuda_variants import BASE, MAIN, REST, Bench

_TOP = 15  # kernels listed in a profile
_LEAST = 20.0  # seconds in which nothing is built


def key_of(case: str, variant: str) -> str:
    return f"{case} / {variant}"


def plan(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Cases and the variants of each, in order; a case comes twice, its baseline each time."""
    found = []
    for wanted in (MAIN, REST):
        for name in args.only:
            variants = [v for v in wanted if CASES[name].bound or not v.endswith("prologue")]
            variants = [v for v in variants if v in args.variants]
            if variants:
                first = [BASE] if BASE in args.variants and BASE not in variants else []
                found.append((name, first + variants))
    return found


def work(args: argparse.Namespace, results: Results, deadline: float) -> int:
    """Measure what is not known yet; returns the exit status."""
    torch._dynamo.config.recompile_limit = 64  # forward of one class is compiled many times here
    results.write(machine=machine(args.device))
    for name, variants in plan(args):
        known = results.data["rows"].keys() | results.data["failed"].keys()
        lacking = [v for v in variants if key_of(name, v) not in known]
        if not lacking:
            continue
        if BASE in variants:
            lacking = list(dict.fromkeys((BASE, *lacking)))
        keys = {variant: key_of(name, variant) for variant in lacking}
        torch._dynamo.reset()
        results.write(started=keys[lacking[0]])
        try:
            bench = Bench(name, args)
        except Exception as error:
            for key in keys.values():
                results.fail(key, reason_of(error))
            if not is_usable(args.device):
                return BROKEN
            continue
        longest: dict[str, float] = {}  # seconds by kind of variant
        for variant, key in keys.items():
            if key in results.data["failed"]:
                continue
            kind, left = variant.split()[0], max(deadline - time.time(), 0)
            if left < (need := longest.get(kind, 1.0 if args.tiny else _LEAST)):
                results.fail(key, f"skipped: {left:.0f} s left, the like takes {need:.0f} s")
                continue
            results.write(started=key)
            start = time.time()
            try:
                bench.add(variant)
                bench.measure(args.repeats)
            except Exception as error:
                results.fail(key, reason_of(error))
                bench.drop(variant)
                if not is_usable(args.device):
                    return BROKEN
                continue
            longest[kind] = max(longest.get(kind, _LEAST), time.time() - start)
            for each, row in bench.rows.items():
                results.add(keys[each], row)
            results.write(started=None)
            print(f"{key}: {bench.rows[variant]['ms']} ms", file=sys.stderr, flush=True)
        del bench
        allocated(args.device)
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return 0


def profile(args: argparse.Namespace) -> None:
    """Print where the time of a call goes, kernel by kernel, for the chosen variants of a case."""
    device = args.device
    activity = torch.profiler.ProfilerActivity
    bench = Bench(args.profile, args)
    for variant in args.variants:
        try:
            bench.add(variant)
        except Exception as error:
            print(f"\n{args.profile}, {variant}: {reason_of(error)}")
            continue
        call, given = bench.ready[variant].call, bench.request.inputs()
        call(given)
        synchronize(device)
        kinds = [activity.CPU, *([activity.CUDA] if device == "cuda" else [])]
        with torch.profiler.profile(activities=kinds) as seen:
            for _ in range(3):
                call(given)
            synchronize(device)
        spent = [
            (e.self_device_time_total if device == "cuda" else e.self_cpu_time_total, e)
            for e in seen.key_averages()
            if device != "cuda" or e.device_type == torch.autograd.DeviceType.CUDA
        ]
        whole = sum(time for time, _ in spent) or 1.0
        print(f"\n{args.profile}, {variant}: {whole / 3000:.2f} ms in kernels a call")
        for taken, event in sorted(spent, key=lambda pair: -pair[0])[:_TOP]:
            share = 100 * taken / whole
            print(f"{taken / 3000:9.3f} ms {share:5.1f} % {event.count // 3:5d}x {event.key[:80]}")


def table(results: Results, args: argparse.Namespace) -> Iterator[str]:
    """The lines to print: a row for each case and variant, measured or not."""
    rows, failed = results.data["rows"], results.data["failed"]
    yield "| model | variant | ms (middle half) | x bf16 | MiB held | peak | saved | SQNR dB | |"
    yield "|---|---|---|---|---|---|---|---|---|"
    keys = dict.fromkeys((name, v) for name, variants in plan(args) for v in variants)
    for name, variant in sorted(keys, key=lambda pair: args.only.index(pair[0])):
        key = key_of(name, variant)
        if key not in rows:
            yield f"| {name} | {variant} | {failed.get(key, 'skipped: out of time')} |||||||"
            continue
        row = rows[key]
        # each in the turns that it was measured in
        bf16 = [
            r["ms"] / r["base_ms"]
            for r in rows.values()
            if r["case"] == name and r["variant"].startswith("bf16") and r["base_ms"]
        ]
        ratio = f"{row['base_ms'] / row['ms'] * min(bf16):.2f}" if row["base_ms"] and bf16 else ""
        low, high = row["middle_half"]
        note = row["note"] + (
            f"; compiled {row['recompiled']} times more" * bool(row["recompiled"])
        )
        sizes = [row.get(f"{kind}_bytes") or 0 for kind in ("resident", "peak", "saved")]
        mib = " | ".join(f"{size / 2**20:.0f}" if size else "" for size in sizes)
        yield (
            f"| {name} | {variant} | {row['ms']:.2f} ({low:.2f} to {high:.2f}) | {ratio} | {mib} "
            f"| {row['sqnr']} | {note} |"
        )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    every = (*MAIN, *REST)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default=",".join(CASES), help="cases, with commas between")
    parser.add_argument("--variants", default=",".join(every), help="likewise")
    parser.add_argument("--mode", default="max-autotune", help="of torch.compile, ours too")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small widths; nothing is compiled")
    parser.add_argument("--kernels", action="store_true", help="the table of shapes instead")
    parser.add_argument("--tiles", type=int, default=3, help="tried for each shape")
    parser.add_argument("--profile", metavar="CASE", help="top kernels of a call instead")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    args.variants = [name.strip() for name in args.variants.split(",")]
    if unknown := {*args.only, *args.variants} - {*CASES, *every}:
        parser.error(
            f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}; {every}"
        )
    if args.profile and args.variants == list(every):
        args.variants = [BASE, "w8a8"]
    if args.repeats < 10 and not args.tiny:
        parser.error("--repeats must be at least 10")
    folder = Path(os.environ.get("OUT") or tempfile.gettempdir())
    args.json = args.json or folder / "bench_cuda.json"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = arguments(argv)
    if args.profile:
        profile(args)
        return
    run = cuda_kernels.work if args.kernels else work
    if args.until is not None:
        raise SystemExit(run(args, Results(args.json), args.until))
    args.json.unlink(missing_ok=True)
    deadline = time.time() + 60 * args.minutes
    given = [*(sys.argv[1:] if argv is None else argv), "--json", str(args.json)]
    trouble = supervise(launcher(given), lambda: Results(args.json), deadline)
    results = Results(args.json)
    print(json.dumps(results.data["machine"]))
    for line in (cuda_kernels.table if args.kernels else table)(results, args):
        print(line)
    if trouble:
        raise SystemExit(trouble)


if __name__ == "__main__":
    main()
