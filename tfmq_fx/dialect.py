"""The stages of a graph, what each allows, and the check that every pass goes through."""

from __future__ import annotations

import enum
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from .errors import GraphError

REPLACED = "replaced"  # node.meta: why what a layer does is not taken as that of its class


class Stage(enum.Enum):
    """How far a graph has come. Values are the names used in saved files."""

    CAPTURED = "captured"  # torch-level ops and leaf torch.nn modules
    OBSERVED = "observed"  # + observers in front of quantizable layers
    FOLDED = "folded"  # + timestep_row look-ups and cached tables
    QUANTIZED = "quantized"  # + quantized modules with integer weights: the saved form
    LOWERED = "lowered"  # + modules written for one backend

    def allows(self, other: Stage) -> bool:
        """Whether what `other` introduced may stand in a graph of this stage."""
        return other in _ALLOWED[self]


_ALLOWED = {
    Stage.CAPTURED: {Stage.CAPTURED},
    Stage.OBSERVED: {Stage.CAPTURED, Stage.OBSERVED},
    Stage.FOLDED: {Stage.CAPTURED, Stage.FOLDED},
    Stage.QUANTIZED: {Stage.CAPTURED, Stage.FOLDED, Stage.QUANTIZED},
    Stage.LOWERED: {Stage.CAPTURED, Stage.FOLDED, Stage.QUANTIZED, Stage.LOWERED},
}


def stage_of(gm: fx.GraphModule) -> Stage:
    """The stage a graph is marked with; a graph without a mark counts as CAPTURED."""
    stage = gm.meta.get("stage", Stage.CAPTURED)
    assert isinstance(stage, Stage)
    return stage


def introduced_by(target: Any) -> Stage:
    """The stage that introduces a module or function: its `stage` attribute, else CAPTURED."""
    stage = getattr(target, "stage", Stage.CAPTURED)
    return stage if isinstance(stage, Stage) else Stage.CAPTURED


def check(gm: fx.GraphModule, stage: Stage) -> None:
    """Raise GraphError unless `gm` is a sound graph of `stage`.

    Checked: the stage mark; `graph.lint()`; generated code that matches the graph; every target
    exists; every module and function is one the stage allows; every value carries meta["val"];
    a look-up table has one row for each key.
    """
    found = stage_of(gm)
    if found is not stage:
        raise GraphError(f"expected a {stage.value} graph, found a {found.value} one")
    try:
        gm.graph.lint()
    except (RuntimeError, AssertionError) as error:
        raise GraphError(f"malformed {stage.value} graph: {error}") from error
    if gm.code != gm.graph.python_code("self").src:
        raise GraphError("the graph was edited after its code was made; call gm.recompile()")
    for node in gm.graph.nodes:
        if node.op == "call_module":
            _check_module(gm, node, stage)
        elif node.op == "get_attr":
            _attribute(gm, node)
        elif node.op == "call_function":
            if not stage.allows(introduced_by(node.target)):
                raise GraphError(
                    f"{node.name}: {node.target} is not legal in a {stage.value} graph"
                )
            if is_timestep_row(node):
                _check_table(gm, node)
        if node.op not in ("output", "get_attr") and "val" not in node.meta:
            raise GraphError(f"{node.name}: no meta['val']; a pass made it without its value")


def is_timestep_row(node: fx.Node) -> bool:
    """Whether a node is a table look-up by timestep."""
    return node.op == "call_function" and getattr(node.target, "__name__", "").startswith(
        "timestep_row"
    )


def _check_module(gm: fx.GraphModule, node: fx.Node, stage: Stage) -> None:
    try:
        module: nn.Module = gm.get_submodule(str(node.target))
    except AttributeError as error:
        raise GraphError(f"{node.name}: no module {node.target!r}") from error
    if not stage.allows(introduced_by(module)):
        raise GraphError(
            f"{node.name}: {type(module).__name__} is not legal in a {stage.value} graph"
        )


def _attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    try:
        return attrgetter(str(node.target))(gm)
    except AttributeError as error:
        raise GraphError(f"{node.name}: no attribute {node.target!r}") from error


def _check_table(gm: fx.GraphModule, node: fx.Node) -> None:
    table, keys = node.args[0], node.args[1]
    if not (isinstance(table, fx.Node) and isinstance(keys, fx.Node)):
        raise GraphError(f"{node.name}: table and keys must be values of the graph")
    if table.op == "get_attr" and keys.op == "get_attr":
        rows, known = _attribute(gm, table), _attribute(gm, keys)
        if isinstance(rows, torch.Tensor) and len(rows) != len(known):
            raise GraphError(
                f"{node.name}: table {table.target!r} has {len(rows)} rows "
                f"for {len(known)} timesteps"
            )
