"""Recipes side by side on the shipped models: every figure, over seeds, with what it cost."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .baselines import EQUAL_TIME, NO_LEARNING, Baseline, baselines, learning_rule
from .cell_work import SETS_THE_TIME, compute_cell
from .cells import DONE, FAILED, FULL_PRECISION, Cell, Cells, plain
from .charts import Point, draw_grid, draw_quality
from .config import Config, to_dict
from .equal_time import Timings
from .errors import ConfigError
from .figures import Seen, see
from .files import write_whole
from .judge import BATCH, STEPS, Bench, Judge, whole_batches
from .quality_table import Row, markdown
from .suite import Subject, contents, find_subjects

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


def evaluate(
    models: Iterable[str | Subject] | None = None,
    recipes: Iterable[str | Config] | None = None,
    bits: Sequence[str] | None = None,
    *,
    out: str | Path,
    samples: int = SAMPLES,
    seeds: Sequence[int] = SEEDS,
    steps: int = STEPS,
    learning: str | int = EQUAL_TIME,
    backend: str = "inductor",
    device: str = "cpu",
    batch: int = BATCH,
    compute: bool = True,
    retry: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
    command: str = "tfmq_fx.evaluation.evaluate",
) -> list[Row]:
    """Quantize, sample and judge: a row for each model and recipe, full precision first.

    models: names of `suite.SUBJECTS`, or Subjects; None is all.  recipes: names of
    `baselines.NAMES`, each at all `bits` ("w4a8"; None is all of `baselines.BITS`), or Configs;
    None is all.
    samples: images for each Frechet distance, rounded up to whole batches.  seeds: each stands for
    one seed of calibration and one of sampling.  steps: of DDIM.
    learning: for recipes that learn by gradient steps: "published" leaves them as they are,
    "equal-time" gives them the time that "best" takes at this model, width and seed on this
    machine, a number is the most steps a block.
    backend: what samples, "inductor" (eager where that fails, and the result says so) or "eager".
    device: "cpu" or "cuda".  batch: images at a time; one batch is also paired for the grids.
    out: gets cells/, timings/, table.md, table.json, quality-MODEL.png and grid-MODEL.png. Results
    that are there are not computed again, failed ones only with `retry`; compute=False computes
    nothing.  say: where lines of text go.  command: stated in the table.

    A recipe that fails is a row with its error. An interrupted run writes the tables of what there
    is. Raises ConfigError for arguments that cannot be used, ImportError without what
    `pip install "tfmq_fx[demo,evaluate]"` brings.
    """
    subjects, chosen = find_subjects(models), baselines(recipes, bits)
    rule = learning_rule(learning)
    _check(samples, seeds, steps, batch, backend, device)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out must be a directory that can be made: {error}") from error
    whole = whole_batches(samples, batch)
    if whole != samples:
        say(f"{samples} samples are rounded up to {whole}, whole batches of {batch}")
    cells = Cells(folder / "cells")
    usual = {"samples": whole, "steps": steps, "batch": batch, "backend": backend, "device": device}
    planned = [cell for s in subjects for cell in plan(s, chosen, rule=rule, seeds=seeds, **usual)]

    def missing(cell: Cell) -> bool:
        found = cells.read(cell)
        return found is None or (retry and found["status"] == FAILED)

    try:
        if compute and (todo := [cell for cell in planned if missing(cell)]):
            _compute(subjects, todo, cells, Timings(folder / "timings"), progress, say)
    finally:
        rows = gather(planned, cells)
        _write(folder, rows, planned, cells, command)
    return rows


def plan(
    subject: Subject,
    chosen: Sequence[Baseline],
    *,
    rule: str | int,
    seeds: Sequence[int],
    **usual: Any,
) -> list[Cell]:
    """All cells of a model in the order of the table, seed by seed; each is independent of the
    others, but for the time that "best" sets. usual: the rest of a Cell, the same for all."""
    weights = contents(subject.load(), subject.classifier())
    recipes: list[tuple[str, str, dict[str, Any] | None, bool]]
    recipes = [(FULL_PRECISION, "", None, False)]
    recipes += [(b.name, b.bits, to_dict(b.config), b.learns) for b in chosen]
    return [
        Cell(
            model=subject.name,
            recipe=name,
            bits=bits,
            config=None if config is None else json.loads(json.dumps(config)),
            learning=rule if learns else NO_LEARNING,
            contents=weights,
            reference=subject.reference,
            seed=seed,
            **usual,
        )
        for seed in seeds
        for name, bits, config, learns in recipes
    ]


def _compute(
    subjects: Sequence[Subject],
    todo: Sequence[Cell],
    cells: Cells,
    timings: Timings,
    progress: bool,
    say: Callable[[str], None],
) -> None:
    """Compute cells and keep each as soon as it is done: by model and seed, what sets the time for
    others first."""
    real: dict[str, Seen] = {}  # two models share their reference images
    with tqdm(total=len(todo), disable=not progress, file=sys.stderr, leave=False) as bar:
        for subject in subjects:
            own = [cell for cell in todo if cell.model == subject.name]
            if not own:
                continue
            bar.set_description(f"{subject.name}: reference images")
            first = own[0]
            bench = Bench(subject, steps=first.steps, batch=first.batch, device=first.device)
            if subject.reference not in real:
                real[subject.reference] = see(subject.classifier(), subject.images())
            for seed in dict.fromkeys(cell.seed for cell in own):
                judge = Judge(
                    bench,
                    real[subject.reference],
                    seed=seed,
                    samples=first.samples,
                    backend=first.backend,
                )
                for cell in sorted((c for c in own if c.seed == seed), key=_order):
                    result, images = compute_cell(cell, judge, timings, bar.set_description)
                    cells.write(cell, result, images)
                    with tqdm.external_write_mode(file=sys.stderr):
                        say(_told(cell, result))
                    bar.update()


def _order(cell: Cell) -> int:
    return (FULL_PRECISION, SETS_THE_TIME, cell.recipe).index(cell.recipe)


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
            learning=group[0].learning,
            results={cell.seed: cells.read(cell) for cell in group},
        )
        for (model, recipe, bits), group in groups.items()
    ]


def _told(cell: Cell, result: dict[str, Any]) -> str:
    """A result in one line."""
    if result["status"] != DONE:
        return f"{cell.title}: failed: {result['error']}"
    figures = result["figures"]
    parts = [f"FID {figures['images']['fid']:.2f}"]
    if figures["sqnr"] is not None:
        parts.append(f"output SQNR {figures['sqnr']:.1f} dB")
        parts.append(f"PSNR {figures['pairs']['psnr']:.1f} dB")
        parts.append(f"quantized in {figures['quantize_seconds']:.0f} s")
    parts.append(f"compiled in {figures['compile_seconds']:.0f} s")
    parts.append(f"sampled in {figures['sample_seconds']:.0f} s ({figures['backend']})")
    return f"{cell.title}: {', '.join(parts)}"


def _write(
    folder: Path, rows: Sequence[Row], planned: Sequence[Cell], cells: Cells, command: str
) -> None:
    """The table as Markdown and JSON, and the pictures of each model."""
    facts = _facts(rows, planned[0], command)
    write_whole(folder / "table.md", "# Evaluation\n\n" + markdown(rows, facts))
    data = plain({"facts": facts, "rows": [row.to_dict() for row in rows]})
    write_whole(folder / "table.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        if points := [point for row in own if (point := _point(row)) is not None]:
            full = own[0].spread("fid")
            best = None if full is None else full.mean
            draw_quality(model, points, best, folder / f"quality-{model}.png")
        first = planned[0].seed
        same = [cell for cell in planned if cell.model == model and cell.seed == first]
        grid = {
            f"{cell.recipe} {cell.bits}".strip(): images
            for cell in same
            if cells.read(cell) is not None and (images := cells.images(cell)) is not None
        }
        if grid:
            draw_grid(grid, folder / f"grid-{model}.png")


def _point(row: Row) -> Point | None:
    figures = [row.spread(n) for n in ("fid", "sqnr", "bytes", "quantize_seconds")]
    if any(figure is None for figure in figures):
        return None
    fid, sqnr, size, seconds = (figure for figure in figures if figure is not None)
    return Point(
        recipe=row.recipe,
        bits=row.bits,
        fid=(fid.mean, fid.low, fid.high),
        sqnr=(sqnr.mean, sqnr.low, sqnr.high),
        kib=size.mean / 1024,
        seconds=seconds.mean,
    )


def _facts(rows: Sequence[Row], cell: Cell, command: str) -> dict[str, str]:
    """What holds for the whole table. Machines and dates are those of the results in it."""
    done = [r for row in rows for r in row.results.values() if r is not None]
    machines = dict.fromkeys(
        ", ".join(f"{name} {value}" for name, value in r["machine"].items()) for r in done
    )
    dates = sorted({str(r["date"]) for r in done}) or [time.strftime("%Y-%m-%d")]
    seeds = sorted({seed for row in rows for seed in row.results})
    return {
        "command": f"`{command}`",
        "machine": "; ".join(machines) or "none: nothing was run",
        "date": dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
        "protocol": f"{cell.samples} images a seed, {cell.steps} DDIM steps, batches of "
        f"{cell.batch}, seeds {', '.join(map(str, seeds))}; figures are means over the seeds, "
        "lowest to highest in brackets",
        "figures": "of the features of a classifier trained on the same data, against the images "
        "trained on; PSNR, SSIM and feature distance against full precision's image of the same "
        "noise; output SQNR on full precision's trajectory, in eager mode",
    }


def _check(
    samples: int, seeds: Sequence[int], steps: int, batch: int, backend: str, device: str
) -> None:
    """Raise ConfigError for what cannot be used."""
    for name, value, least in (("samples", samples, 2), ("steps", steps, 1), ("batch", batch, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"seeds must be different numbers of at least 0, got {list(seeds)}")
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no CUDA device")
