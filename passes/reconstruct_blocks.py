"""Learn the rounding of each block so that its output is the full-precision one (BRECQ, AdaRound).

block_q(x_q), rounding as given    ->    block_q(x_q), rounding and bias learnt against block(x)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.calibration.activation_store import ActivationStore
from tfmq_fx.calibration.executor import ChunkValues, LayerwiseExecutor
from tfmq_fx.core.config import ReconstructionSpec
from tfmq_fx.core.distributed import exchange, rank, world
from tfmq_fx.core.progress import progress_bar
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph import batched_inputs, fork, timestep_node, timestep_position
from tfmq_fx.ir.graph_pass import Declined, Rewrite, graph_pass
from tfmq_fx.ir.node_info import writers
from tfmq_fx.ir.reconstruction_units import Unit, unit_nodes, units
from tfmq_fx.ir.sites import find_sites
from tfmq_fx.ir.subgraphs import extract, region_inputs, region_outputs
from tfmq_fx.quant.activation import QuantActivation
from tfmq_fx.quant.adaround import (
    AdaRoundLayer,
    Batch,
    learn,
    nearest_of,
    start_of,
    sum_of_squares,
    with_float_inputs,
)
from tfmq_fx.quant.modules import weight_rows
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.serialization.checkpoint import (
    Checkpoint,
    Part,
    finished,
    record,
    rounded_state,
    seeded_generator,
    with_rounded_state,
)


@graph_pass(takes=Stage.QUANTIZED, gives=Stage.QUANTIZED)
def reconstruct_blocks(
    gm: fx.GraphModule,
    *,
    reference: fx.GraphModule,
    chunks: Sequence[Sequence[Tensor]],
    spec: ReconstructionSpec,
    iters: int,
    weights: Sequence[Tensor] | None = None,
    skip: Collection[str] = (),
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
) -> Rewrite:
    """The graph with the rounding of every block learnt, in execution order.

    Target: the full-precision block on the full-precision input.  Input: the same point of the
    model quantized so far; its activations are in full precision throughout, while weights are
    learnt and compared, where spec.quantize_inputs is False.
    Each block ends with the best of three: the rounding it had, the learnt one, and its weights
    rounded to nearest.  It keeps what it had where none is better or none is finite.
    reference: the captured graph.  chunks: placeholder values.  iters: Adam steps for each block.
    weights: for each chunk those of its samples' squared errors; None is the same for all.
    skip: sites to leave.  checkpoint: where finished blocks are found and put.
    Of many processes each has its rows of every chunk, and gradients are summed; all end with the
    rounding that the first one found.
    """
    seen = gm if spec.quantize_inputs else _with_float_inputs(gm)
    declined, errors, sites, changed = [], {}, [], 0
    for site in find_sites(seen)[0]:
        if site.name in skip or not isinstance(site.layer, QuantLayer):
            continue
        if len(site.nodes) == 1:
            sites.append(site)
        else:
            reason = f"called {len(site.nodes)} times: no block holds all that it does"
            declined.append(Declined(site.name, reason))
    chunks, weights, shares = _own_rows(gm, chunks, weights)
    with ActivationStore(spec.memory) as spill:
        full, quantized = (
            LayerwiseExecutor(graph, chunks, spill=spill) for graph in (reference, seen)
        )
        parts = [part for unit in units(sites) for part in _alone(unit, _view(seen, unit, full))]

        def learnt(unit: Unit, view: _View) -> Part:
            """Learn a block on its inputs and outputs, in front of which the walks stop."""
            outputs = [full.node(node.name) for node in view.outputs]
            quantized.keep(view.inputs)
            quantized.stop_before(view.first)
            full.keep(outputs)
            full.run_past(outputs)
            block = extract(seen, view.outputs, view.inputs)
            inputs = [quantized.values[node] for node in view.inputs]
            targets = [full.values[node] for node in outputs]
            batches = _Batches(block, inputs, targets, weights, shares)
            part = _best(block, reference, unit, batches, spec, iters, split=shares is not None)
            full.release()
            quantized.release()
            return part

        # Sites of a unit that is no region of its own may take turns with those of others.
        order = {node: i for i, node in enumerate(seen.graph.nodes)}
        parts.sort(key=lambda part: order[part.sites[0].nodes[0]])
        for unit in progress_bar(parts, "block reconstruction", enabled=progress):
            view = _view(seen, unit, full)
            if view is None:
                declined.append(Declined(unit.path, "its outputs are not in the captured graph"))
                continue
            make = partial(learnt, unit, view)
            result = finished(checkpoint, unit.path, make, shared=True)
            errors[unit.path] = result.errors
            if result.note:
                declined.append(Declined(unit.path, result.note))
            for name, state in result.states.items():
                for graph in {gm, seen}:
                    layer = graph.get_submodule(name)
                    assert isinstance(layer, QuantLayer)
                    graph.set_submodule(name, with_rounded_state(layer, state))
            changed += bool(result.states)
    return Rewrite(gm, changed, declined, {"error": errors} | record(checkpoint))


def _own_rows(
    gm: fx.GraphModule, chunks: Sequence[Sequence[Tensor]], weights: Sequence[Tensor] | None
) -> tuple[Sequence[Sequence[Tensor]], Sequence[Tensor] | None, list[float] | None]:
    """The rows of each chunk that this process takes, their weights, and their share of the chunk.

    A share is 0 where there are fewer samples than processes, and a sample only stands in.

    With one process, or a graph of fixed size, these are all rows, and None for the shares.
    """
    t = timestep_node(gm)
    size = t.meta["val"].shape[0]
    if world() == 1 or not isinstance(size, torch.SymInt):
        return chunks, weights, None
    place, batched = timestep_position(gm), batched_inputs(gm)
    own, shares, rows = [], [], []
    for chunk in chunks:
        count = len(chunk[place])
        start, stop = (n * count // world() for n in (rank(), rank() + 1))
        shares.append((stop - start) / count)
        rows.append(slice(start, stop) if stop > start else slice(0, 1))
        pairs = zip(chunk, batched, strict=True)
        own.append(tuple(x[rows[-1]].clone() if b else x for x, b in pairs))
    if weights is not None:
        weights = [w[part] for w, part in zip(weights, rows, strict=True)]
    return own, weights, shares


def _with_float_inputs(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph whose quantized layers and products do not round their inputs."""
    forked = fork(gm)
    for name, layer in list(forked.named_modules()):
        if isinstance(layer, QuantLayer):
            forked.set_submodule(name, with_float_inputs(layer))
        elif isinstance(layer, QuantActivation):
            forked.set_submodule(name, _NoRounding())
    return forked


class _NoRounding(nn.Module):
    """Replace a QuantActivation by the identity."""

    stage = Stage.QUANTIZED

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return x


@dataclass(frozen=True, slots=True)
class _View:
    """The region of a unit in the quantized graph: its inputs, outputs and first layer call."""

    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    first: fx.Node


def _alone(unit: Unit, view: _View | None) -> list[Unit]:
    """The unit, or each of its sites as a unit where the whole is no region (`view` is None)."""
    if view is not None or len(unit.sites) == 1:
        return [unit]
    return [Unit(site.name, (site,)) for site in unit.sites]


def _view(gm: fx.GraphModule, unit: Unit, full: LayerwiseExecutor) -> _View | None:
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


class _Batches(Sequence[Batch]):
    """The inputs and target outputs of a block for each chunk, read from where the walks keep them.

    Inputs that the block writes to in place are copies.  shares: of each batch, where processes
    have split them.
    """

    def __init__(
        self,
        block: fx.GraphModule,
        inputs: Sequence[ChunkValues],
        targets: Sequence[ChunkValues],
        weights: Sequence[Tensor] | None,
        shares: Sequence[float] | None,
    ) -> None:
        written = {node for _, bases in writers(block) for node in bases}
        self._copied = [node in written for node in block.graph.find_nodes(op="placeholder")]
        self._inputs, self._targets, self._weights = inputs, targets, weights
        self._shares = shares

    def __len__(self) -> int:
        return len(self._targets[0])

    def __getitem__(self, chunk: Any) -> Any:
        values = [held[chunk] for held in self._inputs]
        inputs = [
            x.clone() if copied else x for x, copied in zip(values, self._copied, strict=True)
        ]
        weights = None if self._weights is None else self._weights[chunk]
        share = 1.0 if self._shares is None else self._shares[chunk]
        return Batch(tuple(inputs), tuple(held[chunk] for held in self._targets), weights, share)


def _best(
    block: fx.GraphModule,
    reference: fx.GraphModule,
    unit: Unit,
    batches: Sequence[Batch],
    spec: ReconstructionSpec,
    iters: int,
    *,
    split: bool = False,
) -> Part:
    """The best rounding of a block: the one it had, rounded to nearest, or learnt.

    `errors` are relative squared errors of the outputs.
    split: whether each process has its share of every batch.
    """
    soft, nearest = dict[str, AdaRoundLayer](), dict[str, QuantLayer]()
    errors = {"before": _error(block, batches, split)}
    for site in unit.sites:
        layer, original = block.get_submodule(site.name), reference.get_submodule(site.name)
        assert isinstance(layer, QuantLayer)
        assert original.bias is None or isinstance(original.bias, Tensor)
        weight = weight_rows(original)
        soft[site.name] = AdaRoundLayer(layer, start_of(layer, weight), quantize_input=True)
        nearest[site.name] = nearest_of(layer, weight, original.bias)
    errors["nearest"] = _error(_with(block, nearest), batches, split)
    stopped = learn(
        _with(block, soft),
        list(soft.values()),
        batches,
        before=errors["before"] if math.isfinite(errors["before"]) else 1.0,
        iters=iters,
        learning_rate=spec.learning_rate,
        regularization=spec.regularization,
        generator=seeded_generator(spec.seed, unit.path),
        split=split,
    )
    learnt = {name: layer.decided() for name, layer in soft.items()}
    errors["after"] = math.nan if stopped else _error(_with(block, learnt), batches, split)
    best = min(errors, key=lambda name: (not math.isfinite(errors[name]), errors[name]))
    if not math.isfinite(errors[best]):
        best = "before"
    layers = {"before": {}, "nearest": nearest, "after": learnt}[best]
    note = ""
    if best != "after":
        form = "what it had" if best == "before" else "nearest rounding"
        why = stopped or f"learnt rounding is no better ({errors['after']:.4g})"
        note = f"{why}: kept {form} ({errors[best]:.4g})"
    return Part({name: rounded_state(layer) for name, layer in layers.items()}, errors, note)


def _with(block: fx.GraphModule, layers: Mapping[str, nn.Module]) -> fx.GraphModule:
    """Replace layers of a block by others, in place, and return it."""
    for name, layer in layers.items():
        block.set_submodule(name, layer)
    return block


@torch.no_grad()
def _error(block: fx.GraphModule, batches: Sequence[Batch], split: bool) -> float:
    """Squared error of all outputs over all batches, relative to the targets' power."""
    error, power = 0.0, 1e-12
    for batch in batches:
        if not batch.share:
            continue
        error += sum(float(sum_of_squares(r)) for r in batch.residuals(block(*batch.inputs)))
        power += sum(map(float, batch.power()))
    if split:
        error, power = map(sum, zip(*exchange((error, power), "errors of a block"), strict=True))
    return error / power
