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
from .graph import call_method, module_path, timestep_node
from .graph_pass import Declined
from .min_cut import minimum_cut, stored_bytes
from .node_info import has_weights, is_heavy
from .row_copies import batches_adjacent, rows_per_sample
from .subgraphs import extract, extract_nodes, missing_inputs


@dataclass(frozen=True, slots=True)
class Feature:
    """One value of the temporal block that code outside the block reads.

    name: path of the module that computes it, made unique.  node: in the analysed graph.
    shape: of the value for one sample; where the node has several rows for each sample, as for the
    frames of a video, they are its first dimension.  apart: whether those rows lie a batch apart
    in the node's value (frames * batch, ...), not next to each other.
    """

    name: str
    node: fx.Node
    shape: tuple[int, ...]
    dtype: torch.dtype
    path: str
    apart: bool = False

    @property
    def width(self) -> int:
        """The number of elements per timestep."""
        return torch.Size(self.shape).numel()

    @property
    def several(self) -> bool:
        """Whether there are several rows for each sample."""
        return bool(len(self.shape) == self.node.meta["val"].dim())

    def stored(self, rows: Tensor) -> Tensor:
        """The rows (K, *shape) as a table holds them: without the rows for each sample but the
        first where these are copies of it, bit for bit."""
        if not self.several or rows.is_meta or not torch.equal(rows, rows[:, :1].expand_as(rows)):
            return rows
        return rows[:, 0]


@dataclass(frozen=True, slots=True)
class TemporalBlock:
    """The part of a graph that depends on the timestep alone, up to the cut.

    features: its outputs, in graph order.  modules: paths of its modules with weights.
    uses: feature name -> the modules it needs.  graph: t (B,) -> tuple of features (B, *shape); it
    shares the modules.  declined: values that stay outside, and why.
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
    minimum vertex cut.  Empty where there are none.  Each value is a tensor with the batch, or a
    fixed multiple of it, as dimension 0, the others static.  Declined are values that cannot be
    stored.
    """
    early = {n for n in gm.graph.nodes if n.op != "output" and times[n].join(upto) is upto}
    heavy = {n for n in early if times[n] is not Binding.CONSTANT and is_heavy(gm, n)}
    batch = timestep_node(gm).meta["val"].shape[0]
    known = [node for node in early if node.op == "placeholder"]
    reasons = {
        node: _obstacle(node, batch, names)
        for node, names in missing_inputs(gm, early, known).items()
    }
    obstacles = {node: reason for node, reason in reasons.items() if reason}
    return minimum_cut(gm.graph, early, heavy=heavy, obstacles=obstacles, cost=stored_bytes)


def _obstacle(node: fx.Node, batch: int | torch.SymInt, missing: Collection[str]) -> str:
    """Why a value cannot be a row of a table; "" where it can."""
    value = node.meta.get("val")
    if missing:
        return f"it takes {', '.join(sorted(missing))} as well as the timestep"
    if not isinstance(value, Tensor):
        return "it is not a tensor"
    if not (value.is_floating_point() or value.is_complex()):
        return f"it holds {value.dtype}"
    rows = rows_per_sample(value.shape[0], batch) if value.dim() else None
    if rows is None:
        return f"its shape {tuple(value.shape)} does not begin with the batch"
    if not all(isinstance(size, int) for size in value.shape[1:]):
        return f"its shape {tuple(value.shape)} is not static"
    if rows > 1 and batches_adjacent(node, batch) is None:
        return f"the order of its {rows} rows for each sample is not known"
    return ""


def temporal_block(gm: fx.GraphModule) -> TemporalBlock:
    """The temporal block of a graph; empty where nothing heavy depends on the timestep alone."""
    times, start = binding_times(gm), [timestep_node(gm)]
    cut, declined = temporal_cut(gm, times)
    features: dict[str, Feature] = {}
    batch = start[0].meta["val"].shape[0]
    for node in cut:
        path, value = producer(node), node.meta["val"]
        numbered = (f"_{n}" if n else "" for n in itertools.count())
        name = next(n for end in numbered if (n := (path or node.name) + end) not in features)
        rows = rows_per_sample(value.shape[0], batch) or 1
        shape = (*([rows] if rows > 1 else []), *map(int, value.shape[1:]))
        apart = rows > 1 and bool(batches_adjacent(node, batch))
        features[name] = Feature(name, node, shape, value.dtype, path, apart)
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
        graph=by_sample(extract(gm, cut, start), features.values()),
        declined=(*declined, *times.notes),
    )


def by_sample(graph: fx.GraphModule, features: Iterable[Feature | None]) -> fx.GraphModule:
    """An extracted graph, changed to return the value of each feature as (B, *shape); values that
    have None there stay."""
    (output,) = graph.graph.find_nodes(op="output")
    values: Any = output.args[0]
    with graph.graph.inserting_before(output):
        output.args = (tuple(map(_one_sample_each, features, values)),)
    graph.recompile()
    return graph


def _one_sample_each(feature: Feature | None, value: fx.Node) -> fx.Node:
    if feature is None or not feature.several:
        return value
    if not feature.apart:
        return call_method(value, "reshape", -1, *feature.shape)
    rows, *rest = feature.shape
    return call_method(call_method(value, "reshape", rows, -1, *rest), "transpose", 0, 1)


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
