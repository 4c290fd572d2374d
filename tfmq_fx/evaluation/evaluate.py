"""Compare recipes on the shipped models: every figure, over seeds, with what it cost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tfmq_fx.core.arguments import check_many, check_whole, path_of
from tfmq_fx.core.config import Config
from tfmq_fx.core.distributed import alone, exchange, from_first, rank, shard_indices, together
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.inference import outside_inference_mode

from .benchmark import BATCH, STEPS, Benchmark, QualityMeter, whole_batches
from .image_quality import extract_features
from .output_files import make_folder, write_files
from .recipes import FEW, Baseline, baselines
from .result_store import DONE, FAILED, FULL_PRECISION, Cell, Cells
from .run_cell import compute_cell
from .subjects import Subject, contents, find_subjects
from .table import Row

SAMPLES, SEEDS = 5000, (0, 1, 2)
BACKENDS = ("inductor", "eager")
SMALL: dict[str, Any] = {
    "models": ["digits"],
    "recipes": ["nearest", "tfmq", "best"],
    "bits": ["w4a8"],
    "samples": 1000,
    "seeds": [0],
}
"""Arguments for a table within minutes."""


@outside_inference_mode
def evaluate(
    models: Iterable[str | Subject] | None = None,
    recipes: Iterable[str | Config] | None = None,
    bits: Sequence[str] | None = None,
    *,
    out: str | Path,
    samples: int = SAMPLES,
    seeds: Sequence[int] = SEEDS,
    steps: int = STEPS,
    learning: str | int = FEW,
    backend: str = "inductor",
    device: str = "cpu",
    batch: int = BATCH,
    compute: bool = True,
    retry: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
    command: str = "tfmq_fx.evaluation.evaluate.evaluate",
) -> list[Row]:
    """Quantize, sample and measure: a row for each model and recipe, full precision first.

    models: names of `subjects.SUBJECTS`, or Subjects; None is all.  recipes: names of
    `recipes.NAMES`, each at all `bits` ("w4a8"; None is all of `recipes.BITS`), or Configs;
    None is all.
    samples: images for each Frechet distance, rounded up to whole batches.  seeds: each stands for
    one seed of calibration and one of sampling.  steps: of DDIM.
    learning: for recipes that learn by gradient steps, the most steps a block, or "published",
    which leaves them as they are.
    backend: what samples, "inductor" (eager where that fails, and the result says so) or "eager".
    device: "cpu" or "cuda".  batch: images at a time; one batch is also paired for the grids.
    out: gets cells/, table.md, table.json and grid-MODEL.png. Results that are there are not
    computed again, failed ones only with `retry`; compute=False computes nothing.  say: prints a
    line of text.  command: stated in the table.

    Of many processes (`torchrun`) each computes whole results, every n-th; the files are shared.
    A recipe that fails is a row with its error. An interrupted run writes the tables of what there
    is. Raises ConfigError for arguments that cannot be used, ImportError without what
    `pip install "tfmq_fx[demo,evaluate]"` brings.
    """
    check_many(models, "models", "names")
    check_many(recipes, "recipes", "names")
    check_many(bits, "bits", "widths")
    check_many(seeds, "seeds", "numbers")
    out = path_of(out, "out")
    subjects, chosen = find_subjects(models), baselines(recipes, bits, learning)
    _check(samples, seeds, steps, batch, backend, device)
    folder = make_folder(out)
    whole = whole_batches(samples, batch)
    if whole != samples:
        say(f"{samples} samples are rounded up to {whole}, whole batches of {batch}")
    cells = Cells(folder / "cells")
    usual = {"samples": whole, "steps": steps, "batch": batch, "backend": backend, "device": device}
    planned = [cell for s in subjects for cell in plan(s, chosen, seeds=seeds, **usual)]
    try:
        if compute:
            _compute_missing(subjects, planned, cells, retry=retry, progress=progress, say=say)
    finally:
        rows = gather(planned, cells)
        if rank() == 0:
            write_files(folder, rows, planned, cells, command)
    exchange(None, "tables")
    return rows


def plan(
    subject: Subject, chosen: Sequence[Baseline], *, seeds: Sequence[int], **usual: Any
) -> list[Cell]:
    """The cells of a model in the order of the table, seed by seed; each is independent of the
    others. usual: the other fields of a Cell, the same for all."""
    weights = contents(subject.load(), subject.classifier())
    recipes: list[tuple[str, str, Config | None]] = [(FULL_PRECISION, "", None)]
    recipes += [(baseline.name, baseline.bits, baseline.config) for baseline in chosen]
    return [
        Cell(
            model=subject.name,
            recipe=name,
            bits=bits,
            config=config,
            contents=weights,
            reference=subject.reference,
            seed=seed,
            **usual,
        )
        for seed in seeds
        for name, bits, config in recipes
    ]


def _compute_missing(
    subjects: Sequence[Subject],
    planned: Sequence[Cell],
    cells: Cells,
    *,
    retry: bool,
    progress: bool,
    say: Callable[[str], None],
) -> None:
    """Compute the cells that have no result, each process its share, and keep each as soon as it is
    done. Cells that another run has finished meanwhile are left out."""

    def missing(cell: Cell) -> bool:
        result = cells.read(cell)
        return result is None or (retry and result["status"] == FAILED)

    with together("evaluation"):
        places = from_first([i for i, cell in enumerate(planned) if missing(cell)], "cells")
        todo = [planned[places[i]] for i in shard_indices(len(places))]
        bar = tqdm(total=len(todo), disable=not progress, file=sys.stderr, leave=False)
        with alone(), bar:
            for subject in subjects:
                own = [cell for cell in todo if cell.model == subject.name]
                for cell, meter in _meters(subject, own):
                    if missing(cell):
                        bar.set_description(cell.title)
                        result, images = compute_cell(cell, meter)
                        cells.write(cell, result, images)
                        with tqdm.external_write_mode(file=sys.stderr):
                            say(result_line(cell.title, result))
                    bar.update()


def _meters(subject: Subject, todo: Sequence[Cell]) -> Iterator[tuple[Cell, QualityMeter]]:
    """Each cell of a model, seed by seed, with the meter of its seed."""
    if not todo:
        return
    first = todo[0]
    bench = Benchmark(subject, steps=first.steps, batch=first.batch, device=first.device)
    real = extract_features(subject.classifier(), subject.images())
    for seed in dict.fromkeys(cell.seed for cell in todo):
        meter = QualityMeter(bench, real, seed=seed, samples=first.samples, backend=first.backend)
        yield from ((cell, meter) for cell in todo if cell.seed == seed)


def gather(planned: Sequence[Cell], cells: Cells) -> list[Row]:
    """A row for each model, recipe and width, whatever became of its cells."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in planned:
        groups.setdefault((cell.model, cell.recipe, cell.bits), []).append(cell)
    return [
        Row(
            model=model,
            recipe=recipe,
            bits=bits,
            results={cell.seed: cells.read(cell) for cell in group},
        )
        for (model, recipe, bits), group in groups.items()
    ]


def result_line(title: str, result: Mapping[str, Any]) -> str:
    """A result in one line that begins with `title`."""
    if result["status"] != DONE:
        return f"{title}: failed: {result['error']}"
    figures = result["figures"]
    parts = [f"FID {figures['images']['fid']:.2f}"]
    if figures["sqnr"] is not None:
        parts.append(f"output SQNR {figures['sqnr']:.1f} dB")
        parts.append(f"PSNR {figures['pairs']['psnr']:.1f} dB")
        parts.append(f"quantized in {figures['quantize_seconds']:.0f} s")
    parts.append(f"compiled in {figures['compile_seconds']:.0f} s")
    parts.append(f"sampled in {figures['sample_seconds']:.0f} s ({figures['backend']})")
    return f"{title}: {', '.join(parts)}"


def _check(
    samples: int, seeds: Sequence[int], steps: int, batch: int, backend: str, device: str
) -> None:
    """Raise ConfigError for arguments that cannot be used."""
    check_whole(samples, "samples", 2)
    check_whole(steps, "steps", 1)
    check_whole(batch, "batch", 2)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"seeds must be different numbers of at least 0, got {list(seeds)}")
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no CUDA device")
