"""Seconds of calibration, conversion and drawing in one process and in several, one thread each.

    python -m tests.bench.bench_processes                    the digits model, W4A8
    python -m tests.bench.bench_processes --recipe best-w4a8
    python -m tests.bench.bench_processes --model cifar10    the CIFAR-10 DDPM UNet, random weights
    python -m tests.bench.bench_processes --iters 50         AdaRound of blocks as well
    python -m tests.bench.bench_processes --small            whether it runs, in a minute

Processes talk over gloo. Prints a table in Markdown and one JSON line; every number of processes
must end with the same model, which is checked where nothing is learnt.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import tfmq_fx
from tests.toys import cifar10_unet
from tfmq_fx.calibration import scheduler_sampling
from tfmq_fx.core.presets import resolve
from tfmq_fx.evaluation import digits
from tfmq_fx.serialization.checkpoint import digest

PARTS = ("calibrate", "convert", "draw")


def subject(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A model and the shape of a sample."""
    if name == "digits":
        return digits.load_unet(), (1, digits.IMAGE_SIZE, digits.IMAGE_SIZE)
    torch.manual_seed(0)
    return cifar10_unet(divide=1 if name == "cifar10" else 8).eval(), (3, 32, 32)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each part in this process, all processes taking part, and what came out."""
    config = resolve(args.recipe)
    spec = dataclasses.replace(config.reconstruction, iters=args.iters, samples=args.samples)
    config = dataclasses.replace(config, reconstruction=spec)
    model, shape = subject(args.model)
    prepared = tfmq_fx.prepare(model, config=config)
    settings = {"num_inference_steps": args.steps, "batch_size": args.batch}
    seconds = {}

    def timed(part: str, work: Any) -> Any:
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        found = work()
        seconds[part] = time.perf_counter() - start
        return found

    source = digits.make_scheduler(), shape
    drawn = {"samples": args.images, "seed": 0, "progress": False} | settings
    timed("calibrate", lambda: tfmq_fx.calibrate(prepared, source, **drawn))
    converted = timed("convert", lambda: tfmq_fx.convert(prepared, progress=False))
    images = timed(
        "draw",
        lambda: scheduler_sampling.sample(
            model, source[0], (args.images, *shape), seed=1, parallel=True, **settings
        ),
    )
    passes = {p["name"]: p["seconds"] for p in converted.record["passes"]}
    return {
        "seconds": seconds,
        "passes": passes,
        "model": digest(dict(converted.state_dict())),
        "images": digest(images),
    }


def run(processes: int, arguments: list[str]) -> dict[str, Any]:
    """What the first of that many processes measured."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.bench.bench_processes", *arguments]
        started = [
            subprocess.Popen(
                [*command, "--here", str(rank), str(processes), folder],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(processes)
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            raise SystemExit(1)
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
    return found


def here(args: argparse.Namespace) -> None:
    """Measure as one process of a group; the first one writes what it found."""
    rank, count, folder = int(args.here[0]), int(args.here[1]), Path(args.here[2])
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder / 'meet'}", world_size=count, rank=rank
        )
    found = measure(args)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    if count > 1:
        dist.destroy_process_group()


def table(found: dict[int, dict[str, Any]]) -> str:
    """Seconds, and how many times faster than the first, as Markdown."""
    counts = list(found)
    rows = [f"| | {' | '.join(f'{n} processes' if n > 1 else '1 process' for n in counts)} |"]
    rows.append("|---" * (len(counts) + 1) + "|")
    groups = [("seconds", part, part) for part in PARTS]
    groups += [("passes", part, f"convert: {part}") for part in found[counts[0]]["passes"]]
    for group, part, shown in groups:
        first = found[counts[0]][group][part]
        if group == "passes" and first < 0.02 * found[counts[0]]["seconds"]["convert"]:
            continue
        cells = [f"{found[n][group][part]:.1f} s" for n in counts]
        for i, n in enumerate(counts[1:], 1):
            cells[i] += f" ({first / max(found[n][group][part], 1e-9):.2f} x)"
        rows.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Measure each number of processes in turn and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("digits", "cifar10", "cifar10-small"), default="digits")
    parser.add_argument("--recipe", default="w4a8")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--iters", type=int, default=0, help="Adam steps of AdaRound for a block")
    parser.add_argument("--samples", type=int, default=640, help="calibration samples used")
    parser.add_argument("--images", type=int, default=64, help="images drawn")
    parser.add_argument("--batch", type=int, default=16, help="images drawn at once")
    parser.add_argument("--steps", type=int, default=20, help="steps of the sampler")
    parser.add_argument("--small", action="store_true", help="few samples of a small model")
    parser.add_argument("--here", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        args.model, args.samples, args.images = "cifar10-small", 128, 8
        args.batch, args.steps = 2, 4
    if args.here:
        here(args)
        return
    found = {n: run(n, sys.argv[1:]) for n in args.processes}
    print(table(found))
    same = [part for part in ("model", "images") if len({f[part] for f in found.values()}) == 1]
    print(f"\nthe same bits: {', '.join(same) or 'nothing'}")
    if "images" not in same or ("model" not in same and not args.iters):
        raise SystemExit("processes found something else than one does")
    what = {"bench": "processes", "torch": torch.__version__} | vars(args)
    print(json.dumps(what | {"found": found}))


if __name__ == "__main__":
    main()
