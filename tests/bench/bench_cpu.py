"""Time of one call on the CPU: eager and compiled full precision against compiled W8A8, in one run.

    python -m tests.bench.bench_cpu                 the CIFAR-10 DDPM UNet at full size, batch 4
    python -m tests.bench.bench_cpu --small         a reduced width, to try the script

Random weights: SQNR here says that the integer path computes what it should, not how images look.
Timings are interleaved, medians with the range of the middle half; one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tfmq_fx
from tfmq_fx.metrics import sqnr


def cifar10(width: int = 128) -> torch.nn.Module:
    """The denoiser of DDPM on CIFAR-10 (35.7M parameters at width 128), random weights."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).eval()


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
    """Calls of oneDNN's int8 kernels that one run makes, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    wanted = ("qconv", "qlinear")
    return {e.key: e.count for e in profile.key_averages() if any(w in e.key for w in wanted)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = cifar10(32 if args.small else 128)
    x = torch.randn(args.batch, 3, 32, 32)
    timesteps = torch.linspace(0, 950, args.steps).long()
    config = tfmq_fx.PRESETS["w8a8"]
    start = time.perf_counter()
    prepared = tfmq_fx.prepare(model, timesteps=timesteps, config=nearest(config))
    for t in timesteps:
        prepared(torch.randn(2, 3, 32, 32), t)
    converted = tfmq_fx.convert(prepared, progress=False)
    seconds = time.perf_counter() - start
    compiled = tfmq_fx.compile(converted, "inductor")
    full = torch.compile(model)
    half = torch.compile(model)
    t = timesteps[args.steps // 2]

    def in_bf16() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return half(x, t).sample

    calls: dict[str, Callable[[], Any]] = {
        "eager fp32": lambda: model(x, t).sample,
        "torch.compile fp32": lambda: full(x, t).sample,
        "torch.compile bf16": in_bf16,
        "tfmq_fx w8a8": lambda: compiled(x, t).sample,
    }
    with torch.no_grad():
        outputs: dict[str, Tensor] = {name: call().float() for name, call in calls.items()}
        times = interleaved(calls, repeats=args.repeats)
        found = kernels(calls["tfmq_fx w8a8"])
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        rows.append(
            {
                "name": name,
                "ms": round(medians[name], 1),
                "middle_half": [round(low, 1), round(high, 1)],
                "against_fp32": round(medians["torch.compile fp32"] / medians[name], 2),
                "against_bf16": round(medians["torch.compile bf16"] / medians[name], 2),
                "sqnr": round(sqnr(outputs["eager fp32"], outputs[name]), 1),
            }
        )
    print("| | ms per call (middle half) | x compiled fp32 | x compiled bf16 | output SQNR dB |")
    print("|---|---|---|---|---|")
    for row in rows:
        low, high = row["middle_half"]
        print(
            f"| {row['name']} | {row['ms']} ({low} to {high}) | {row['against_fp32']} "
            f"| {row['against_bf16']} | {row['sqnr']} |"
        )
    reference = tfmq_fx.report(converted)
    print(f"int8 kernels in one call: {found}; {compiled.lowered} layers lowered")
    print(f"not lowered: {compiled.declined}")
    print(
        json.dumps(
            {
                "bench": "cpu",
                "parameters": sum(p.numel() for p in model.parameters()),
                "batch": args.batch,
                "threads": args.threads,
                "torch": torch.__version__,
                "machine": platform.processor() or platform.machine(),
                "quantize_seconds": round(seconds, 1),
                "coverage": [reference.weight_coverage, reference.activation_coverage],
                "rows": rows,
            }
        )
    )


def nearest(config: tfmq_fx.Config) -> tfmq_fx.Config:
    """The recipe with nearest rounding: random weights gain nothing from anything better."""
    import dataclasses

    rounding = dataclasses.replace(config.reconstruction, rounding="nearest")
    temporal = dataclasses.replace(config.temporal, mode="table")
    return dataclasses.replace(config, reconstruction=rounding, temporal=temporal)


if __name__ == "__main__":
    main()
