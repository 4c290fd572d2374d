"""What each pass adds on the digits model: output SQNR, FID and seconds, row by row.

    python -m tests.bench.bench_digits                        the ablation, SQNR only (minutes)
    python -m tests.bench.bench_digits --samples 2048         with FID, paired seeds throughout

One JSON line at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from typing import Any

import torch

import tfmq_fx
from tfmq_fx import demo, digits, metrics
from tfmq_fx.config import Config
from tfmq_fx.presets import PRESETS


def with_(config: Config, *, name: str, **reconstruction: Any) -> Config:
    """A recipe with other rounding settings."""
    spec = dataclasses.replace(config.reconstruction, **reconstruction)
    return dataclasses.replace(config, name=name, reconstruction=spec)


def static(config: Config) -> Config:
    """A recipe with one input range per layer."""

    def layer(given: Any) -> Any:
        if given is None or given.activations is None:
            return given
        acts = dataclasses.replace(given.activations, per_timestep=False)
        return dataclasses.replace(given, activations=acts)

    return dataclasses.replace(
        config,
        layers=layer(config.layers),
        first=layer(config.first),
        last=layer(config.last),
    )


def coarse_input(config: Config) -> Config:
    """A recipe whose first layer reads 8-bit inputs like the rest."""
    assert config.first is not None and config.layers.activations is not None
    first = dataclasses.replace(config.first, activations=config.layers.activations)
    return dataclasses.replace(config, first=first)


def recipes() -> list[Config]:
    """The rows of the ablation."""
    w8, w4 = PRESETS["w8a8"], PRESETS["w4a8"]
    nearest = {"rounding": "nearest", "iters": 0}
    temporal = w4.temporal
    tib = dataclasses.replace(temporal, mode="tib")
    return [
        with_(static(w8), name="W8A8 nearest, static ranges", **nearest),
        with_(w8, name="W8A8 nearest, ranges per timestep", **nearest),
        with_(w8, name="W8A8 second-order (preset)"),
        dataclasses.replace(coarse_input(w8), name="W8A8 with 8-bit sample input"),
        demo.nearest_static(),
        with_(static(w4), name="W4A8 nearest, static, exact tables", **nearest),
        with_(w4, name="W4A8 nearest, ranges per timestep, tables", **nearest),
        with_(w4, name="W4A8 AdaRound from nearest, 200 iterations", rounding="nearest", iters=200),
        dataclasses.replace(w4, name="W4A8 second-order (preset)"),
        with_(w4, name="W4A8 second-order + AdaRound 60", iters=60),
        dataclasses.replace(w4, name="W4A8 second-order, block kept (TIAR)", temporal=tib),
        dataclasses.replace(PRESETS["w4a16"], name="W4A16 (preset)"),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=0, help="images for each FID; 0 leaves it")
    parser.add_argument("--only", help="rows whose name contains this")
    args = parser.parse_args()
    model: Any = digits.load_unet()
    full = demo._runner(model)
    judge = demo.Judge(args.samples, full, progress=False)
    print("| | output SQNR dB (pooled) | seconds | saved KiB | FID (95 %) |")
    print("|---|---|---|---|---|")
    rows = []
    reference = None
    if args.samples:
        row = demo.Row("full precision", sum(p.nbytes for p in model.parameters()))
        judge.judge(row, full)
        reference = row.fid
        rows.append(row)
        print(f"| full precision | | | {row.saved_bytes / 1024:.0f} | {fid(row)} |", flush=True)
    for config in recipes():
        if args.only and args.only not in config.name:
            continue
        converted, seconds = demo.quantize(model, config, judge.scheduler, progress=False)
        row = demo.Row(config.name, converted.nbytes(), seconds=seconds)
        runner = demo._runner(converted)
        if args.samples:
            with contextlib.suppress(tfmq_fx.BackendError):
                runner = demo._runner(tfmq_fx.compile(converted, "inductor"))
            judge.judge(row, runner)
        else:
            outputs = [
                demo._tensor(runner(x, t))
                for x, t in zip(judge.trajectory.inputs, judge.trajectory.timesteps, strict=True)
            ]
            found = metrics.output_sqnr(judge.trajectory.outputs, torch.stack(outputs))
            row.sqnr, row.sqnr_pooled = found.mean, found.pooled
        rows.append(row)
        print(
            f"| {row.name} | {row.sqnr:.1f} ({row.sqnr_pooled:.1f}) | {row.seconds:.0f} "
            f"| {row.saved_bytes / 1024:.0f} | {fid(row) if args.samples else ''} |",
            flush=True,
        )
    if reference is not None:
        for row in rows[1:]:
            print(f"{row.name}: FID {100 * (row.fid / reference - 1):+.1f} % of full precision")
    print(json.dumps([dataclasses.asdict(row) for row in rows]))


def fid(row: demo.Row) -> str:
    """The distance and its interval."""
    return f"{row.fid:.1f} ({row.fid_low:.1f} to {row.fid_high:.1f})"


if __name__ == "__main__":
    main()
