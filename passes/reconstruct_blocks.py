"""Learn the rounding of each block so that its output is the full-precision one (BRECQ, AdaRound).

block_q(x_q), rounding as given    ->    block_q(x_q), rounding and bias learnt against block(x)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.blocks import Unit, unit_nodes, units
from tfmq_fx.config import ReconstructionSpec
from tfmq_fx.dialect import Stage
from tfmq_fx.graph import Declined, Rewrite, graph_pass
from tfmq_fx.nn import QuantLayer
from tfmq_fx.progress import progress_bar
from tfmq_fx.regions import extract, region_inputs, region_outputs
from tfmq_fx.sites import find_sites
from tfmq_fx.soft import SoftLayer, learn, start_of
from tfmq_fx.walk import Walk

Batch = tuple[tuple[Any, ...], tuple[Tensor, ...]]


@graph_pass(takes=Stage.QUANTIZED, gives=Stage.QUANTIZED)
def reconstruct_blocks(
    gm: fx.GraphModule,
    *,
    reference: fx.GraphModule,
    chunks: Sequence[Sequence[Tensor]],
    spec: ReconstructionSpec,
    skip: Collection[str] = (),
    progress: bool = False,
) -> Rewrite:
    """The graph with the rounding of every block learnt, in execution order.

    Target: the full-precision block on the full-precision input.  Input: the same point of the
    model quantized so far.  A block whose decided rounding is no better keeps what it had.
    reference: the captured graph.  chunks: placeholder values.  skip: sites to leave.
    """
    full, quantized = Walk(reference, chunks), Walk(gm, chunks)
    generator = torch.Generator().manual_seed(spec.seed)
    declined, errors, sites = [], {}, []
    for site in find_sites(gm)[0]:
        if site.name in skip or not isinstance(site.layer, QuantLayer):
            continue
        if len(site.nodes) == 1:
            sites.append(site)
        else:
            reason = f"called {len(site.nodes)} times: no block holds all that it does"
            declined.append(Declined(site.name, reason))
    parts = [part for unit in units(sites) for part in _alone(unit, _view(gm, unit, full))]
    # Sites of a unit that is no region of its own may take turns with those of others.
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    parts.sort(key=lambda part: order[part.sites[0].nodes[0]])
    for part in progress_bar(parts, "block reconstruction", enabled=progress):
        view = _view(gm, part, full)
        if view is None:
            declined.append(Declined(part.path, "its outputs are not in the captured graph"))
            continue
        batches = _batches(view, full, quantized)
        result = _reconstruct(gm, reference, part, view, batches, spec, generator)
        errors[part.path] = result
        if result["after"] >= result["before"]:
            declined.append(Declined(part.path, "learnt rounding is no better"))
    changed = sum(e["after"] < e["before"] for e in errors.values())
    return Rewrite(gm, changed, declined, {"error": errors})


@dataclass(frozen=True, slots=True)
class _View:
    """A unit as a region of the quantized graph: what goes in and out, and when it starts."""

    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    first: fx.Node


def _alone(unit: Unit, view: _View | None) -> list[Unit]:
    """The unit, or its sites one by one where it is not a region of its own."""
    if view is not None or len(unit.sites) == 1:
        return [unit]
    return [Unit(site.name, (site,)) for site in unit.sites]


def _view(gm: fx.GraphModule, unit: Unit, full: Walk) -> _View | None:
    """The unit's region, or None unless all its inputs come before its first layer and its
    outputs stand in the full-precision graph under the same names."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    nodes = unit_nodes(gm, unit)
    outputs = [n for n in region_outputs(nodes) if isinstance(n.meta["val"], Tensor)]
    first = min((node for site in unit.sites for node in site.nodes), key=order.__getitem__)
    ordered = region_inputs(nodes)
    if not outputs or not all(full.has(node.name) for node in outputs):
        return None
    if any(order[node] > order[first] for node in ordered):
        return None
    return _View(tuple(ordered), tuple(outputs), first)


def _batches(view: _View, full: Walk, quantized: Walk) -> list[Batch]:
    quantized.keep(view.inputs)
    quantized.stop_before(view.first)
    wanted = [full.node(node.name) for node in view.outputs]
    full.keep(wanted)
    full.run_past(wanted)
    batches = [
        (
            tuple(quantized.values[node][i] for node in view.inputs),
            tuple(full.values[node][i] for node in wanted),
        )
        for i in range(len(quantized.chunks))
    ]
    full.release()
    quantized.release()
    return batches


def _reconstruct(
    gm: fx.GraphModule,
    reference: fx.GraphModule,
    unit: Unit,
    view: _View,
    batches: list[Batch],
    spec: ReconstructionSpec,
    generator: torch.Generator,
) -> dict[str, float]:
    block = extract(gm, view.outputs, view.inputs)
    before = _error(block, batches)
    soft = {}
    for site in unit.sites:
        layer, original = gm.get_submodule(site.name), reference.get_submodule(site.name).weight
        assert isinstance(layer, QuantLayer) and isinstance(original, Tensor)
        soft[site.name] = SoftLayer(layer, start_of(layer, original), quantize_input=True)
        block.set_submodule(site.name, soft[site.name])
    learn(
        block,
        list(soft.values()),
        batches,
        before=before,
        iters=spec.iters,
        learning_rate=spec.learning_rate,
        regularization=spec.regularization,
        generator=generator,
        name=unit.path,
    )
    made = {name: layer.decided() for name, layer in soft.items()}
    for name, module in made.items():
        block.set_submodule(name, module)
    after = _error(block, batches)
    if after < before:
        for name, module in made.items():
            gm.set_submodule(name, module)
    return {"before": before, "after": after}


@torch.no_grad()
def _error(block: fx.GraphModule, batches: list[Batch]) -> float:
    """Squared error of all outputs over all batches, relative to the targets' power."""
    error, power = 0.0, 1e-12
    for inputs, targets in batches:
        for out, target in zip(block(*inputs), targets, strict=True):
            error += float((out.float() - target.float()).square().sum())
            power += float(target.float().square().sum())
    return error / power
