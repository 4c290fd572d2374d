"""Graph rewrites as pure functions: fork, rewrite, say what was done and what was left alone."""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec

import torch
from torch import fx, nn

from .dialect import Stage, check, stage_of
from .errors import GraphError, TfmqError
from .inference import ordinary
from .ops import timestep_row

P = ParamSpec("P")
KEYS = "temporal_keys"  # buffer of the timesteps that tables have rows for


@dataclass(frozen=True, slots=True)
class Declined:
    """A candidate that a pass left alone, and why."""

    site: str
    reason: str


@dataclass(slots=True)
class Rewrite:
    """What a pass returns.

    changed: the number of sites rewritten; 0 means the graph is as it was.
    details: JSON-ready facts for the report (errors measured, choices made).
    """

    gm: fx.GraphModule
    changed: int
    declined: list[Declined] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    seconds: float = 0.0


def fork(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module that shares modules and parameters with `gm` and owns its graph."""
    # The constructor copies only what the graph refers to, as a tree of fresh containers:
    # replacing a submodule in the fork leaves the original alone.
    forked = fx.GraphModule(gm, copy.deepcopy(gm.graph), type(gm).__name__)
    forked.meta = dict(gm.meta)
    forked.train(gm.training)
    return forked


def same_memory(module: nn.Module) -> dict[int, Any]:
    """A memo for copy.deepcopy by which copies lie on the memory of `module`: they share buffers,
    and have Parameters of their own that want a gradient where the module's do. What was made in
    inference mode is copied."""
    memo: dict[int, Any] = {id(b): ordinary(b) if b.is_inference() else b for b in module.buffers()}
    for part in module.modules():  # a weight that a hook computes cannot be copied with its history
        computed = (v for v in vars(part).values() if isinstance(v, torch.Tensor) and not v.is_leaf)
        memo |= {id(value): value.detach() for value in computed}
    return memo | {id(p): nn.Parameter(ordinary(p), p.requires_grad) for p in module.parameters()}


def own_modules(gm: fx.GraphModule) -> None:
    """Give a graph modules and Parameters of its own, on the memory of those it shares."""
    memo = same_memory(gm)
    for name, child in list(gm.named_children()):
        gm.add_module(name, copy.deepcopy(child, memo))
    for name, parameter in list(gm.named_parameters(recurse=False)):
        gm.register_parameter(name, memo[id(parameter)])


def graph_pass(
    *, takes: Stage | tuple[Stage, ...], gives: Stage | None
) -> Callable[
    [Callable[Concatenate[fx.GraphModule, P], Rewrite]],
    Callable[Concatenate[fx.GraphModule, P], Rewrite],
]:
    """Make a function GraphModule -> Rewrite a pass.

    The input is checked, forked and never changed, the body runs without grad, dead code goes, and
    the output is marked and checked as `gives`, or where that is None as the stage it had."""
    accepted = takes if isinstance(takes, tuple) else (takes,)

    def decorate(
        body: Callable[Concatenate[fx.GraphModule, P], Rewrite],
    ) -> Callable[Concatenate[fx.GraphModule, P], Rewrite]:
        @functools.wraps(body)
        def run(gm: fx.GraphModule, /, *args: P.args, **kwargs: P.kwargs) -> Rewrite:
            found = stage_of(gm)
            check(gm, found if found in accepted else accepted[0])
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
            result.gm.meta["stage"] = gives or found
            result.name = body.__name__
            result.seconds = time.perf_counter() - start
            check(result.gm, gives or found)
            return result

        return run

    return decorate


def prune(graph: fx.Graph) -> None:
    """Remove what nothing uses, but for writes in place."""
    graph.eliminate_dead_code(lambda node: node.is_impure() or "writes" in node.meta)


def module_path(node: fx.Node) -> str:
    """Dotted path of the module whose forward recorded `node`; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths else ""


def device_of(gm: fx.GraphModule) -> torch.device:
    """Where a graph runs: the device of its tensors, or of its inputs where it has none."""
    for tensor in itertools.chain(gm.buffers(), gm.parameters()):
        return tensor.device
    value = timestep_node(gm).meta["val"]
    assert isinstance(value, torch.Tensor)
    return value.device


def set_buffer(gm: fx.GraphModule, name: str, value: torch.Tensor) -> str:
    """Register `value` as a buffer `name`, or `name_1`, ... if taken; returns the name used."""
    free, n = name, 0
    while hasattr(gm, free):
        n += 1
        free = f"{name}_{n}"
    gm.register_buffer(free, value)
    return free


def timestep_node(gm: fx.GraphModule) -> fx.Node:
    """The placeholder of the timestep, (B,)."""
    name = gm.meta.get("timestep")
    placeholders: list[fx.Node] = list(gm.graph.find_nodes(op="placeholder"))
    for node in placeholders:
        if node.target == name:
            return node
    raise GraphError(f"the graph has no input {name!r}, the timestep its metadata names")


def insert_timestep_row(
    gm: fx.GraphModule, name: str, table: torch.Tensor, timesteps: torch.Tensor
) -> fx.Node:
    """A look-up of `table` (K, F) by t behind the placeholders; its value is (B, F).

    timesteps: (K,) sorted keys, stored once for all look-ups over the same set.
    """
    t = timestep_node(gm)
    last = list(gm.graph.find_nodes(op="placeholder"))[-1]
    table_name = set_buffer(gm, name, table)
    keys_name = next(
        (n for n, b in gm.named_buffers() if n.startswith(KEYS) and torch.equal(b, timesteps)), None
    ) or set_buffer(gm, KEYS, timesteps.clone())
    with gm.graph.inserting_after(last):
        keys = gm.graph.get_attr(keys_name)
    with gm.graph.inserting_after(keys):
        rows = gm.graph.get_attr(table_name)
    with gm.graph.inserting_after(rows):
        row = gm.graph.call_function(timestep_row, (rows, keys, t))
    batch = t.meta["val"]
    with batch.fake_mode:
        value = torch.empty(
            (batch.shape[0], table.shape[1]), dtype=table.dtype, device=batch.device
        )
    row.meta = {"val": value, "nn_module_stack": {"": ("", type(gm))}}
    return row
