"""Check that a graph contains only what its stage allows; run before and after every pass."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from tfmq_fx.core.errors import GraphError
from tfmq_fx.core.stages import Stage, introduced_by, stage_of

from .node_info import op_name


def check(gm: fx.GraphModule, stage: Stage) -> None:
    """Raise GraphError unless `gm` is a sound graph of `stage`.

    Checked: the stage mark; `graph.lint()`; generated code that matches the graph; every target
    exists; every module and function is one the stage allows; every value carries meta["val"];
    a look-up table has one row for each key.
    """
    actual = stage_of(gm)
    if actual is not stage:
        raise GraphError(f"expected a {stage.value} graph, found a {actual.value} one")
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
    return op_name(node).startswith("timestep_row")


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
