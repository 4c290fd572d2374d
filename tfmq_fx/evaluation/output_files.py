"""Write the files of an evaluation besides its cells: the table as Markdown and JSON, and grids."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.files import write_whole
from tfmq_fx.serialization.json_values import without_infinities

from .plots import draw_grid
from .result_store import Cell, Cells
from .table import Row, markdown


def make_folder(out: str | Path) -> Path:
    """The directory `out`, made where it is missing. Raises ConfigError where that fails."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out must be a directory that can be made: {error}") from error
    return folder


def write_files(
    folder: Path, rows: Sequence[Row], planned: Sequence[Cell], cells: Cells, command: str
) -> None:
    """Write table.md, table.json and a grid of images for each model; each file appears complete.

    planned: the cells of the rows.  command: stated in the table.
    """
    first = planned[0]
    facts = table_facts(
        rows, samples=first.samples, steps=first.steps, batch=first.batch, command=command
    )
    write_tables(folder, rows, facts)
    for model in dict.fromkeys(row.model for row in rows):
        grid = {
            f"{cell.recipe} {cell.bits}".strip(): images
            for cell in planned
            if (cell.model, cell.seed) == (model, first.seed)
            and cells.read(cell) is not None
            and (images := cells.images(cell)) is not None
        }
        if grid:
            draw_grid(grid, folder / f"grid-{model}.png")


def write_tables(folder: Path, rows: Sequence[Row], facts: Mapping[str, str]) -> None:
    """Write table.md and table.json into `folder`. facts: what holds for all rows."""
    write_whole(folder / "table.md", "# Evaluation\n\n" + markdown(rows, facts))
    data = without_infinities({"facts": facts, "rows": [row.to_dict() for row in rows]})
    write_whole(folder / "table.json", json.dumps(data, indent=1, allow_nan=False) + "\n")


def table_facts(
    rows: Sequence[Row], *, samples: int, steps: int, batch: int, command: str
) -> dict[str, str]:
    """The facts that hold for the whole table; machines and dates are those of its results."""
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
