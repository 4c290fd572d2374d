"""Make graph rewrites pure functions that fork, check and time, and report what they declined."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec

import torch
from torch import fx

from tfmq_fx.core.errors import TfmqError
from tfmq_fx.core.stages import Stage, stage_of

from .graph import fork
from .verifier import check

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Declined:
    """A candidate that a pass left alone, and why."""

    site: str
    reason: str


@dataclass(slots=True)
class Rewrite:
    """The result of a pass.

    changed: the number of sites rewritten; 0 means the graph is unchanged.
    details: JSON-ready facts for the report (measured errors, choices).
    """

    gm: fx.GraphModule
    changed: int
    declined: list[Declined] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    seconds: float = 0.0


Pass = Callable[Concatenate[fx.GraphModule, P], Rewrite]


def graph_pass(
    *, takes: Stage | tuple[Stage, ...], gives: Stage | None
) -> Callable[[Pass[P]], Pass[P]]:
    """A decorator that makes a function GraphModule -> Rewrite a pass.

    The input is checked, forked and never changed, the body runs without grad, dead code goes, and
    the output is marked and checked as `gives`, or as the input's stage where that is None.
    """
    accepted = takes if isinstance(takes, tuple) else (takes,)

    def decorate(body: Pass[P]) -> Pass[P]:
        @functools.wraps(body)
        def run(gm: fx.GraphModule, /, *args: P.args, **kwargs: P.kwargs) -> Rewrite:
            stage = stage_of(gm)
            check(gm, stage if stage in accepted else accepted[0])
            start = time.perf_counter()
            try:
                with torch.no_grad():
                    result = body(fork(gm), *args, **kwargs)
            except TfmqError as error:
                error.add_note(f"in pass {body.__name__}")
                raise
            prune(result.gm.graph)
            result.gm.delete_all_unused_submodules()
            result.gm.recompile()
            result.gm.meta["stage"] = gives or stage
            result.name = body.__name__
            result.seconds = time.perf_counter() - start
            check(result.gm, gives or stage)
            return result

        return run

    return decorate


def prune(graph: fx.Graph) -> None:
    """Remove nodes that nothing uses, except writes in place."""
    graph.eliminate_dead_code(lambda node: node.is_impure() or "writes" in node.meta)
