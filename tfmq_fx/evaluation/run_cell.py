"""Compute one result of an evaluation: quantize, sample, measure."""

from __future__ import annotations

import dataclasses
import gc
import time
import traceback
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from tfmq_fx.core.config import Config

from .benchmark import Benchmark, QualityMeter
from .recipes import MIXED
from .result_store import DONE, FAILED, Cell, machine


def compute_cell(cell: Cell, meter: QualityMeter) -> tuple[dict[str, Any], Tensor | None]:
    """The result of `cell`, JSON-ready but for infinities, and its first images.

    meter: of its model and seed.  Any failure becomes the result, as `error`, except a missing
    package (ImportError), which would fail in every cell.
    """
    facts: dict[str, Any] = {}
    images = None
    try:
        if cell.config is None:
            figures, images = meter.full_precision()
        else:
            facts["steps"] = cell.config.reconstruction.iters
            bench, seed = meter.bench, meter.calibration_seed
            budget = uniform_bytes(bench, cell.config, seed) if cell.recipe == MIXED else None
            figures, images = meter.measure(*bench.quantize(cell.config, seed, budget=budget))
        facts |= {"status": DONE, "figures": dataclasses.asdict(figures)}
    except ImportError:
        raise
    except Exception as error:  # one recipe's failure is its row, not the end of the table
        text = str(error).strip().partition("\n")[0]
        facts |= {"status": FAILED, "error": f"{type(error).__name__}: {text}"}
        facts["traceback"] = traceback.format_exc(limit=-8)
    free_memory()
    return facts | {"machine": machine(cell.device), "date": time.strftime("%Y-%m-%d")}, images


def uniform_bytes(bench: Benchmark, config: Config, seed: int) -> int:
    """Bytes that a recipe takes with the same bits in every layer, however they are rounded."""
    spec = dataclasses.replace(config.reconstruction, rounding="nearest", refine=0, iters=0)
    plain = dataclasses.replace(config, reconstruction=spec)
    return bench.quantize(plain, seed)[0].nbytes()


def free_memory() -> None:
    """Release compiled code, and cycles that hold tensors."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
