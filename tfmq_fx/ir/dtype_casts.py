"""Find what keeps a graph from being cast to another floating dtype.

A graph does not say why it computes in float32 somewhere: because the model was in float32, or
because the model's code always does (sinusoids of the timestep, norms). A cast treats both alike.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from .graph import timestep_node
from .node_info import op_name
from .request_cut import looks_up


def cast_obstacle(
    gm: fx.GraphModule, dtype: torch.dtype, beside: Collection[str] = ()
) -> str | None:
    """The first reason why a graph in `dtype` cannot be cast to another dtype, or None.

    beside: names of the model's tensors that are no parameters; a cast of the model itself might
    not reach them.
    """
    t, name = timestep_node(gm), str(dtype).removeprefix("torch.")
    computing = (user for user in t.users if user.op != "output" and not looks_up(gm, user))
    if t.meta["val"].dtype == dtype and any(computing):
        return f"it computes with the timestep, {t.target}, which stays {name}"
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method") and dtype in _flat((node.args, node.kwargs)):
            where = node.meta.get("source")
            return f"{op_name(node)} asks for {name}" + (f" ({where})" if where else "")
        not_parameter = node.op == "get_attr" and str(node.target) in beside
        if not_parameter and node.meta["val"].dtype == dtype:
            return f"{node.target}, {name}, is no parameter of the model"
    return None


def _flat(arguments: Any) -> list[Any]:
    """The elements of nested arguments of a call."""
    elements: list[Any] = []
    fx.node.map_aggregate(arguments, elements.append)
    return elements
