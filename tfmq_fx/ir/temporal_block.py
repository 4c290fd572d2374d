"""Find the temporal information block (TIB): the values that depend on the timestep alone.

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
from .min_cut import minimum_cut, stored_bytes
from .node_info import has_weights, is_heavy
from .subgraphs import extract, extract_nodes, missing_inputs


@dataclass(frozen=True, slots=True)
class Feature:
    """One value of the temporal block that code outside the block reads.

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
        """The number of elements per timestep."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True)
class TemporalBlock:
    """The part of a graph that depends on the timestep alone, up to the cut.

    features: its outputs, in graph order.  modules: paths of its modules with weights.
    uses: feature name -> the modules it needs.  graph: t (B,) -> tuple of features; it shares the
    modules.  declined: values that stay outside, and why.
    """

    features: tuple[Feature, ...]
    modules: tuple[str, ...]
    uses: Mapping[str, tuple[str, ...]]
    graph: fx.GraphModule
    declined: tuple[Declined, ...]

    @property
    def shared(self) -> tuple[str, ...]:
        """The paths of the modules that several features need."""
        count = Counter(module for used in self.uses.values() for module in used)
        return tuple(module for module in self.modules if count[module] > 1)

    def summary(self) -> dict[str, Any]:
        """The block as JSON-ready facts for a report."""
        return {
            "features": [[f.name, list(f.shape), str(f.dtype)] for f in self.features],
            "modules": list(self.modules),
            "shared": list(self.shared),
            "declined": [[d.site, d.reason] for d in self.declined],
        }


def temporal_cut(
    gm: fx.GraphModule, times: BindingTimes, upto: Binding = Binding.T
) -> tuple[tuple[fx.Node, ...], list[Declined]]:
    """The values to store so that no heavy operation known by `upto` stays, in graph order.

    The cheapest set, in bytes per timestep, between operations with weights (and matrix products)
    that depend on t alone (upto=TC: on t and the conditions) and whatever reads their results: a
    minimum vertex cut.  Empty where there are none.  Each value is a tensor with the batch as
    dimension 0, the others static.  Declined are values that cannot be stored.
    """
    early = {n for n in gm.graph.nodes if n.op != "output" and times[n].join(upto) is upto}
    heavy = {n for n in early if times[n] is not Binding.CONSTANT and is_heavy(gm, n)}
    batch = _expr(timestep_node(gm).meta["val"].shape[0])
    known = [node for node in early if node.op == "placeholder"]
    reasons = {
        node: _obstacle(node.meta.get("val"), batch, names)
        for node, names in missing_inputs(gm, early, known).items()
    }
    obstacles = {node: reason for node, reason in reasons.items() if reason}
    return minimum_cut(gm.graph, early, heavy=heavy, obstacles=obstacles, cost=stored_bytes)


def _obstacle(value: Any, batch: Any, missing: Collection[str]) -> str:
    """Why a value cannot be a row of a table; "" where it can."""
    if isinstance(batch, int) and batch != 1:
        return f"the graph was captured for batch size {batch} only"
    if missing:
        return f"it takes {', '.join(sorted(missing))} as well as the timestep"
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


def temporal_block(gm: fx.GraphModule) -> TemporalBlock:
    """The temporal block of a graph; empty where nothing heavy depends on the timestep alone."""
    times, start = binding_times(gm), [timestep_node(gm)]
    cut, declined = temporal_cut(gm, times)
    features: dict[str, Feature] = {}
    for node in cut:
        path, value = producer(node), node.meta["val"]
        numbered = (f"_{n}" if n else "" for n in itertools.count())
        name = next(n for end in numbered if (n := (path or node.name) + end) not in features)
        features[name] = Feature(name, node, tuple(map(int, value.shape[1:])), value.dtype, path)
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


def producer(node: fx.Node) -> str:
    """The path of the module that computes a node; "" where it is the model itself."""
    return str(node.target) if node.op == "call_module" else module_path(node)


def _weighted(gm: fx.GraphModule, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """Paths of the modules whose weights `nodes` use, in order of first use."""
    paths: dict[str, None] = {}
    for node in nodes:
        target = str(node.target)
        if node.op == "call_module" and has_weights(gm.get_submodule(target)):
            paths[target] = None
        elif node.op == "get_attr" and isinstance(operator.attrgetter(target)(gm), nn.Parameter):
            paths[target.rpartition(".")[0]] = None
    return tuple(paths)
