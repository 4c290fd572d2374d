"""Whether a graph may go to another floating dtype: not where it holds arithmetic of the old one.

A graph does not say why a model computes in float32 somewhere: since it is in float32 itself, or
whatever it is in (sinusoids of the timestep, norms). In another dtype the two part.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from .graph import timestep_node
from .node_info import op_name
from .request_cut import looks_up


def cast_obstacle(
    gm: fx.GraphModule, dtype: torch.dtype, beside: Collection[str] = ()
) -> str | None:
    """The first place of `gm`, in `dtype` now, that cannot follow a cast; None where all can.

    beside: names of the tensors that the model holds or makes beside its parameters: whether its
    own cast would reach them is not known.
    """
    t = timestep_node(gm)
    if t.meta["val"].dtype == dtype and any(not _reads_table(gm, user) for user in t.users):
        return f"it computes with the timestep, {t.target}, which stays {_name(dtype)}"
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method") and _holds(node, dtype):
            where = node.meta.get("source")
            return f"{op_name(node)} asks for {_name(dtype)}" + (f" ({where})" if where else "")
        made = node.op == "get_attr" and str(node.target) in beside
        if made and node.meta["val"].dtype == dtype:
            return f"{node.target}, {_name(dtype)}, is no parameter of the model"
    return None


def _reads_table(gm: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "output" or looks_up(gm, node)


def _holds(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether a dtype is among the arguments of a call."""
    found = False

    def visit(value: object) -> object:
        nonlocal found
        found = found or value is dtype
        return value

    fx.node.map_aggregate((node.args, node.kwargs), visit)  # type: ignore[arg-type]
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
