"""Quantize the digits model four ways, sample from each, compare, draw."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from tfmq_fx import api
from tfmq_fx.core.config import Config
from tfmq_fx.core.distributed import rank
from tfmq_fx.core.presets import PRESETS
from tfmq_fx.diagnostics.feature_errors import temporal_errors

from .benchmark import BATCH, STEPS, Benchmark, QualityMeter, whole_batches
from .evaluate import result_line
from .image_quality import Figures, extract_features
from .output_files import make_folder, table_facts, write_tables
from .plots import draw_curves, draw_grid
from .recipes import nearest
from .result_store import DONE, FULL_PRECISION, machine
from .subjects import SUBJECTS
from .table import Row, markdown

SAMPLES = 512  # images drawn for each Frechet distance
COMPILED = ("W8A8", "W4A8 everything")


def recipes() -> list[Config]:
    """The recipes that the demo compares: exact tables alone, the preset W8A8, W4A8 as a plain
    quantizer does it, and W4A8 with every pass on, block reconstruction after second-order rounding
    too."""
    w4a8 = PRESETS["w4a8"]
    plain, learnt = nearest("w4a8"), dataclasses.replace(w4a8.reconstruction, iters=60)
    # as many images as the others calibrate with
    spec = dataclasses.replace(plain.reconstruction, samples=learnt.samples)
    return [
        dataclasses.replace(PRESETS["fp"], name="tables only"),
        dataclasses.replace(PRESETS["w8a8"], name="W8A8"),
        dataclasses.replace(plain, name="W4A8 nearest", reconstruction=spec),
        dataclasses.replace(w4a8, name="W4A8 everything", reconstruction=learnt),
    ]


def run(
    out: str | Path,
    *,
    samples: int = SAMPLES,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Quantize the digits model four ways; the rows of the table, full precision first.

    out: gets table.md, table.json, samples.png, temporal-error.png, and the models as `save` writes
    them.  samples: images drawn for each Frechet distance, rounded up to whole batches.  say:
    prints a line of text.
    Of many processes all call this; they share the work, and the first one writes.
    """
    started, subject, folder = time.perf_counter(), SUBJECTS["digits"], make_folder(out)
    first, count = rank() == 0, whole_batches(samples, BATCH)
    bench = Benchmark(subject, steps=STEPS, batch=BATCH, progress=progress)
    meter = QualityMeter(
        bench, extract_features(subject.classifier(), subject.images()), seed=0, samples=count
    )
    rows: list[Row] = []
    pictures: dict[str, Tensor] = {}
    curves: dict[str, list[float]] = {}

    def keep(name: str, figures: Figures, images: Tensor, steps: int | None) -> None:
        pictures[name] = images
        result = {
            "status": DONE,
            "figures": dataclasses.asdict(figures),
            "steps": steps,
            "machine": machine(),
            "date": time.strftime("%Y-%m-%d"),
        }
        rows.append(Row(model=subject.name, recipe=name, bits="", results={0: result}))
        if first:
            say(result_line(name, result))

    keep(FULL_PRECISION, *meter.full_precision(), None)
    for config in recipes():
        # the other models draw too few images to make up for the time of compiling
        meter.backend = "inductor" if config.name in COMPILED else "eager"
        converted, seconds = bench.quantize(config, meter.calibration_seed)
        saved = folder / config.name.replace(" ", "-").lower()
        api.save(converted, saved)
        figures, images = meter.measure(converted, seconds, saved=saved)
        curves[config.name] = figures.temporal_by_step or []
        keep(config.name, figures, images, config.reconstruction.iters)
    curves |= dict(other_forms(bench, meter.calibration_seed))
    if first:
        facts = table_facts(rows, samples=count, steps=STEPS, batch=BATCH, command="tfmq-fx demo")
        write_tables(folder, rows, facts)
        draw_grid(pictures, folder / "samples.png")
        steps = meter.trajectory.timesteps.flip(0).tolist()
        draw_curves(steps, curves, folder / "temporal-error.png")
        say(f"\n{markdown(rows, facts)}")
        say(f"Tables, models, samples.png and temporal-error.png: {folder}")
        say(f"Took {(time.perf_counter() - started) / 60:.1f} minutes.")
    return rows


def other_forms(bench: Benchmark, seed: int) -> Iterator[tuple[str, list[float]]]:
    """The error of temporal features by timestep in forms that none of the recipes chooses, by
    name; one calibration serves all."""
    recipe = PRESETS["w4a8"]
    plain = dataclasses.replace(recipe.reconstruction, rounding="nearest", iters=0)
    prepared = bench.calibrated(dataclasses.replace(recipe, reconstruction=plain), seed)
    original = prepared.recipe
    for name, form in {
        "W4 block after TIAR": dataclasses.replace(recipe.temporal, mode="tib"),
        "int8 cache": dataclasses.replace(recipe.temporal, mode="cache", cache_bits=(8,)),
        "int4 cache": dataclasses.replace(recipe.temporal, mode="cache", cache_bits=(4,)),
    }.items():
        prepared.recipe = dataclasses.replace(original, temporal=form)
        converted = api.convert(prepared, progress=bench.progress)
        assert converted.timesteps is not None
        _, errors = temporal_errors(bench.graph, converted.gm, converted.timesteps)
        yield name, errors.mean(0).tolist()
