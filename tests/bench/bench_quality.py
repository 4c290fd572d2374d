"""Image quality by recipe and bits, on the digits UNet and the glyphs DiT.

    python -m tests.bench.bench_quality recipes     the papers' recipes and ours, 3 seeds
    python -m tests.bench.bench_quality ablation    what each pass adds
    python -m tests.bench.bench_quality attention   attention's own products
    python -m tests.bench.bench_quality pictures    samples at few bits, side by side
    python -m tests.bench.bench_quality table       the cells there are, as Markdown

Each cell (model, recipe, seed) is kept in --out as JSON when it is done, so that an interrupted run
goes on and several may run side by side. --iters caps the learning steps of recipes that
learn (the papers' 20,000 a block take hours here); the cells say which cap they ran under.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

import tfmq_fx
from tfmq_fx import demo, digits, glyphs, metrics
from tfmq_fx.config import (
    ActivationSpec,
    AttentionSpec,
    Config,
    RewriteSpec,
    Softmax,
    TemporalSpec,
    to_dict,
)
from tfmq_fx.presets import PRESETS, resolve

STEPS = demo.STEPS
BITS = ("w8a8", "w4a8", "w6a6", "w4a6", "w4a4")
SEEDS = (0, 1, 2)
JUDGED = 999  # seed of the trajectory that everything is judged on


@dataclass(frozen=True)
class Subject:
    """A trained model, how it is sampled, and the classifier that judges its samples.

    classes: whether a class label is an input; samples are then asked for in turn.
    """

    name: str
    load: Callable[[], Any]
    scheduler: Callable[[], Any]
    classifier: Callable[[], Any]
    shape: tuple[int, ...]
    classes: bool

    def conditions(self, samples: int) -> dict[str, Tensor]:
        """The further inputs of `samples` samples."""
        return {"class_labels": torch.arange(samples) % digits.CLASSES} if self.classes else {}


SUBJECTS = {
    "digits": Subject(
        "digits",
        digits.load_unet,
        digits.make_scheduler,
        digits.load_classifier,
        (1, digits.IMAGE_SIZE, digits.IMAGE_SIZE),
        classes=False,
    ),
    "glyphs": Subject(
        "glyphs",
        glyphs.load_dit,
        glyphs.make_scheduler,
        glyphs.load_classifier,
        (3, glyphs.IMAGE_SIZE, glyphs.IMAGE_SIZE),
        classes=True,
    ),
}


def called(model: Any) -> Callable[..., Any]:
    """`model` as a function of a sample, one timestep for all, and conditions by name."""

    def call(x: Tensor, t: Tensor, **conditions: Tensor) -> Any:
        with torch.no_grad():
            return model(x, t.expand(len(x)), **conditions)

    return call


class Bench:
    """One subject with its full-precision trajectory of 64 samples."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.model = subject.load()
        self.labels = subject.conditions(demo.PAIRS)
        _, self.trajectory = self.sample(called(self.model), record=True)

    def sample(self, runner: Callable[..., Any], *, record: bool = False) -> Any:
        """64 samples, by the seed that nothing is calibrated with."""
        return metrics.sample(
            runner,
            self.subject.scheduler(),
            (demo.PAIRS, *self.subject.shape),
            num_inference_steps=STEPS,
            seed=JUDGED,
            batch_size=demo.BATCH,
            conditions=self.labels,
            record=record,  # type: ignore[call-overload]
        )

    def quantize(self, config: Config, seed: int) -> tuple[Any, float]:
        """The converted model and the seconds from prepare to convert."""
        start = time.perf_counter()
        spec = dataclasses.replace(config.reconstruction, seed=seed)
        config = dataclasses.replace(config, reconstruction=spec)
        x = torch.randn(2, *self.subject.shape)
        example = {"timestep": torch.tensor([1, 1]), **self.subject.conditions(2)}
        name = "hidden_states" if self.subject.classes else "sample"
        prepared = tfmq_fx.prepare(self.model, {name: x, **example}, config=config)
        tfmq_fx.calibrate(
            prepared,
            (self.subject.scheduler(), self.subject.shape),
            num_inference_steps=STEPS,
            samples=64,
            batch_size=64,
            seed=seed,
            progress=False,
            **self.subject.conditions(64),
        )
        converted = tfmq_fx.convert(prepared, progress=False)
        return converted, time.perf_counter() - start

    def sqnr(self, converted: Any) -> metrics.OutputSqnr:
        """Output SQNR on the full-precision trajectory."""
        run, seen = called(converted), self.trajectory
        outputs = [
            demo._tensor(run(x, t, **self.labels))
            for x, t in zip(seen.inputs, seen.timesteps, strict=True)
        ]
        return metrics.output_sqnr(seen.outputs, torch.stack(outputs))


def capped(config: Config, iters: int) -> Config:
    """`config` with no more than `iters` learning steps a block.

    Fewer steps go with the step size and the weight of the rounding term that suit them, which are
    this package's defaults; the released ones need all 20,000 to decide the roundings.
    """
    spec, default = config.reconstruction, PRESETS["w4a8"].reconstruction
    if max(spec.iters, config.temporal.tiar_iters) <= iters:
        return config
    rounds = min(spec.round_iters, max(iters // 4, 1)) if spec.rounds else 0
    spec = dataclasses.replace(
        spec,
        iters=min(spec.iters, iters),
        round_iters=rounds,
        learning_rate=default.learning_rate,
        samples=min(spec.samples, 1280),
    )
    tiar = min(config.temporal.tiar_iters, 1000)
    temporal = dataclasses.replace(config.temporal, tiar_iters=tiar)
    return dataclasses.replace(config, reconstruction=spec, temporal=temporal)


def nearest(bits: str) -> Config:
    """Nearest rounding and one static range for every layer, 8 bits for what enters the first."""
    base = resolve(f"brecq-{bits}")
    spec = dataclasses.replace(base.reconstruction, iters=0)
    return dataclasses.replace(base, name=f"nearest-{bits}", reconstruction=spec)


def recipes() -> Iterator[Config]:
    """Every recipe at every width."""
    for bits in BITS:
        yield nearest(bits)
        for name in ("brecq", "q-diffusion", "ptq4dm", "ptqd", "tfmq", "tfmq-cache", "tcaq"):
            yield resolve(f"{name}-{bits}")
        yield resolve(f"best-{bits}")


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
    for bits, probabilities in ((8, 8), (8, 4), (4, 4)):
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


KINDS: dict[str, Callable[[], Iterator[Config]]] = {
    "recipes": recipes,
    "ablation": ablation,
    "attention": attention,
}


def cell_path(out: Path, subject: str, config: Config, seed: int) -> Path:
    """Where the cell is kept: by what it is of, not by the order of runs."""
    text = json.dumps([subject, to_dict(config), seed, tfmq_fx.__version__], sort_keys=True)
    return out / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def run(out: Path, subject: str, configs: list[Config], seeds: tuple[int, ...]) -> None:
    """Compute the cells that are missing; a failed one is kept as such, with its error."""
    bench = Bench(SUBJECTS[subject])
    for seed in seeds:
        for config in configs:
            path = cell_path(out, subject, config, seed)
            if path.exists():
                continue
            cell: dict[str, Any] = {"subject": subject, "recipe": config.name, "seed": seed}
            cell["iters"] = config.reconstruction.iters
            try:
                converted, cell["seconds"] = bench.quantize(config, seed)
                found = bench.sqnr(converted)
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
            demo.write_json(path, cell)
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
    rows: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for path in sorted(out.glob("*.json")):
        cell = json.loads(path.read_text())
        rows.setdefault((cell["subject"], cell["recipe"], cell["iters"]), []).append(cell)
    lines = ["| model | recipe | steps | output SQNR dB | pooled | last step | seconds | KiB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for (subject, recipe, iters), cells in sorted(rows.items()):
        done = [c for c in cells if "sqnr" in c]
        if not done:
            lines.append(f"| {subject} | {recipe} | {iters} | failed: {cells[0]['error']} ||||")
            continue

        def mean(key: str, done: list[dict[str, Any]] = done) -> float:
            return statistics.fmean(c[key] for c in done)

        values = [c["sqnr"] for c in done]
        spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
        lines.append(
            f"| {subject} | {recipe} | {iters} | {mean('sqnr'):.1f}{spread} | {mean('pooled'):.1f} "
            f"| {mean('last'):.1f} | {mean('seconds'):.0f} | {mean('bytes') / 1024:.0f} |"
        )
    return "\n".join(lines)


@torch.no_grad()
def pictures(out: Path, subject: str) -> None:
    """A PNG of the same seeds by recipe, and what the classifier makes of 64 of them."""
    bench = Bench(SUBJECTS[subject])
    classifier = SUBJECTS[subject].classifier()
    configs = [nearest("w4a4"), resolve("best-w4a4"), nearest("w4a8"), resolve("best")]
    runners = {"full precision": called(bench.model)}
    runners |= {c.name: called(bench.quantize(c, 0)[0]) for c in configs}
    images = {name: bench.sample(runner) for name, runner in runners.items()}
    for name, drawn in images.items():
        logits = classifier(drawn.clamp(-1, 1))
        told = [f"{100 * metrics.confident_share(logits):.0f} % confident"]
        if bench.labels:
            hits = logits.argmax(1) == bench.labels["class_labels"]
            told.append(f"{100 * float(hits.float().mean()):.0f} % of the class asked for")
        same = float(metrics.psnr(images["full precision"], drawn).mean())
        told.append(f"same-seed PSNR {same:.1f} dB")
        print(f"{subject} {name}: {', '.join(told)}", flush=True)
    demo.draw_grid(images, out / f"{subject}.png")


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=(*KINDS, "pictures", "table"))
    parser.add_argument("--subject", choices=SUBJECTS, nargs="+", default=list(SUBJECTS))
    parser.add_argument("--out", type=Path, default=Path("bench-quality"))
    parser.add_argument("--only", default="", help="recipes whose name contains this")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--iters", type=int, default=20_000, help="most learning steps a block")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "table":
        print(table(args.out))
        return
    for subject in args.subject:
        if args.what == "pictures":
            pictures(args.out, subject)
            continue
        made = KINDS[args.what]()
        configs = [capped(c, args.iters) for c in made if args.only in c.name]
        run(args.out, subject, configs, tuple(args.seeds))


if __name__ == "__main__":
    main()
