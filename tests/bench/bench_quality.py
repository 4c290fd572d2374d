"""Output SQNR pass by pass, on the digits UNet and the glyphs DiT.

    python -m tests.bench.bench_quality ablation    what each pass adds
    python -m tests.bench.bench_quality attention   attention's own products
    python -m tests.bench.bench_quality table       the cells there are, as Markdown

Recipes side by side, with images, are `tfmq-fx evaluate`. Each cell (model, settings, seed) is kept
in --out as JSON when it is done: an interrupted run goes on, and several may run side by side.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import tfmq_fx
from tfmq_fx.core.config import AttentionSpec, Config, RewriteSpec, Softmax, TemporalSpec
from tfmq_fx.core.config_json import to_dict
from tfmq_fx.core.files import write_whole
from tfmq_fx.core.layer_config import ActivationSpec
from tfmq_fx.core.presets import PRESETS, resolve
from tfmq_fx.evaluation.benchmark import Benchmark, seeds_of
from tfmq_fx.evaluation.recipes import nearest
from tfmq_fx.evaluation.subjects import SUBJECTS
from tfmq_fx.serialization.checkpoint import digest

SEEDS = (0, 1, 2)


def ablation() -> Iterator[Config]:
    """One pass at a time on top of second-order rounding with ranges per timestep."""
    for bits in ("w8a8", "w4a8", "w4a6", "w4a4"):
        base = plain(bits)

        def row(what: str, config: Config, bits: str = bits) -> Config:
            return dataclasses.replace(config, name=f"{bits}: {what}")

        yield row("nearest, static, first input at 8 bits", nearest(bits))
        yield row("nearest, static", rounding(static(base), "nearest"))
        yield row("nearest, per timestep", rounding(base, "nearest"))
        yield row("second-order", base)
        yield row("+ AdaRound 100", learnt(base, iters=100))
        yield row("+ refined codes", learnt(base, refine=3))
        yield row("+ clipped ranges", clipped(base))
        yield row("+ split concat", rewritten(base, split_concat=True))
        yield row("+ TCR", rewritten(base, tcr=10.0))
        yield row("+ smoothing", rewritten(base, smooth=0.5))
        yield row("+ rotation", rewritten(base, rotate=64))
        yield row("+ low rank 8", rewritten(base, low_rank=8))
        yield row("+ bias correction", dataclasses.replace(base, correction="bias"))
        yield row("best", resolve(f"best-{bits}"))


def attention() -> Iterator[Config]:
    """Attention's products alone, layers in float: widths and grids of the probabilities."""
    for bits, probabilities in ((8, 8), (8, 4), (6, 6), (5, 5), (4, 4)):
        for kind in get_args(Softmax):
            spec = AttentionSpec(
                activations=ActivationSpec(bits=bits),
                probabilities_bits=probabilities,
                probabilities=kind,
            )
            name = f"products {bits} / {probabilities} {kind}"
            yield Config(name=name, attention=spec, temporal=TemporalSpec(mode="table"))


def plain(bits: str) -> Config:
    """Second-order rounding, ranges per timestep, exact tables, 16 bits for the first input."""
    weights, acts = (int(part) for part in bits[1:].split("a"))
    base = PRESETS["w4a8"]

    def with_bits(layer: Any, w: int, a: int) -> Any:
        return dataclasses.replace(
            layer,
            weights=dataclasses.replace(layer.weights, bits=w),
            activations=ActivationSpec(bits=a),
        )

    return dataclasses.replace(
        base,
        layers=with_bits(base.layers, weights, acts),
        first=with_bits(base.first, 8, 16),
        last=with_bits(base.last, 8, 8),
        temporal=TemporalSpec(mode="table"),
    )


def layers(config: Config, **changes: Any) -> Config:
    """`config` with other settings of the activations of all layers but 16-bit ones."""

    def changed(layer: Any) -> Any:
        if layer is None or layer.activations is None or layer.activations.bits > 8:
            return layer
        return dataclasses.replace(
            layer, activations=dataclasses.replace(layer.activations, **changes)
        )

    return dataclasses.replace(
        config,
        layers=changed(config.layers),
        first=changed(config.first),
        last=changed(config.last),
    )


def static(config: Config) -> Config:
    """One input range for each layer."""
    return layers(config, per_timestep=False)


def clipped(config: Config) -> Config:
    """Ranges that lose least squared error."""
    return layers(config, ranges="mse")


def learnt(config: Config, **changes: Any) -> Config:
    """Other settings of rounding."""
    spec = dataclasses.replace(config.reconstruction, **changes)
    return dataclasses.replace(config, reconstruction=spec)


def rounding(config: Config, kind: str) -> Config:
    """Another rounding."""
    return learnt(config, rounding=kind)


def rewritten(config: Config, **changes: Any) -> Config:
    """Exact rewrites in front."""
    return dataclasses.replace(config, rewrites=RewriteSpec(**changes))


KINDS: dict[str, Callable[[], Iterator[Config]]] = {"ablation": ablation, "attention": attention}


def cell_path(out: Path, subject: str, config: Config, seed: int) -> Path:
    """Where the cell is kept: by what it is of, not by the order of runs."""
    key = digest([subject, to_dict(config), seed, tfmq_fx.__version__])[:16]
    return out / f"{key}.json"


def run(out: Path, subject: str, configs: list[Config], seeds: tuple[int, ...]) -> None:
    """Compute the cells that are missing; a failed one is kept as such, with its error."""
    bench = Benchmark(SUBJECTS[subject])
    trajectory = functools.cache(bench.trajectory)
    for seed in seeds:
        calibration, sampling = seeds_of(seed)
        for config in configs:
            path = cell_path(out, subject, config, seed)
            if path.exists():
                continue
            cell: dict[str, Any] = {"subject": subject, "recipe": config.name, "seed": seed}
            try:
                converted, cell["seconds"] = bench.quantize(config, calibration)
                found = bench.sqnr(converted, trajectory(sampling))
                told = tfmq_fx.report(converted)
                cell |= {
                    "sqnr": found.mean,
                    "pooled": found.pooled,
                    "last": found.per_step[-1],
                    "bytes": converted.nbytes(),
                    "weights": told.weight_coverage,
                    "inputs": told.activation_coverage,
                }
            except tfmq_fx.TfmqError as error:
                cell["error"] = str(error)
            write_whole(path, json.dumps(cell, indent=1))
            print(line(cell), flush=True)


def line(cell: dict[str, Any]) -> str:
    """A cell in one line."""
    figures = cell.get("error") or (
        f"{cell['sqnr']:.2f} dB ({cell['pooled']:.2f} pooled, {cell['last']:.1f} at the last "
        f"step), {cell['seconds']:.0f} s, {cell['bytes'] / 1024:.0f} KiB"
    )
    return f"{cell['subject']} {cell['recipe']} seed {cell['seed']}: {figures}"


def table(out: Path) -> str:
    """All cells as Markdown: mean output SQNR and, over seeds, its spread."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(out.glob("*.json")):
        cell = json.loads(path.read_text())
        rows.setdefault((cell["subject"], cell["recipe"]), []).append(cell)
    lines = ["| model | recipe | output SQNR dB | pooled | last step | seconds | KiB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for (subject, recipe), cells in sorted(rows.items()):
        done = [c for c in cells if "sqnr" in c]
        if not done:
            lines.append(f"| {subject} | {recipe} | failed: {cells[0]['error']} |||||")
            continue

        def mean(key: str, done: list[dict[str, Any]] = done) -> float:
            return statistics.fmean(c[key] for c in done)

        values = [c["sqnr"] for c in done]
        spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
        lines.append(
            f"| {subject} | {recipe} | {mean('sqnr'):.1f}{spread} | {mean('pooled'):.1f} "
            f"| {mean('last'):.1f} | {mean('seconds'):.0f} | {mean('bytes') / 1024:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=(*KINDS, "table"))
    default = ["digits", "glyphs-dit"]
    parser.add_argument("--subject", choices=SUBJECTS, nargs="+", default=default)
    parser.add_argument("--out", type=Path, default=Path("bench-quality"))
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "table":
        print(table(args.out))
        return
    for subject in args.subject:
        configs = [c for c in KINDS[args.what]() if args.only in c.name]
        run(args.out, subject, configs, tuple(args.seeds))


if __name__ == "__main__":
    main()
