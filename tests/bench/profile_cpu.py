"""Where the time of a call goes on the CPU, by kernel, and what integer products alone take.

    python -m tests.bench.profile_cpu                    the CIFAR-10 DDPM UNet, batch 4, W8A8
    python -m tests.bench.profile_cpu dit-b2 --preset w4a8

The limit is the multiplications of the layers on integers at the rate of the largest convolution
that stays in the cache, measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tfmq_fx
from tests.bench.cpu_models import CASES, job, nearest
from tests.bench.problem_size import operations
from tfmq_fx.backends.codes.problem import Problem
from tfmq_fx.backends.cpu.autotune import calls
from tfmq_fx.backends.cpu.codes_layer import CpuCodesLayer

RATE = Problem(
    batch=4,
    height=34,
    width=34,
    channels=256,
    out_channels=256,
    taps=(3, 3),
    stride=(1, 1),
    dilation=(1, 1),
    format="int8",
    half=0,
)


def millis(call: Callable[[], Any], repeats: int = 20) -> float:
    """The median of some calls."""
    times = []
    for i in range(repeats + 3):
        start = time.perf_counter()
        call()
        if i >= 3:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", choices=CASES, default="cifar10-b4")
    parser.add_argument("--preset", default="w8a8")
    parser.add_argument("--artifact", help="file that keeps what the compiler makes")
    args = parser.parse_args()
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        made = job(
            args.model,
            seed=1,
            steps=4,
            threads=threads,
            recipe="nearest",
            folder=Path(folder),
            small=False,
        )
    prepared = tfmq_fx.prepare(
        made.model,
        made.calibration[0],
        timesteps=made.timesteps,
        config=nearest(tfmq_fx.PRESETS[args.preset]),
    )
    for given in made.calibration:
        prepared(**given)
    compiled = tfmq_fx.compile(tfmq_fx.convert(prepared), "inductor", artifact=args.artifact)
    given = made.evaluation[0]
    with torch.no_grad():
        start = time.perf_counter()
        compiled(**given)
        seconds = time.perf_counter() - start
        whole = millis(lambda: compiled(**given))
        rate = operations(RATE) / millis(calls(RATE)["cpu"])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(5):
                compiled(**given)
    layers = [m for m in compiled.gm.modules() if isinstance(m, CpuCodesLayer)]
    limit = sum(operations(layer.problem) for layer in layers) / rate
    limit *= next(iter(given.values())).shape[0] / layers[0].problem.batch
    rows = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)
    print(f"{args.model} {args.preset}: {whole:.1f} ms a call, {threads} threads")
    print(f"first call {seconds:.1f} s; {compiled.nbytes() / 2**20:.1f} MiB of tensors")
    print(f"integer products alone: {limit:.1f} ms at {rate / 1e9:.2f} TOPS")
    for event in rows[:8]:
        print(
            f"{event.self_cpu_time_total / 5000:7.2f} ms  {event.count // 5:4d} x  {event.key[:60]}"
        )


if __name__ == "__main__":
    main()
