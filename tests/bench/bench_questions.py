"""Questions about quantizing denoisers, answered on the models that ship.

    python -m tests.bench.bench_questions ranges      one for each timestep: does it help, where?
    python -m tests.bench.bench_questions temporal    tables, caches, the block after TIAR
    python -m tests.bench.bench_questions selection   when disturbance-aware selection picks which
    python -m tests.bench.bench_questions coverage    what layers left in floating point buy
    python -m tests.bench.bench_questions bits        bits chosen layer by layer, against uniform

Each prints Markdown: output SQNR in dB over 20 DDIM steps, 64 samples on the full-precision
trajectory of a seed that no calibration uses.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import tfmq_fx
from tests.bench.bench_quality import plain, rounding, static
from tfmq_fx.conversion.sensitivity import measure
from tfmq_fx.core.config import Config, TemporalSpec
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.presets import resolve
from tfmq_fx.diagnostics.feature_errors import temporal_errors
from tfmq_fx.evaluation.benchmark import Benchmark, seeds_of
from tfmq_fx.evaluation.subjects import SUBJECTS
from tfmq_fx.quant.quant_layer import QuantLayer

SHOWN, FEW = 8, 16  # layers in a table; samples that layers are tried on alone
STEPS = (5, 20, 50, 100, 250, 1000)  # of the set, for the selection


class Asked:
    """A model, and the trajectory that answers are judged on."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.bench = Benchmark(SUBJECTS[name])
        self.calibration, sampling = seeds_of(seed)
        self.seen = self.bench.trajectory(sampling)

    def quantized(self, config: Config, **options: Any) -> Any:
        """The converted model."""
        return self.bench.quantize(config, self.calibration, **options)[0]

    def sqnr(self, model: Any) -> Any:
        """Its output SQNR."""
        return self.bench.sqnr(model, self.seen)


def ranges(asked: Asked) -> Iterator[str]:
    """Static ranges against one for each timestep, by step and by layer."""
    base = rounding(plain("w8a8"), "nearest")
    models = {"static": asked.quantized(static(base)), "per timestep": asked.quantized(base)}
    steps = asked.seen.timesteps.tolist()
    shown = [i for i in range(len(steps)) if i % 3 == len(steps[1:]) % 3]
    yield "| W8A8, nearest | mean | " + " | ".join(f"t = {steps[i]}" for i in shown) + " |"
    yield "|---" * (2 + len(shown)) + "|"
    for name, model in models.items():
        found = asked.sqnr(model)
        figures = " | ".join(f"{found.per_step[i]:.1f}" for i in shown)
        yield f"| {name} | {found.mean:.1f} | {figures} |"
    yield ""
    yield "| layer alone, noise in dB | last / first input range | static | per step |"
    yield "|---|---|---|---|"
    layers = {
        kind: {n: m for n, m in model.gm.named_modules() if isinstance(m, QuantLayer)}
        for kind, model in models.items()
    }
    both = {n: [layers["static"][n], m] for n, m in layers["per timestep"].items()}
    gm = models["per timestep"].gm
    chunks = [
        (x[:FEW], t.expand(FEW), *asked.bench.subject.conditions(FEW).values())
        for x, t in zip(asked.seen.inputs, asked.seen.timesteps, strict=True)
    ]
    found = measure(
        gm,
        reference=asked.bench.graph,
        names=list(both),
        options=lambda site, walk: both[site.name],
        chunks=chunks,
        timesteps=gm.meta["timesteps"],
    )
    gains = {
        name: (noise[0].mean(), noise[1].mean(), _spread(gm, name))
        for name, noise in found.noise.items()
        if both[name][1].per_timestep
    }
    worst = sorted(gains, key=lambda name: float(gains[name][1] - gains[name][0]))
    for name in worst[:SHOWN]:
        before, after, spread = gains[name]
        yield f"| {name} | {spread:.2f} | {_decibels(before)} | {_decibels(after)} |"
    rest = worst[SHOWN:]
    sums = [_decibels(sum(gains[name][i] for name in rest)) for i in (0, 1)]
    yield f"| the {len(rest)} others together | | {sums[0]} | {sums[1]} |"


def _spread(gm: torch.fx.GraphModule, name: str) -> float:
    """The input scale of a layer at the last step of sampling (t least) over that at the first."""
    node = next(n for n in gm.graph.find_nodes(op="call_module", target=name))
    row, (_, column) = node.args[1].args
    table = gm.get_buffer(str(row.args[0].target))
    return float(table[0, column] / table[-1, column])


def _decibels(noise: Any) -> str:
    return f"{-10 * float(torch.as_tensor(noise).log10()):.1f}"


def temporal(asked: Asked) -> Iterator[str]:
    """Every form of the temporal block, all else at W4A8 with second-order rounding."""
    yield "| temporal block | temporal error, mean | worst | output SQNR dB | last step | KiB |"
    yield "|---|---|---|---|---|---|"
    forms = {
        "exact table": TemporalSpec(mode="table"),
        "8-bit cache": TemporalSpec(mode="cache", cache_bits=(8,)),
        "4-bit cache": TemporalSpec(mode="cache", cache_bits=(4,)),
        "block without TIAR": TemporalSpec(mode="tib", tiar_iters=0),
        "block after TIAR": TemporalSpec(mode="tib"),
        "selection": TemporalSpec(mode="select"),
    }
    for what, spec in forms.items():
        model = asked.quantized(dataclasses.replace(plain("w4a8"), temporal=spec))
        _, errors = temporal_errors(asked.bench.graph, model.gm, model.timesteps)
        errors, found = errors if errors.numel() else torch.zeros(1), asked.sqnr(model)
        yield (
            f"| {what} | {float(errors.mean()):.2g} | {float(errors.max()):.2g} | "
            f"{found.mean:.1f} | {found.per_step[-1]:.1f} | {model.nbytes() / 1024:.0f} |"
        )


def selection(asked: Asked) -> Iterator[str]:
    """What is chosen for each number of timesteps, in no more bytes than the quantized block."""
    yield "| timesteps | W4: table / 8-bit cache / 4-bit cache / block | KiB of KiB | W8 | |"
    yield "|---|---|---|---|---|"
    for count in STEPS:
        cells = []
        for bits in (4, 8):
            config = rounding(plain(f"w{bits}a8"), "nearest")
            config = dataclasses.replace(config, temporal=TemporalSpec(tiar_iters=200))
            prepared = tfmq_fx.prepare(
                asked.bench.model, asked.bench.subject.example(), config=config
            )
            tfmq_fx.calibrate(
                prepared,
                (asked.bench.subject.scheduler(), asked.bench.subject.shape),
                num_inference_steps=count,
                samples=2,
                batch_size=2,
                progress=False,
                **asked.bench.subject.conditions(2),
            )
            told = tfmq_fx.convert(prepared, progress=False).record["temporal"]
            chosen = [feature["chosen"] for feature in told["features"].values()]
            forms = [chosen.count(form) for form in ("table", "cache8", "cache4", "tib")]
            taken = sum(
                feature["candidates"][feature["chosen"]]["bytes"]
                for feature in told["features"].values()
            )
            block = told["block_bytes"] / 1024
            part = " + layers" if forms[3] else ""
            cells += [" / ".join(map(str, forms)), f"{taken / 1024:.0f}{part} of {block:.0f}"]
        yield f"| {count} | {' | '.join(cells)} |"


def coverage(asked: Asked) -> Iterator[str]:
    """Layers left in floating point, at W4A8."""
    whole = LayerConfig()
    config = dataclasses.replace(plain("w4a8"), name="w4a8")
    names = list(tfmq_fx.report(asked.quantized(rounding(config, "nearest"))).data["sites"])
    first, last = names[0], names[-1]
    eight = dataclasses.replace(config, first=config.last)

    def some(*parts: str) -> dict[str, LayerConfig]:
        return {n: whole for n in names if any(part in n for part in parts)}

    rows: list[tuple[str, Config, Mapping[str, LayerConfig]]] = [
        ("all integers, first input at 8 bits", eight, {}),
        ("all integers, first input at 16 bits", config, {}),
        ("first layer in float", config, {first: whole}),
        ("first and last", config, {first: whole, last: whole}),
        ("shortcuts", config, some("shortcut")),
        ("attention's layers", config, some("to_q", "to_k", "to_v", "to_out")),
        ("feed-forward", config, some("ff.net")),
        ("all weights at 8 bits", plain("w8a8"), {}),
    ]
    yield "| | weights quantized | inputs quantized | output SQNR dB | last step | KiB |"
    yield "|---|---|---|---|---|---|"
    for what, recipe, overrides in rows:
        if what in ("shortcuts", "attention's layers", "feed-forward"):
            if not overrides:
                continue
            what = f"{what} in float ({len(overrides)})"
        model = asked.quantized(recipe, overrides=overrides)
        told, found = tfmq_fx.report(model), asked.sqnr(model)
        yield (
            f"| {what} | {100 * told.weight_coverage:.1f} % | "
            f"{100 * told.activation_coverage:.1f} % | {found.mean:.1f} | "
            f"{found.per_step[-1]:.1f} | {model.nbytes() / 1024:.0f} |"
        )


def bits(asked: Asked) -> Iterator[str]:
    """Bits layer by layer at the bytes of uniform ones, and at fewer."""
    yield "| recipe | budget | KiB | output SQNR dB | pooled | last step | by the plan | weights |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in ("best-w4a8", "w4a16"):
        uniform = asked.quantized(resolve(name))
        size = uniform.nbytes()
        yield f"| `{name}` | uniform | {_figures(asked, uniform)} | | |"
        for share in (1.0, 0.85):
            model = asked.quantized(resolve(name), budget=int(share * size))
            plan = model.bit_plan
            yield (
                f"| | {share:g} of its bytes | {_figures(asked, model)} | {plan.sqnr:.1f} | "
                f"{plan.shares()} |"
            )


def _figures(asked: Asked, model: Any) -> str:
    found = asked.sqnr(model)
    size = model.nbytes() / 1024
    return f"{size:.0f} | {found.mean:.1f} | {found.pooled:.1f} | {found.per_step[-1]:.1f}"


QUESTIONS = {
    "ranges": ranges,
    "temporal": temporal,
    "selection": selection,
    "coverage": coverage,
    "bits": bits,
}


def main() -> None:
    """Answer what the arguments ask."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=QUESTIONS)
    parser.add_argument("--model", choices=SUBJECTS, nargs="+", default=["digits", "glyphs-dit"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.model:
        print(f"\n{name}\n")
        asked = Asked(name, args.seed)
        for line in QUESTIONS[args.what](asked):
            print(line, flush=True)


if __name__ == "__main__":
    main()
