"""Learn the rounding of each block so that its output is the full-precision one (BRECQ, AdaRound).

block_q(x_q), rounding as given    ->    block_q(x_q), rounding and bias learnt against block(x)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from tfmq_fx.blocks import Unit, unit_nodes, units
from tfmq_fx.checkpoint import rounded_state, seeded_generator, with_rounded_state
from tfmq_fx.config import ReconstructionSpec
from tfmq_fx.dialect import Stage
from tfmq_fx.graph import Declined, Rewrite, fork, graph_pass
from tfmq_fx.nn import QuantLayer
from tfmq_fx.progress import progress_bar
from tfmq_fx.regions import extract, region_inputs, region_outputs
from tfmq_fx.sites import find_sites
from tfmq_fx.soft import (
    Batch,
    SoftLayer,
    learn,
    nearest_of,
    start_of,
    sum_of_squares,
    with_float_inputs,
)
from tfmq_fx.walk import Walk


@graph_pass(takes=Stage.QUANTIZED, gives=Stage.QUANTIZED)
def reconstruct_blocks(
    gm: fx.GraphModule,
    *,
    reference: fx.GraphModule,
    chunks: Sequence[Sequence[Tensor]],
    spec: ReconstructionSpec,
    iters: int,
    skip: Collection[str] = (),
    progress: bool = False,
) -> Rewrite:
    """The graph with the rounding of every block learnt, in execution order.

    Target: the full-precision block on the full-precision input.  Input: the same point of the
    model quantized so far; its activations are in full precision throughout, while weights are
    learnt and compared, where spec.quantize_inputs is False.
    Each block ends with the best of three: the rounding it had, the learnt one, and its weights
    rounded to nearest.  It keeps what it had where none is better or none is finite.
    reference: the captured graph.  chunks: placeholder values.  iters: Adam steps for each block.
    skip: sites to leave.
    """
    seen = gm if spec.quantize_inputs else _with_float_inputs(gm)
    full, quantized = Walk(reference, chunks), Walk(seen, chunks)
    declined, errors, sites, changed = [], {}, [], 0
    for site in find_sites(seen)[0]:
        if site.name in skip or not isinstance(site.layer, QuantLayer):
            continue
        if len(site.nodes) == 1:
            sites.append(site)
        else:
            reason = f"called {len(site.nodes)} times: no block holds all that it does"
            declined.append(Declined(site.name, reason))
    parts = [part for unit in units(sites) for part in _alone(unit, _view(seen, unit, full))]
    # Sites of a unit that is no region of its own may take turns with those of others.
    order = {node: i for i, node in enumerate(seen.graph.nodes)}
    parts.sort(key=lambda part: order[part.sites[0].nodes[0]])
    for part in progress_bar(parts, "block reconstruction", enabled=progress):
        view = _view(seen, part, full)
        if view is None:
            declined.append(Declined(part.path, "its outputs are not in the captured graph"))
            continue
        batches = _batches(view, full, quantized)
        found = _reconstruct(seen, reference, part, view, batches, spec, iters)
        errors[part.path] = found.errors
        if found.note:
            declined.append(Declined(part.path, found.note))
        for name, state in found.states.items():
            for graph in {gm, seen}:
                layer = graph.get_submodule(name)
                assert isinstance(layer, QuantLayer)
                graph.set_submodule(name, with_rounded_state(layer, state))
        changed += bool(found.states)
    return Rewrite(gm, changed, declined, {"error": errors})


def _with_float_inputs(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with every quantized layer reading its input as it comes."""
    made = fork(gm)
    for name, layer in list(made.named_modules()):
        if isinstance(layer, QuantLayer):
            made.set_submodule(name, with_float_inputs(layer))
    return made


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
        Batch(
            tuple(quantized.values[node][i] for node in view.inputs),
            tuple(full.values[node][i] for node in wanted),
        )
        for i in range(len(quantized.chunks))
    ]
    full.release()
    quantized.release()
    return batches


@dataclass(frozen=True, slots=True)
class _Found:
    """What became of a block.

    errors: relative squared error of its outputs as given, rounded to nearest, and learnt.
    states: `rounded_state` of each layer, empty where they stay.  note: why not the learnt ones.
    """

    errors: dict[str, float]
    states: dict[str, dict[str, Tensor]]
    note: str


def _reconstruct(
    gm: fx.GraphModule,
    reference: fx.GraphModule,
    unit: Unit,
    view: _View,
    batches: Sequence[Batch],
    spec: ReconstructionSpec,
    iters: int,
) -> _Found:
    block = extract(gm, view.outputs, view.inputs)
    soft, nearest = dict[str, SoftLayer](), dict[str, QuantLayer]()
    errors = {"before": _error(block, batches)}
    for site in unit.sites:
        layer, original = gm.get_submodule(site.name), reference.get_submodule(site.name)
        assert isinstance(layer, QuantLayer) and isinstance(original.weight, Tensor)
        assert original.bias is None or isinstance(original.bias, Tensor)
        soft[site.name] = SoftLayer(layer, start_of(layer, original.weight), quantize_input=True)
        nearest[site.name] = nearest_of(layer, original.weight, original.bias)
    errors["nearest"] = _error(_with(block, nearest), batches)
    stopped = learn(
        _with(block, soft),
        list(soft.values()),
        batches,
        before=errors["before"] if math.isfinite(errors["before"]) else 1.0,
        iters=iters,
        learning_rate=spec.learning_rate,
        regularization=spec.regularization,
        generator=seeded_generator(spec.seed, unit.path),
    )
    learnt = {name: layer.decided() for name, layer in soft.items()}
    errors["after"] = math.nan if stopped else _error(_with(block, learnt), batches)
    kept = min(errors, key=lambda name: (not math.isfinite(errors[name]), errors[name]))
    if not math.isfinite(errors[kept]):
        kept = "before"
    layers = {"before": {}, "nearest": nearest, "after": learnt}[kept]
    note = ""
    if kept != "after":
        form = "what it had" if kept == "before" else "nearest rounding"
        why = stopped or f"learnt rounding is no better ({errors['after']:.4g})"
        note = f"{why}: kept {form} ({errors[kept]:.4g})"
    return _Found(errors, {name: rounded_state(layer) for name, layer in layers.items()}, note)


def _with(block: fx.GraphModule, layers: Mapping[str, nn.Module]) -> fx.GraphModule:
    """`block` with other layers in the place of its own."""
    for name, layer in layers.items():
        block.set_submodule(name, layer)
    return block


@torch.no_grad()
def _error(block: fx.GraphModule, batches: Sequence[Batch]) -> float:
    """Squared error of all outputs over all batches, relative to the targets' power."""
    error, power = 0.0, 1e-12
    for batch in batches:
        error += sum(float(sum_of_squares(r)) for r in batch.residuals(block(*batch.inputs)))
        power += sum(map(float, batch.power()))
    return error / power
