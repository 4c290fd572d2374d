"""What depends on what: binding times and the temporal block.

The binding time of a value says which inputs must be known before it can be computed. Shape, dtype
and device reads are not dependences. Values that depend on the timestep alone form the temporal
block; a minimum cut chooses which of them are worth storing.
"""

from __future__ import annotations

import enum
import itertools
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .cuts import minimum_cut
from .errors import ConfigError
from .graph import Declined, module_path, timestep_node
from .ops import has_weights, is_heavy, is_random, op_name, value_inputs, writers
from .regions import extract, extract_nodes

RANDOM, WRITTEN = "<random>", "<written in place>"  # stand for inputs in BindingTimes.deps


class Binding(enum.IntEnum):
    """When a value is known, earliest first: t is the timestep, c the conditions, x the sample."""

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

    deps: names of the inputs each node depends on by value, RANDOM and WRITTEN among them.
    notes: nodes that count as depending on the sample though no sample reaches them, and why.
    """

    timestep: str
    conditions: frozenset[str]
    deps: Mapping[fx.Node, frozenset[str]]
    notes: tuple[Declined, ...]

    def __getitem__(self, node: fx.Node) -> Binding:
        names, known = self.deps[node], {self.timestep, *self.conditions}
        if not names <= known:
            return Binding.X
        at_t = Binding.T if self.timestep in names else Binding.CONSTANT
        return at_t.join(Binding.C if names & self.conditions else Binding.CONSTANT)


@dataclass(frozen=True, slots=True)
class Feature:
    """A value of the temporal block that code outside it consumes.

    name: path of the module that computes it, made unique.  node: in the analysed graph.
    shape: without the batch dimension.
    """

    name: str
    node: fx.Node
    shape: tuple[int, ...]
    dtype: torch.dtype
    path: str

    @property
    def width(self) -> int:
        """Values per timestep."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True)
class TemporalBlock:
    """The part of a graph that depends on the timestep alone, up to the cut.

    features: what it computes, in graph order.  modules: paths of the modules with weights in it.
    uses: feature name -> the modules it needs.  graph: t (B,) -> tuple of features; it shares the
    modules.  declined: what stays outside, and why.
    """

    features: tuple[Feature, ...]
    modules: tuple[str, ...]
    uses: Mapping[str, tuple[str, ...]]
    graph: fx.GraphModule
    declined: tuple[Declined, ...]

    @property
    def own(self) -> dict[str, tuple[str, ...]]:
        """Feature name -> the modules that no other feature needs."""
        shared = set(self.shared)
        return {f: tuple(m for m in used if m not in shared) for f, used in self.uses.items()}

    @property
    def shared(self) -> tuple[str, ...]:
        """The modules that several features need."""
        count = Counter(module for used in self.uses.values() for module in used)
        return tuple(module for module in self.modules if count[module] > 1)

    def summary(self) -> dict[str, Any]:
        """JSON-ready facts for a report."""
        return {
            "features": [[f.name, list(f.shape), str(f.dtype)] for f in self.features],
            "modules": list(self.modules),
            "shared": list(self.shared),
            "declined": [[d.site, d.reason] for d in self.declined],
        }


# ---------------------------------------------------------------------------- binding times


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


# ---------------------------------------------------------------------------- the temporal cut


def temporal_cut(
    gm: fx.GraphModule, times: BindingTimes, upto: Binding = Binding.T
) -> tuple[fx.Node, ...]:
    """The values to store so that no heavy operation known by `upto` stays, in graph order.

    The cheapest set, in bytes per timestep, between operations with weights (and matrix products)
    that depend on t alone (upto=TC: on t and the conditions) and whatever reads their results: a
    minimum vertex cut.  Empty where there are none.  Each value is a tensor with the batch as
    dimension 0, the others static.
    """
    return _cut(gm, times, upto)[0]


def _cut(
    gm: fx.GraphModule, times: BindingTimes, upto: Binding = Binding.T
) -> tuple[tuple[fx.Node, ...], list[Declined]]:
    early = {n for n in gm.graph.nodes if n.op != "output" and times[n].join(upto) is upto}
    heavy = {n for n in early if times[n] is not Binding.CONSTANT and is_heavy(gm, n)}
    return minimum_cut(
        gm.graph, early, heavy=heavy, obstacles=_obstacles(gm, early), cost=_row_bytes
    )


def _obstacles(gm: fx.GraphModule, early: Collection[fx.Node]) -> dict[fx.Node, str]:
    """Why a value that depends on t alone cannot be a row of a table, for each that cannot."""
    timestep = timestep_node(gm)
    batch = _expr(timestep.meta["val"].shape[0])
    needs: dict[fx.Node, frozenset[str]] = {timestep: frozenset()}  # beyond t and the batch size
    found: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        if node not in early or node is timestep:
            continue
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr == batch:
            needs[node] = frozenset()
        elif isinstance(value, torch.SymInt) and op_name(node) == "sym_size":
            needs[node] = frozenset([f"size {value}"])
        else:
            used = (needs.get(u, frozenset([u.name])) for u in node.all_input_nodes)
            needs[node] = frozenset().union(*used)
        if reason := _obstacle(value, batch, needs[node]):
            found[node] = reason
    return found


def _obstacle(value: Any, batch: Any, needs: frozenset[str]) -> str:
    if isinstance(batch, int) and batch != 1:
        return f"the graph was captured for batch size {batch} only"
    if needs:
        return f"it takes {', '.join(sorted(needs))} as well as the timestep"
    if not isinstance(value, Tensor):
        return "it is not a tensor"
    if not (value.is_floating_point() or value.is_complex()):
        return f"it holds {value.dtype}"
    if value.dim() == 0 or _expr(value.shape[0]) != batch:
        return f"its shape {tuple(value.shape)} does not begin with the batch"
    if not all(isinstance(size, int) for size in value.shape[1:]):
        return f"its shape {tuple(value.shape)} is not static"
    return ""


def _expr(size: int | torch.SymInt) -> Any:
    """A size that can be compared without leaving a guard in the shape environment."""
    return size if isinstance(size, int) else size.node.expr


def _row_bytes(node: fx.Node) -> int:
    value: Tensor = node.meta["val"]
    return max(1, value.shape[1:].numel() * value.element_size())


def temporal_block(gm: fx.GraphModule) -> TemporalBlock:
    """The temporal block of a graph; empty where nothing heavy depends on the timestep alone."""
    times, start = binding_times(gm), [timestep_node(gm)]
    cut, declined = _cut(gm, times)
    features: dict[str, Feature] = {}
    for node in cut:
        name, path = _unique(producer(node) or node.name, features), producer(node)
        value: Tensor = node.meta["val"]
        shape = tuple(map(int, value.shape[1:]))
        features[name] = Feature(name, node, shape, value.dtype, path)
    uses = {f.name: _weighted(gm, extract_nodes(gm, [f.node], start)) for f in features.values()}
    used = set().union(*uses.values())
    inside = extract_nodes(gm, cut, start)
    declined += [
        Declined(path, "its weights serve the rest of the model as well")
        for path in _weighted(gm, (node for node in gm.graph.nodes if node not in inside))
        if path in used
    ]
    return TemporalBlock(
        features=tuple(features.values()),
        modules=tuple(path for path in _weighted(gm, inside) if path in used),
        uses=uses,
        graph=extract(gm, cut, start),
        declined=(*declined, *times.notes),
    )


def _unique(name: str, taken: Collection[str]) -> str:
    numbered = (f"{name}_{n}" if n else name for n in itertools.count())
    return next(each for each in numbered if each not in taken)


def producer(node: fx.Node) -> str:
    """The path of the module that computes a node; "" where it is the model itself."""
    return str(node.target) if node.op == "call_module" else module_path(node)


def _weighted(gm: fx.GraphModule, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """Paths of the modules whose weights `nodes` use, in order of first use."""
    found: dict[str, None] = {}
    for node in nodes:
        target = str(node.target)
        if node.op == "call_module" and has_weights(gm.get_submodule(target)):
            found[target] = None
        elif node.op == "get_attr" and isinstance(operator.attrgetter(target)(gm), nn.Parameter):
            found[target.rpartition(".")[0]] = None
    return tuple(found)
