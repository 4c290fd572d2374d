"""What an evaluation writes besides its cells: the table as Markdown and JSON, plots and grids."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tfmq_fx.core.files import write_whole
from tfmq_fx.serialization.json_values import without_infinities

from .plots import Point, draw_grid, draw_quality
from .result_store import Cell, Cells
from .table import Row, markdown


def write_files(
    folder: Path, rows: Sequence[Row], planned: Sequence[Cell], cells: Cells, command: str
) -> None:
    """Write table.md, table.json and each model's pictures into `folder`; each appears complete.

    planned: the cells of the rows.  command: as it is stated in the table.
    """
    cell = planned[0]
    facts = table_facts(
        rows, samples=cell.samples, steps=cell.steps, batch=cell.batch, command=command
    )
    write_tables(folder, rows, facts)
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


def write_tables(folder: Path, rows: Sequence[Row], facts: Mapping[str, str]) -> None:
    """Write table.md and table.json into `folder`. facts: what holds for all rows."""
    write_whole(folder / "table.md", "# Evaluation\n\n" + markdown(rows, facts))
    data = without_infinities({"facts": facts, "rows": [row.to_dict() for row in rows]})
    write_whole(folder / "table.json", json.dumps(data, indent=1, allow_nan=False) + "\n")


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


def table_facts(
    rows: Sequence[Row], *, samples: int, steps: int, batch: int, command: str
) -> dict[str, str]:
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
        "protocol": f"{samples} images a seed, {steps} DDIM steps, batches of "
        f"{batch}, seeds {', '.join(map(str, seeds))}; figures are means over the seeds, "
        "lowest to highest in brackets",
        "figures": "of the features of a classifier trained on the same data, against the images "
        "trained on; PSNR, SSIM and feature distance against full precision's image of the same "
        "noise; output SQNR on full precision's trajectory, in eager mode",
    }
