"""The main job end to end: quantize the digits model four ways, sample, compare, draw."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import api, artifact, backends, digits, metrics
from .capture import capture
from .charts import draw_curves, draw_grid
from .config import ActivationSpec, Config, LayerConfig, WeightSpec
from .errors import BackendError
from .feature_errors import temporal_errors
from .files import write_whole
from .modules import Converted, Prepared
from .presets import PRESETS
from .processes import rank
from .report import report

STEPS = 20  # DDIM steps
PAIRS = 64  # seeds for output SQNR and for same-seed PSNR
BATCH = 64  # one size throughout: another would compile again
CALIBRATION_SEED, SAMPLE_SEED, PAIR_SEED = 1000, 0, 5  # calibration never sees what is judged


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the table. compiled: whether it runs through torch.compile where that works."""

    name: str
    config: Config
    compiled: bool


@dataclass(slots=True)
class Row:
    """Figures of one variant; None where it does not apply."""

    name: str
    saved_bytes: int
    weights: float = 1.0
    activations: float = 0.0
    feature_mean: float = 0.0
    feature_worst: float = 0.0
    sqnr: float = float("inf")
    sqnr_pooled: float = float("inf")
    psnr: float = float("inf")
    fid: float = 0.0
    fid_low: float = 0.0
    fid_high: float = 0.0
    confident: float = 0.0
    seconds: float = 0.0
    ms: float | None = None
    backend: str = "eager"
    feature_by_step: list[float] = field(default_factory=list)
    sqnr_by_step: list[float] = field(default_factory=list)


def nearest_static() -> Config:
    """W4A8 as a plain post-training quantizer does it: nearest rounding of every layer, time
    embedding included, and one static range per layer."""
    acts = ActivationSpec(bits=8, per_timestep=False)
    recipe = PRESETS["w4a8"]
    return dataclasses.replace(
        recipe,
        name="w4a8 nearest",
        layers=LayerConfig(weights=WeightSpec(bits=4), activations=acts),
        first=LayerConfig(
            weights=WeightSpec(bits=8), activations=ActivationSpec(bits=16, per_timestep=False)
        ),
        last=LayerConfig(weights=WeightSpec(bits=8), activations=acts),
        temporal=dataclasses.replace(recipe.temporal, mode="tib", tiar_iters=0),
        reconstruction=dataclasses.replace(recipe.reconstruction, rounding="nearest", iters=0),
    )


def everything() -> Config:
    """W4A8 with every pass on, block reconstruction on top of second-order rounding too."""
    recipe = PRESETS["w4a8"]
    learnt = dataclasses.replace(recipe.reconstruction, iters=60)
    return dataclasses.replace(recipe, name="w4a8 everything", reconstruction=learnt)


def variants() -> list[Variant]:
    """What the demo compares."""
    return [
        Variant("tables only", PRESETS["fp"], compiled=False),
        Variant("W8A8", PRESETS["w8a8"], compiled=True),
        Variant("W4A8 nearest", nearest_static(), compiled=False),
        Variant("W4A8 everything", everything(), compiled=True),
    ]


class Judge:
    """Full-precision references and the figures taken against them."""

    def __init__(self, samples: int, runner: Callable[[Tensor, Tensor], Any], progress: bool):
        self.samples, self.progress = samples, progress
        self.scheduler: Any = digits.make_scheduler()
        self.classifier = digits.load_classifier()
        with torch.no_grad():
            self.real = self.classifier.features(digits.load_images("train")[0])
        self.pairs, self.trajectory = metrics.sample(
            runner,
            self.scheduler,
            (PAIRS, 1, digits.IMAGE_SIZE, digits.IMAGE_SIZE),
            num_inference_steps=STEPS,
            seed=PAIR_SEED,
            batch_size=BATCH,
            parallel=True,
            record=True,
        )

    @torch.no_grad()
    def judge(self, row: Row, runner: Callable[[Tensor, Tensor], Any]) -> Tensor:
        """Fill in the row's figures; returns the images of the paired seeds."""
        outputs = [
            _tensor(runner(x, t))
            for x, t in zip(self.trajectory.inputs, self.trajectory.timesteps, strict=True)
        ]
        found = metrics.output_sqnr(self.trajectory.outputs, torch.stack(outputs))
        row.sqnr, row.sqnr_pooled = found.mean, found.pooled
        row.sqnr_by_step = list(found.per_step)
        images = self.draw(runner, PAIRS, PAIR_SEED, progress=False)
        row.psnr = float(metrics.psnr(self.pairs, images).mean())
        self.judge_images(row, runner)
        return images

    @torch.no_grad()
    def judge_images(self, row: Row, runner: Callable[[Tensor, Tensor], Any]) -> None:
        """Fill in the figures that need no full precision to compare with."""
        drawn = self.draw(runner, self.samples, SAMPLE_SEED, progress=self.progress)
        features = self.classifier.features(drawn)
        row.fid = metrics.frechet_distance(features, self.real)
        generator = torch.Generator().manual_seed(0)
        row.fid_low, row.fid_high = metrics.bootstrap_interval(
            features, self.real, generator=generator
        )
        row.confident = metrics.confident_share(self.classifier(drawn))

    def draw(
        self, runner: Callable[[Tensor, Tensor], Any], count: int, seed: int, *, progress: bool
    ) -> Tensor:
        """Images sampled with `runner`."""
        return metrics.sample(
            runner,
            self.scheduler,
            (count, 1, digits.IMAGE_SIZE, digits.IMAGE_SIZE),
            num_inference_steps=STEPS,
            seed=seed,
            batch_size=BATCH,
            parallel=True,
            progress=progress,
        )


def run(
    out: Path, *, samples: int = 512, progress: bool = True, say: Callable[[str], None] = print
) -> list[Row]:
    """Quantize the digits model four ways, write the table and two pictures to `out`.

    samples: images drawn for each FID.  say: where lines of text go.
    Of many processes all call this; they share the work, and the first one writes.
    """
    out.mkdir(parents=True, exist_ok=True)
    first = rank() == 0
    say = say if first else lambda _: None
    started = time.perf_counter()
    model: Any = digits.load_unet()
    compiles, reason = True, ""
    try:
        backends.backend("inductor")
    except BackendError as error:
        compiles, reason = False, str(error)
        say(f"Running eager: {reason}")
    say(f"Full precision: {sum(p.numel() for p in model.parameters()):,} parameters")
    full = torch.compile(model) if compiles else model
    judge = Judge(samples, _runner(full), progress)
    base = Row("full precision", sum(p.nbytes for p in model.parameters()))
    base.backend = "inductor" if compiles else "eager"
    pictures = {base.name: judge.pairs}  # which it is compared with: exact
    judge.judge_images(base, _runner(full))
    base.ms = milliseconds(_runner(full))
    rows = [base]
    curves: dict[str, list[float]] = {}
    example = {"sample": torch.randn(2, 1, 16, 16), "timestep": torch.tensor([1, 1])}
    reference = capture(model, example, timestep="timestep").gm
    for variant in variants():
        say(f"\n{variant.name}: quantizing")
        converted, seconds = quantize(model, variant.config, judge.scheduler, progress)
        api.save(converted, out / variant.name.replace(" ", "-").lower())
        size = artifact.saved_bytes(out / variant.name.replace(" ", "-").lower())
        row = Row(variant.name, size, seconds=seconds)
        facts = report(converted)
        row.weights, row.activations = facts.weight_coverage, facts.activation_coverage
        assert converted.timesteps is not None
        _, errors = temporal_errors(reference, converted.gm, converted.timesteps)
        row.feature_mean, row.feature_worst = float(errors.mean()), float(errors.max())
        row.feature_by_step = errors.mean(0).tolist()
        curves[variant.name] = row.feature_by_step
        runner: nn.Module = converted
        if variant.compiled and compiles:
            compiled = api.compile(converted, "inductor")
            runner, row.backend = compiled, compiled.backend
            say(f"{variant.name}: compiling, {compiled.lowered} layers as int8")
        pictures[variant.name] = judge.judge(row, _runner(runner))
        if variant.compiled and compiles:
            row.ms = milliseconds(_runner(runner))
        rows.append(row)
        say(line(row))
    keys = judge.scheduler.timesteps.flip(0).tolist()
    curves |= block_curves(model, reference, judge.scheduler, progress)
    grid, plot = out / "samples.png", out / "temporal-error.png"
    if first:
        draw_grid(pictures, grid)
        draw_curves(keys, curves, plot)
        write_json(out / "table.json", [dataclasses.asdict(row) for row in rows])
    say("\n" + table(rows))
    say(f"\n{samples} samples, {STEPS} DDIM steps; ms per call at batch {BATCH}.")
    say(f"Samples, same seeds side by side: {grid}")
    say(f"Temporal-feature error by timestep: {plot}")
    say(f"Saved models and table.json: {out}")
    say(f"Took {(time.perf_counter() - started) / 60:.1f} minutes.")
    return rows


def quantize(
    model: nn.Module, config: Config, scheduler: Any, progress: bool
) -> tuple[Converted, float]:
    """The converted model, and the seconds from prepare to convert."""
    start = time.perf_counter()
    converted = api.convert(calibrated(model, config, scheduler, progress), progress=progress)
    return converted, time.perf_counter() - start


def calibrated(model: nn.Module, config: Config, scheduler: Any, progress: bool) -> Prepared:
    """The model prepared for `config`, with its ranges."""
    prepared = api.prepare(model, config=config)
    shape = (1, digits.IMAGE_SIZE, digits.IMAGE_SIZE)
    api.calibrate(
        prepared,
        (scheduler, shape),
        num_inference_steps=STEPS,
        samples=64,
        batch_size=64,
        seed=CALIBRATION_SEED,
        progress=progress,
    )
    return prepared


def block_curves(
    model: nn.Module, reference: fx.GraphModule, scheduler: Any, progress: bool
) -> dict[str, list[float]]:
    """Temporal feature error by timestep of the forms that the four variants did not choose.

    reference: the captured model. All forms are made from one calibration, of the same layers."""
    temporal = PRESETS["w4a8"].temporal
    nearest = PRESETS["w4a8"].reconstruction
    plain = dataclasses.replace(nearest, rounding="nearest", iters=0)
    forms = {
        "W4 block after TIAR": dataclasses.replace(temporal, mode="tib"),
        "int8 cache": dataclasses.replace(temporal, mode="cache", cache_bits=(8,)),
        "int4 cache": dataclasses.replace(temporal, mode="cache", cache_bits=(4,)),
    }
    config = dataclasses.replace(PRESETS["w4a8"], reconstruction=plain)
    prepared = calibrated(model, config, scheduler, progress)
    curves = {}
    for name, form in forms.items():
        prepared.recipe = dataclasses.replace(config, temporal=form)
        converted = api.convert(prepared, progress=progress)
        assert converted.timesteps is not None
        _, errors = temporal_errors(reference, converted.gm, converted.timesteps)
        curves[name] = errors.mean(0).tolist()
    return curves


@torch.no_grad()
def milliseconds(runner: Callable[[Tensor, Tensor], Any], *, repeats: int = 10) -> float:
    """Median time of one call at batch 64, after a warm-up."""
    x = torch.randn(BATCH, 1, digits.IMAGE_SIZE, digits.IMAGE_SIZE)
    t = torch.tensor(0)
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        runner(x, t)
        if i >= 2:
            times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[len(times) // 2]


def _runner(model: Any) -> Callable[[Tensor, Tensor], Any]:
    def call(x: Tensor, t: Tensor) -> Any:
        with torch.no_grad():
            return model(x, t.expand(len(x)))

    return call


def _tensor(answer: Any) -> Tensor:
    found = getattr(answer, "sample", answer)
    assert isinstance(found, Tensor)
    return found


def line(row: Row) -> str:
    """A row in one line of prose, printed as soon as it is known."""
    return (
        f"{row.name}: {row.saved_bytes / 1024:.0f} KiB, output SQNR {row.sqnr:.1f} dB, "
        f"FID {row.fid:.1f}, quantized in {row.seconds:.0f} s"
    )


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    head = (
        "| | saved KiB | weights / inputs quantized | temporal error mean / worst "
        "| output SQNR dB (pooled) | PSNR dB | FID (95 %) | confident | quantize s | ms per call |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        quantized = f"{100 * row.weights:.0f} % / {100 * row.activations:.0f} %"
        exact = row.sqnr == float("inf")
        lines.append(
            f"| {row.name} | {row.saved_bytes / 1024:.0f} "
            f"| {'none' if row.name == 'full precision' else quantized} "
            f"| {row.feature_mean:.4f} / {row.feature_worst:.4f} "
            f"| {'exact' if exact else f'{row.sqnr:.1f} ({row.sqnr_pooled:.1f})'} "
            f"| {'exact' if row.psnr == float('inf') else f'{row.psnr:.1f}'} "
            f"| {row.fid:.1f} ({row.fid_low:.1f} to {row.fid_high:.1f}) "
            f"| {100 * row.confident:.1f} % | {row.seconds:.0f} "
            f"| {'' if row.ms is None else f'{row.ms:.0f}'} |"
        )
    return "\n".join(lines)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON. The file appears complete."""
    write_whole(path, json.dumps(data, indent=1))
