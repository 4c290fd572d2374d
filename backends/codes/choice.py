"""Describe the kernel that was chosen for a layer on codes, and keep measured choices in a file."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tfmq_fx.core.files import make_private, write_whole

from .problem import Problem, Tile

logger = logging.getLogger(__name__)

Engine = Literal["triton", "torch", "cpu", "onednn", "float"]


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine that runs a problem, and the times that were measured.

    engine: "triton", a kernel of `cuda.kernels` with `tile`; "torch", torch's own matrix product on
    CUDA; "cpu", a kernel of `cpu.kernels`; "onednn"; or "float", the layer in floating point.
    micros: microseconds by engine that was tried, empty where nothing was timed.
    """

    engine: Engine
    tile: Tile
    micros: dict[str, float] = dataclasses.field(default_factory=dict)


Timer = Callable[[Callable[[], Any]], float]  # microseconds of a call
Chooser = Callable[[Problem, torch.dtype], Choice]  # for results of a dtype


def slower(choice: Choice, floating: str, kernels: str) -> str:
    """The reason why a layer stays in floating point although slower kernels could run it.

    floating, kernels: names of the two for the text.
    """
    ours = min((t for name, t in choice.micros.items() if name != "float"), default=float("inf"))
    return f"{floating} took {choice.micros['float']:.1f} us, {kernels} {ours:.1f} us"


def runs_on_torch(problem: Problem) -> bool:
    """Whether torch's own product of codes takes these sizes on CUDA."""
    aligned = problem.channels % 16 == 0 and problem.out_channels % 16 == 0
    return problem.half == 0 and aligned and problem.rows // problem.batch > 16


def cached_chooser(
    decide: Chooser, path: Path, *, keeps: Callable[[Choice], bool] = lambda choice: True
) -> Chooser:
    """A chooser that calls `decide` once for each problem and dtype, and keeps choices in a file.

    path: of the file, whose choices are not made again.  keeps: whether a choice is written; others
    hold for this process only.
    """
    known = read_choices(path)

    def choose(problem: Problem, dtype: torch.dtype) -> Choice:
        key = json.dumps([dataclasses.asdict(problem), str(dtype)], sort_keys=True)
        if key not in known:
            known[key] = decide(problem, dtype)
            if keeps(known[key]):
                write_choices(path, known)
        return known[key]

    return functools.cache(choose)


def read_choices(path: Path) -> dict[str, Choice]:
    """The choices that a file holds; none where it is missing or damaged."""
    try:
        entries = json.loads(path.read_text())
        return {
            key: Choice(entry["engine"], Tile(*entry["tile"]), entry["micros"])
            for key, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_choices(path: Path, known: dict[str, Choice]) -> None:
    """Add choices to a file, beside those that another process wrote meanwhile."""
    merged = read_choices(path) | known
    text = json.dumps({key: dataclasses.asdict(choice) for key, choice in merged.items()})
    try:
        make_private(path.parent)
        write_whole(path, text)
    except OSError as error:
        logger.warning("kernel choices are not kept: %s", error)
