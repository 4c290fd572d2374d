"""The temporal block: the values that depend on the timestep alone.

A minimum cut chooses which of them are worth storing.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .binding_times import Binding, BindingTimes, binding_times
from .graph import module_path, timestep_node
from .graph_pass import Declined
from .min_cut import minimum_cut
from .node_info import has_weights, is_heavy, op_name
from .subgraphs import extract, extract_nodes


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
