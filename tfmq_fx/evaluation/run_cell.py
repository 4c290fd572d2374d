"""The work for one result of an evaluation: quantize, sample, judge."""

from __future__ import annotations

import dataclasses
import time
import traceback
from typing import Any

from torch import Tensor

from tfmq_fx.core.config import Config
from tfmq_fx.core.config_json import from_dict

from .benchmark import Benchmark, QualityMeter, Stage, free, seeds_of
from .recipes import MIXED
from .result_store import DONE, FAILED, Cell, machine


def compute_cell(
    cell: Cell, judge: QualityMeter, stage: Stage = lambda _: None
) -> tuple[dict[str, Any], Tensor | None]:
    """The result of `cell`, JSON-ready but for infinities, and its first images.

    judge: of its model and seed.  stage: told what is being done.
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
            config = from_dict(dict(cell.config))
            facts["steps"] = config.reconstruction.iters
            within("quantizing")
            seed = seeds_of(cell.seed)[0]
            budget = uniform_bytes(judge.bench, config, seed) if cell.recipe == MIXED else None
            converted, seconds = judge.bench.quantize(config, seed, budget=budget)
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


def uniform_bytes(bench: Benchmark, config: Config, seed: int) -> int:
    """Bytes that a recipe takes with the same bits in every layer, however they are rounded."""
    spec = dataclasses.replace(config.reconstruction, rounding="nearest", refine=0, iters=0)
    plain = dataclasses.replace(config, reconstruction=spec)
    return bench.quantize(plain, seed)[0].nbytes()
