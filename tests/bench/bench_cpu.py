"""One call of a denoiser on the CPU, compared in one run with what else quantizes and compiles.

    python -m tests.bench.bench_cpu                              every model, every variant
    python -m tests.bench.bench_cpu --models cifar10-b4 --variants 'compile*,tfmq_fx w8a8*'
    python -m tests.bench.bench_cpu --tiny                       reduced models, to try the script

Needs the extra `bench` for OpenVINO and NNCF; what is missing is a cell that says so.

Each variant runs in a process of its own, which makes the model from a seed, quantizes and compiles
it, and then waits; they are asked in turn, in an order drawn anew for each round, for one call that
is timed after --warm that are not, so that only one computes at any time and all see the same
machine. Columns:

x fp32, x bf16   against the fastest torch.compile of the model in that precision, in the same round
SQNR             of the output against eager float32, mean over the steps; random weights: it tells
                 that the integers compute what they should, not how images look
MiB              at most, of the whole process in some calls; the second figure: before them
saved            what has to be kept on disk to run the variant: weights, graph if there is one
prepare, start   what is done once (capture, calibrate, quantize), and what each process does again
                 (load, compile, first call)
int8 kernels     in one call: torch's by the profiler, OpenVINO's by its runtime graph
                 (of convolutions and products)
coverage         share of convolution and linear weights / of their inputs that are integers

"frozen" is Inductor with freezing, which PT2E needs for its kernels and which float models gain
from, too; "autocast" keeps weights in float32. Models whose variants don't fit into memory together
are measured in waves; the fastest two of the first, one for each precision, are in every wave, and
ratios are to them. Quantizers see the same calibration samples, one batch for each timestep; those
of the comparison are others.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.bench.cpu_models import CASES, TOGETHER
from tests.bench.cpu_models import cifar10 as cifar10
from tests.bench.cpu_models import nearest as nearest
from tests.bench.cpu_results import append, fastest, machine, table, timed
from tests.bench.cpu_timing import interleaved as interleaved
from tests.bench.cpu_timing import kernels as kernels
from tests.bench.cpu_variants import BF16, FP32, REFERENCE, VARIANTS
from tests.bench.cpu_worker import SETTLING
from tests.bench.cpu_workers import Turn, Worker, WorkerError

_PAUSE = SETTLING + 0.01  # seconds between calls


class Run:
    """The variants of one model, made and measured wave by wave; rows by variant."""

    def __init__(self, case: str, args: argparse.Namespace, folder: Path, turn: Turn) -> None:
        self.case, self.args, self.folder, self.turn = case, args, folder, turn
        self.rows: dict[str, dict[str, Any]] = {}
        self.order = random.Random(args.seed)
        self.bases: dict[str, str | None] = {"fp32_ms": None, "bf16_ms": None}

    def waves(self) -> Iterator[list[str]]:
        """What is in memory at once, the baselines first, then with the fastest of them."""
        wanted = self.args.variants
        most = self.args.together or TOGETHER.get(self.case, len(VARIANTS))
        baselines = [name for name in wanted if name in (REFERENCE, *FP32, *BF16)]
        others = [name for name in wanted if name not in baselines]
        if len(wanted) <= most + 2:
            yield wanted
            return
        for names in (baselines, others):
            for i in range(0, len(names), most):
                kept = [name for name in self.bases.values() if name and name in self.rows]
                yield [*kept, *names[i : i + most]]

    def measure(self) -> None:
        """Fill `rows`."""
        for wave in self.waves():
            workers: dict[str, Worker] = {}
            try:
                for name in tqdm(wave, f"{self.case}: prepare", disable=None):
                    self.start(name, workers)
                times = self.times(workers)
                self.finish(workers, times)
            finally:
                for worker in workers.values():
                    worker.stop()

    def start(self, name: str, workers: dict[str, Worker]) -> None:
        """Have a worker make its variant."""
        args = self.args
        settings = {
            "variant": name,
            "case": self.case,
            "seed": args.seed,
            "steps": args.steps,
            "threads": args.threads,
            "recipe": args.recipe,
            "folder": str(self.folder),
            "small": args.tiny,
        }
        self.turn.pause()
        worker = Worker(settings, cache=args.cache or self.folder / "cache", timeout=args.timeout)
        workers[name] = worker
        try:
            found = worker.answer()
        except WorkerError as error:
            self.fail(name, error, workers)
            return
        self.rows.setdefault(name, found)
        seconds = found["preparing_seconds"] + found["start_seconds"]
        tqdm.write(f"{self.case}, {name}: ready after {seconds:.0f} s", file=sys.stderr)

    def fail(self, name: str, error: WorkerError, workers: dict[str, Worker]) -> None:
        """A row that says why, and where to read more."""
        worker = workers.pop(name)
        worker.stop()
        self.rows[name] = {"failed": str(error).replace("|", "\\|")}
        tqdm.write(f"{self.case}, {name}: {error}\n{worker.tail()}", file=sys.stderr)

    def times(self, workers: dict[str, Worker]) -> dict[str, list[float]]:
        """Milliseconds of each variant, round by round."""
        args = self.args
        times: dict[str, list[float]] = {name: [] for name in workers}
        idle: dict[str, list[float]] = {name: [] for name in workers}
        for i in tqdm(range(-1, args.repeats), f"{self.case}: measure", disable=None):
            names = [*workers]
            self.order.shuffle(names)
            self.turn.pause()
            for name in names:
                time.sleep(_PAUSE)
                try:
                    found = workers[name].ask(step=max(i, 0), warm=args.warm)
                except WorkerError as error:
                    self.fail(name, error, workers)
                    times.pop(name)
                    continue
                if i >= 0:
                    times[name].append(found["ms"])
                    idle[name].append(found["idle_ms"])
        for name, values in idle.items():
            self.rows[name].setdefault("idle_ms", round(statistics.median(values or [0.0]), 2))
        return times

    def finish(self, workers: dict[str, Worker], times: dict[str, list[float]]) -> None:
        """Rows of this wave; a baseline keeps that of the first."""
        found = {"fp32_ms": fastest(times, FP32), "bf16_ms": fastest(times, BF16)}
        bases = {key: timed(times[name])["ms"] if name else None for key, name in found.items()}
        for key, name in found.items():
            self.bases[key] = name or self.bases[key]
        for name, worker in [*workers.items()]:
            if "ms" in self.rows[name]:
                continue
            try:
                counted = worker.ask()["kernels"]
            except WorkerError as error:
                self.fail(name, error, workers)
                continue
            self.rows[name] |= timed(times[name]) | bases | {"kernels": counted}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default=",".join(CASES), help="with commas between")
    parser.add_argument("--variants", default="*", help="likewise; patterns such as 'openvino*'")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warm", type=int, default=1, help="calls before each that is timed")
    parser.add_argument("--steps", type=int, default=20, help="timesteps of the comparison")
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--seed", type=int, help="of inputs; fresh if left out")
    parser.add_argument("--recipe", choices=("nearest", "full"), default="nearest")
    parser.add_argument("--together", type=int, help="variants in memory beside the baselines")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one answer")
    parser.add_argument("--tiny", action="store_true", help="reduced models")
    parser.add_argument("--out", type=Path, help="JSON lines are appended to it")
    parser.add_argument("--lock", type=Path, help="file that benches of one machine take in turns")
    parser.add_argument("--cache", type=Path, help="of compiled code: start-up is then no measure")
    args = parser.parse_args(argv)
    args.models = args.models.split(",")
    if unknown := {*args.models} - {*CASES}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    patterns = [pattern.strip() for pattern in args.variants.split(",")]
    if lost := [p for p in patterns if not fnmatch.filter(VARIANTS, p)]:
        parser.error(f"no variant is like {', '.join(lost)}; there are {', '.join(VARIANTS)}")
    chosen = [v for v in VARIANTS if any(fnmatch.fnmatch(v, p) for p in patterns)]
    args.variants = [REFERENCE, *(v for v in chosen if v != REFERENCE)]
    if args.repeats < 10 and not args.tiny:
        parser.error("--repeats must be at least 10")
    if args.seed is None:
        args.seed = secrets.randbelow(2**31)
    folder = Path(os.environ.get("OUT") or tempfile.gettempdir())
    args.out = args.out or folder / "bench_cpu.jsonl"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = arguments(argv)
    facts = machine(args.threads)
    print(json.dumps(facts))
    settings = {key: v for key, v in vars(args).items() if key not in ("out", "lock", "models")}
    settings["cache"] = args.cache and str(args.cache)
    for case in args.models:
        with tempfile.TemporaryDirectory() as folder, Turn(args.lock) as turn:
            run = Run(case, args, Path(folder), turn)
            run.measure()
        rows = {name: run.rows[name] for name in args.variants}
        result = {"bench": "cpu", "case": case, "machine": facts, "settings": settings}
        result |= {"rows": rows, "load": os.getloadavg()}
        append(args.out, result)
        print("", *table(result), "", sep="\n")


if __name__ == "__main__":
    main()
