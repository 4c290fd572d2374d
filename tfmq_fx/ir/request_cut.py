"""Choose the values of a request to compute before its first step.

Within one request the conditions (class label, text) stay and the timesteps are known, so whatever
depends on them alone can be computed once for each step, or once. A minimum cut chooses the values
to store; a value whose rows outweigh the weights they replace is not stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, fx, nn

from tfmq_fx.quant.timestep_table import QuantTimestepTable

from .binding_times import Binding, BindingTimes, binding_times
from .graph import timestep_node
from .graph_pass import Declined
from .min_cut import minimum_cut, stored_bytes
from .node_info import is_heavy
from .subgraphs import extract_nodes, missing_inputs
from .verifier import is_timestep_row

_VALUE = 1024  # bytes that one more input of the step counts for: one row, not dozens of slices


@dataclass(frozen=True, slots=True)
class Group:
    """Values to store that depend on the same conditions.

    conditions: placeholders they depend on.  stepped: whether they depend on the timestep as well:
    then there is one value for each step.  values: nodes of the analysed graph, in graph order.
    """

    conditions: tuple[str, ...]
    stepped: bool
    values: tuple[fx.Node, ...]


def find_request(
    gm: fx.GraphModule, conditions: Collection[str], *, steps: int
) -> tuple[list[Group], list[Declined]]:
    """The values to compute before the steps of a request in which `conditions` are fixed.

    conditions: names of placeholders.  steps: the approximate number of timesteps of a request,
    which decides whether rows outweigh weights.
    Look-ups by timestep are among the values where they can be, so that nothing that is left
    depends on which timesteps there are.
    Declined are values that are computed at every step.  Raises ConfigError for a condition that
    is no input.
    """
    times = binding_times(gm, conditions)
    early = {n for n in gm.graph.nodes if n.op != "output" and times[n] <= Binding.TC}
    heavy = {
        n
        for n in early
        if times[n] is not Binding.CONSTANT and (is_heavy(gm, n) or looks_up(gm, n))
    }
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    declined: list[Declined] = []

    def cost(node: fx.Node) -> int:
        return stored_bytes(node) * (1 if times[node] is Binding.C else steps)

    while True:
        cut, blocked = minimum_cut(
            gm.graph,
            early,
            heavy=heavy,
            obstacles=_obstacles(gm, early, times),
            cost=lambda node: cost(node) + _VALUE,
        )
        inside = {node: set(extract_nodes(gm, [node], placeholders)) for node in cut}
        refused = _outweighing(gm, cut, inside, cost)
        if not refused:
            break
        # What computes a refused value, and no other, is left to every step.
        others = set().union(*(inside[node] for node in cut if node not in refused))
        for node, reason in refused.items():
            declined.append(Declined(node.name, reason))
            heavy -= inside[node] - others
            early -= {node}
    values: dict[tuple[frozenset[str], bool], list[fx.Node]] = {}
    for node in cut:
        stepped = times.timestep in times.deps[node]
        values.setdefault((times.deps[node] & times.conditions, stepped), []).append(node)
    order = [str(node.target) for node in placeholders]
    groups = [
        Group(tuple(name for name in order if name in needed), stepped, tuple(nodes))
        for (needed, stepped), nodes in values.items()
    ]
    return groups, [*declined, *blocked, *times.notes]


def tensors_of(gm: fx.GraphModule, nodes: Iterable[fx.Node]) -> dict[int, Tensor]:
    """The parameters and buffers that `nodes` use, by identity."""
    tensors: dict[int, Tensor] = {}
    for node in nodes:
        if node.op == "call_module":
            module: nn.Module = gm.get_submodule(str(node.target))
            tensors |= {id(t): t for t in (*module.parameters(), *module.buffers())}
        elif node.op == "get_attr":
            value = attrgetter(str(node.target))(gm)
            if isinstance(value, Tensor):
                tensors[id(value)] = value
    return tensors


def left_nodes(gm: fx.GraphModule, cut: Iterable[fx.Node]) -> dict[fx.Node, None]:
    """The nodes still computed at every step once the values of `cut` are given."""
    outputs = list(gm.graph.find_nodes(op="output"))
    return extract_nodes(gm, outputs, [*gm.graph.find_nodes(op="placeholder"), *cut])


def looks_up(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node reads a table by timestep."""
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), QuantTimestepTable)
    return is_timestep_row(node)


def has_lookups(gm: fx.GraphModule) -> bool:
    """Whether a graph reads any table by timestep."""
    return any(looks_up(gm, node) for node in gm.graph.nodes)


def _outweighing(
    gm: fx.GraphModule,
    cut: tuple[fx.Node, ...],
    inside: dict[fx.Node, set[fx.Node]],
    cost: Callable[[fx.Node], int],
) -> dict[fx.Node, str]:
    """The values of `cut` that take more bytes than the weights that leave for them, with reasons.

    A tensor that several values need counts for each with its share.  Rows of tables take as much
    as the tables: they are not refused.
    """
    needed = tensors_of(gm, left_nodes(gm, cut))
    freed = {
        node: {key: t.nbytes for key, t in tensors_of(gm, nodes).items() if key not in needed}
        for node, nodes in inside.items()
    }
    count = Counter(key for tensors in freed.values() for key in tensors)
    refused = {}
    for node, tensors in freed.items():
        if not any(is_heavy(gm, n) or n.op == "call_module" for n in inside[node]):
            continue
        weights = sum(size / count[key] for key, size in tensors.items())
        if cost(node) > weights:
            refused[node] = (
                f"its rows would take {cost(node)} bytes and the weights they replace "
                f"{round(weights)}"
            )
    return refused


def _obstacles(
    gm: fx.GraphModule, early: Collection[fx.Node], times: BindingTimes
) -> dict[fx.Node, str]:
    """Why a value cannot be computed before the steps, for each that cannot."""
    t = timestep_node(gm)
    placeholders = gm.graph.find_nodes(op="placeholder")
    known = [t, *(n for n in placeholders if n.target in times.conditions)]
    batch = t.meta["val"].shape[0]
    reasons: dict[fx.Node, str] = {}
    for node, names in missing_inputs(gm, early, known).items():
        value = node.meta.get("val")
        if names:
            reasons[node] = f"it takes {', '.join(sorted(names))} of the sample"
        elif not isinstance(value, Tensor):
            reasons[node] = "it is not a tensor"
        elif (
            times[node] is Binding.T
            and isinstance(batch, torch.SymInt)  # a number may be equal by chance
            and str(batch) in map(str, value.shape[1:])
        ):
            reasons[node] = f"its shape {tuple(value.shape)} does not begin with the batch"
    return reasons
