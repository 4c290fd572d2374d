"""The work for one result of an evaluation: choose the steps, quantize, sample, judge."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .baselines import EQUAL_TIME, MIXED, NO_LEARNING, PUBLISHED, capped, recipe
from .cells import DONE, FAILED, Cell, digest, machine
from .config import Config, from_dict, to_dict
from .equal_time import Line, Timings, fit_line
from .errors import ConfigError
from .judge import Bench, Judge, Stage, free, seeds_of

SETS_THE_TIME = "best"


def compute_cell(
    cell: Cell, judge: Judge, timings: Timings, stage: Stage = lambda _: None
) -> tuple[dict[str, Any], Tensor | None]:
    """The result of `cell`, JSON-ready but for infinities, and its first images.

    judge: of its model and seed.  timings: of this machine.  stage: told what is being done.
    Whatever goes wrong becomes the result, as `error`, but for a missing package (ImportError),
    which would go wrong in every cell.
    """

    def within(what: str) -> None:
        stage(f"{cell.title}: {what}")

    facts: dict[str, Any] = {}
    images = None
    try:
        if cell.config is None:
            within("sampling")
            figures, images = judge.full_precision()
        else:
            config, facts = _chosen(
                cell, from_dict(dict(cell.config)), judge.bench, timings, within
            )
            within("quantizing")
            seed = seeds_of(cell.seed)[0]
            budget = uniform_bytes(judge.bench, config, seed) if cell.recipe == MIXED else None
            converted, seconds = judge.bench.quantize(config, seed, budget=budget)
            if cell.recipe == SETS_THE_TIME:
                timings.keep_target(_target_key(cell, config), seconds)
            figures, images = judge.judge(converted, seconds, within)
        facts |= {"status": DONE, "figures": dataclasses.asdict(figures)}
    except ImportError:
        raise
    except Exception as error:  # one recipe's failure is its row, not the end of the table
        text = str(error).strip().partition("\n")[0]
        facts |= {"status": FAILED, "error": f"{type(error).__name__}: {text}"}
        facts["traceback"] = traceback.format_exc(limit=-8)
    free()
    return facts | {"machine": machine(cell.device), "date": time.strftime("%Y-%m-%d")}, images


def uniform_bytes(bench: Bench, config: Config, seed: int) -> int:
    """Bytes that a recipe takes with the same bits in every layer, however they are rounded."""
    spec = dataclasses.replace(config.reconstruction, rounding="nearest", refine=0, iters=0)
    plain = dataclasses.replace(config, reconstruction=spec)
    return bench.quantize(plain, seed)[0].nbytes()


def _chosen(
    cell: Cell, config: Config, bench: Bench, timings: Timings, stage: Callable[[str], None]
) -> tuple[Config, dict[str, Any]]:
    """The recipe with the learning steps that the cell's rule gives it, and facts about them."""
    most = config.reconstruction.iters
    if cell.learning in (NO_LEARNING, PUBLISHED):
        return config, {"steps": most}
    if cell.learning != EQUAL_TIME:
        config = capped(config, int(cell.learning))
        return config, {"steps": config.reconstruction.iters}
    if not cell.bits:
        raise ConfigError(
            f"recipe {cell.recipe!r} was given as a Config, so there is no width at which "
            f"{SETS_THE_TIME!r} sets its time; use learning='published' or a number of steps"
        )
    target = _target(cell, bench, timings, stage)

    def seconds(steps: int) -> float:
        stage(f"timing {steps} learning steps")
        return bench.quantize(capped(config, steps), seeds_of(cell.seed)[0])[1]

    key = digest(["line", _place(cell), to_dict(config)])
    line: Line = timings.line(key, lambda: fit_line(seconds, most=most))
    steps = line.steps(target, most=most)
    return capped(config, steps), {
        "steps": steps,
        "target": target,
        "line": dataclasses.asdict(line),
    }


def _target(cell: Cell, bench: Bench, timings: Timings, stage: Callable[[str], None]) -> float:
    """Seconds that the recipe which sets the time takes at the cell's model, width and seed."""
    config = recipe(SETS_THE_TIME, cell.bits)
    key = _target_key(cell, config)
    seconds = timings.target(key)
    if seconds is None:
        stage(f"timing {SETS_THE_TIME}")
        seconds = bench.quantize(config, seeds_of(cell.seed)[0])[1]
        timings.keep_target(key, seconds)
    return seconds


def _target_key(cell: Cell, config: Config) -> str:
    return digest(["target", _place(cell), to_dict(config), cell.seed])


def _place(cell: Cell) -> list[Any]:
    """What a time depends on besides the recipe."""
    return [cell.contents, cell.steps, cell.batch, machine(cell.device)]
