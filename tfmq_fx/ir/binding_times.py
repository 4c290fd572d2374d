"""Compute which inputs must be known before each value of a graph: its binding time.

Shape, dtype and device reads are not dependences.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import fx

from tfmq_fx.core.errors import ConfigError

from .graph import timestep_node
from .graph_pass import Declined
from .node_info import is_random, value_inputs, writers

RANDOM, WRITTEN = "<random>", "<written in place>"  # stand for inputs in BindingTimes.deps


class Binding(enum.IntEnum):
    """The inputs that a value depends on: timestep (T), conditions (C), sample (X); none first."""

    CONSTANT = 0
    T = 1
    C = 2
    TC = 3
    X = 7

    def join(self, other: Binding) -> Binding:
        """The binding time of a value computed from two values."""
        return Binding(self | other)


@dataclass(frozen=True, slots=True)
class BindingTimes:
    """The binding time of every node of one graph.

    deps: names of the inputs that each node depends on by value, or RANDOM or WRITTEN.
    notes: nodes that count as depending on the sample though no sample reaches them, and why.
    """

    timestep: str
    conditions: frozenset[str]
    deps: Mapping[fx.Node, frozenset[str]]
    notes: tuple[Declined, ...]

    def __getitem__(self, node: fx.Node) -> Binding:
        names = self.deps[node]
        if not names <= {self.timestep, *self.conditions}:
            return Binding.X
        return Binding((self.timestep in names) + Binding.C * bool(names & self.conditions))


def binding_times(gm: fx.GraphModule, conditions: Collection[str] = ()) -> BindingTimes:
    """The binding time of every node.

    conditions: placeholders fixed for a whole request.  A random operation, and a write in place
    (the value written and all that may share its memory, before and after), count as depending on
    the sample.  Raises ConfigError for a condition that is no input, or is the timestep.
    """
    timestep = str(timestep_node(gm).target)
    inputs = gm.graph.find_nodes(op="placeholder")
    others = sorted({str(node.target) for node in inputs} - {timestep})
    if unknown := sorted(set(conditions) - set(others)):
        raise ConfigError(f"no condition {', '.join(unknown)}; choose from {', '.join(others)}")
    deps: dict[fx.Node, frozenset[str]] = {node: frozenset() for node in gm.graph.nodes}
    deps |= {node: frozenset([str(node.target)]) for node in inputs}
    random = [node for node in gm.graph.nodes if is_random(gm, node)]
    writes = list(writers(gm))
    for node in random:
        deps[node] |= {RANDOM}
    for node, written in writes:
        for touched in {node} | written:
            deps[touched] |= {WRITTEN}
    before: dict[fx.Node, frozenset[str]] = {}
    while before != deps:  # writes carry values backwards, so one sweep is not always enough
        before = dict(deps)
        for node in gm.graph.nodes:
            deps[node] = deps[node].union(*(deps[used] for used in value_inputs(node)))
        for node, written in writes:
            for touched in written:
                deps[touched] |= deps[node]
    quiet = {timestep, *conditions, RANDOM, WRITTEN}
    notes = [
        Declined(node.name, f"{what}; counts as depending on the sample")
        for what, nodes in (
            ("a random operation", random),
            ("writes in place", [node for node, _ in writes]),
        )
        for node in nodes
        if deps[node] <= quiet  # the others depend on the sample anyway
    ]
    return BindingTimes(timestep, frozenset(conditions), deps, tuple(notes))
