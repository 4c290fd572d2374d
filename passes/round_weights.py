"""Round weights in closed form on the inputs that layers of the quantized model get.

codes = round(W)    ->    codes = second_order(W aligned to the quantized inputs), bias shifted
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from tfmq_fx.calibration.activation_store import ActivationStore
from tfmq_fx.calibration.executor import LayerwiseExecutor
from tfmq_fx.core.config import ReconstructionSpec
from tfmq_fx.core.distributed import exchange, gather_to_first, rank, shard_indices, world
from tfmq_fx.core.errors import CalibrationError
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.progress import progress_bar
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph_pass import Declined, Rewrite, graph_pass
from tfmq_fx.ir.sites import Site, find_sites
from tfmq_fx.quant.affine import QParams, dequantize, weight_qparams
from tfmq_fx.quant.gptq import refine, round_nearest, round_second_order
from tfmq_fx.quant.input_statistics import InputStatistics, input_rows, row_count
from tfmq_fx.quant.modules import QuantConv, weight_rows
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

ROWS = 20_000  # rows of each layer's input that its Gram matrix is made of
# of each channel's mean square; float32 sums of thousands of products are good to about 1e-6
NOISE = 1e-4
DAMPING = (1, 10, 100)  # times the configured damping, until factors exist and codes are finite


@graph_pass(takes=Stage.QUANTIZED, gives=Stage.QUANTIZED)
def round_weights(
    gm: fx.GraphModule,
    *,
    reference: fx.GraphModule,
    chunks: Sequence[Sequence[Tensor]],
    plan: dict[str, LayerConfig],
    spec: ReconstructionSpec,
    weights: Sequence[Tensor] | None = None,
    skip: Collection[str] = (),
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
) -> Rewrite:
    """The graph with second-order rounded weights.

    Both models walk over the same samples; each layer is rounded on the inputs it gets from the
    part already quantized, to give the full-precision output (the weight is aligned first, the
    bias takes up the mean).  Each layer ends with the best of: the rounding it had, the aligned
    weight rounded to nearest, to second order, and refined (spec.refine); it keeps what it had
    where second-order rounding fails at 100 times the damping as well.
    fp8 weights have the first two candidates alone: they are always rounded to nearest.
    reference: the captured graph.  chunks: placeholder values.  weights: for each chunk those of
    its samples; None is the same for all.  skip: sites to leave (the temporal block, which TIAR has
    done).  checkpoint: where finished layers are found and put.
    Of many processes each walks over its own chunks; the first adds up what all have seen, in the
    order of the chunks, rounds the layer and tells the others.
    """
    sites, _ = find_sites(gm)
    own = [chunks[i] for i in shard_indices(len(chunks))]
    errors, declined, changed = dict[str, dict[str, float]](), [], 0
    with ActivationStore(spec.memory) as spill:
        full, quantized = (LayerwiseExecutor(graph, own, spill=spill) for graph in (reference, gm))
        for site in progress_bar(sites, "second-order rounding", enabled=progress):
            layer = site.layer
            if site.name in skip or not isinstance(layer, QuantLayer):
                declined.append(Declined(site.name, "rounded elsewhere, or in floating point"))
                continue
            original = weight_rows(reference.get_submodule(site.name))
            assert isinstance(original, Tensor)

            def rounded(
                site: Site = site, layer: QuantLayer = layer, original: Tensor = original
            ) -> Part:
                statistics = input_statistics(
                    site, layer, original.detach(), full, quantized, weights, spec.seed, len(chunks)
                )
                if rank():
                    return Part({}, {})
                return round_layer(site.name, layer, statistics, plan[site.name], spec)

            result = finished(checkpoint, site.name, rounded, shared=True)
            errors[site.name] = result.errors
            if result.note:
                declined.append(Declined(site.name, result.note))
            for name, state in result.states.items():
                gm.set_submodule(name, with_rounded_state(layer, state))
            changed += bool(result.states)
    return Rewrite(gm, changed, declined, {"error": errors} | record(checkpoint))


def input_statistics(
    site: Site,
    layer: QuantLayer,
    weight: Tensor,
    full: LayerwiseExecutor,
    quantized: LayerwiseExecutor,
    weights: Sequence[Tensor] | None,
    seed: int,
    count: int,
) -> InputStatistics:
    """The input statistics of a layer over about ROWS rows, as many from each of `count` chunks.

    The walks hold the chunks of this process; only the first process gets the whole sum.
    """
    node = site.nodes[0]
    quantized.stop_before(node)
    full.stop_before(full.node(node.name))
    groups = layer.groups if isinstance(layer, QuantConv) else 1
    result = InputStatistics.empty(weight.reshape(groups, len(weight) // groups, -1))
    generator = seeded_generator(seed, site.name)
    share = -(-ROWS // count)

    def add_round(start: int) -> None:
        """Add one chunk of each process, from chunk `start` on."""
        i, x, sums = start + rank(), None, None
        if i < count:
            args, _ = quantized.arguments(node, i // world())
            x = layer.quantized_input(*args)
        # all processes draw the picks of all chunks, as one would
        totals = exchange(None if x is None else row_count(layer, x), f"rows of {site.name}")
        drawn = [torch.randperm(n, generator=generator)[:share] for n in totals if n is not None]
        if x is not None:
            true = full.arguments(full.node(node.name), i // world())[0][0]
            importance = None if weights is None else weights[i]
            sums = result.sums(*_rows(site, layer, x, true, importance, drawn[rank()]))
        sent: Any = sums if sums is None or world() == 1 else tuple(sums)
        for received in gather_to_first(sent, f"statistics of {site.name}"):
            if received is not None:
                result.add_sums(iter(received))

    for start in range(0, count, world()):
        add_round(start)
    return result


def _rows(
    site: Site,
    layer: QuantLayer,
    x: Tensor,
    full: Tensor,
    weights: Tensor | None,
    picks: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows `picks` of a layer's input in one chunk, quantized (from x) and in full precision,
    and the weight of each row."""
    seen, true = input_rows(layer, x, picks), input_rows(layer, full, picks)
    if not bool(torch.isfinite(seen).all() & torch.isfinite(true).all()):
        raise CalibrationError(f"the inputs of {site.name} hold NaN or Inf on calibration data")
    total = row_count(layer, x)
    if weights is None or total % len(weights):
        return seen, true, None
    # rows of a sample stand together
    return seen, true, weights[picks // (total // len(weights))].to(x.device)


def round_layer(
    name: str,
    layer: QuantLayer,
    statistics: InputStatistics,
    plan: LayerConfig,
    spec: ReconstructionSpec,
) -> Part:
    """The best rounding of one layer, and the squared output error of each candidate.

    Errors leave out what no weights can avoid.  Changes `statistics`.
    """
    if layer.bias is not None:
        _center_(statistics)
    error = "?"
    for factor in DAMPING:
        try:
            candidates, aligned = _candidates(layer, statistics, plan, spec, spec.damping * factor)
        except LinAlgError as failed:
            error = str(failed).partition("\n")[0]
            continue
        errors = {
            form: _error(dequantize(codes, *grid.over(codes.shape[1])) - aligned, statistics.gram)
            for form, (codes, grid) in candidates.items()
        }
        if math.isfinite(errors.get("second-order", errors["nearest"])):
            break
        error = "its codes are not finite"
    else:
        return Part({}, {}, f"second-order rounding failed ({error}): kept what it had")
    best = min(errors, key=lambda form: (not math.isfinite(errors[form]), errors[form]))
    codes, grid = candidates[best]
    rounded = with_rounded_state(layer, {})
    rounded.set_weight(codes.view(layer.weight_shape), grid)
    if layer.bias is not None:
        rounded.bias = _shifted_bias(rounded, layer.bias, statistics)
        if not bool(torch.isfinite(rounded.bias).all()):
            return Part({}, errors, "the bias it needs is not finite: kept what it had")
    return Part({name: rounded_state(rounded)}, errors)


def _candidates(
    layer: QuantLayer,
    statistics: InputStatistics,
    plan: LayerConfig,
    spec: ReconstructionSpec,
    damping: float,
) -> tuple[dict[str, tuple[Tensor, QParams]], Tensor]:
    """Codes (out, in) and grid for each kind of rounding, and the weight (out, in) that they
    approximate."""
    assert plan.weights is not None
    per_group = statistics.aligned_weight(damping)
    channels = per_group.shape[1]
    aligned = per_group.flatten(0, 1)
    # as a weight, whose second dimension scales may go in groups of
    grid = weight_qparams(aligned.view(layer.weight_shape), plan.weights)
    _, zero = layer.grid().over(aligned.shape[1])
    candidates = {
        "given": (layer.weight_codes().float().flatten(1) + zero, layer.grid()),
        "nearest": (round_nearest(aligned, grid), grid),
    }
    if grid.format == "fp8":
        return candidates, aligned
    parts = [
        (part, gram, grid.rows(i * channels, (i + 1) * channels))
        for i, (part, gram) in enumerate(zip(per_group, statistics.gram, strict=True))
    ]
    codes = [round_second_order(part, gram, rows, damping=damping) for part, gram, rows in parts]
    candidates["second-order"] = torch.cat(codes), grid
    if spec.refine:
        refined = [
            refine(part, start, gram, rows, sweeps=spec.refine)
            for start, (part, gram, rows) in zip(codes, parts, strict=True)
        ]
        scales = torch.cat([fitted.scale for _, fitted in refined])
        codes = [refined_codes for refined_codes, _ in refined]
        candidates["refined"] = torch.cat(codes), QParams(scales, grid.zero, grid.bits)
    return candidates, aligned


def _shifted_bias(rounded: QuantLayer, bias: Tensor, statistics: InputStatistics) -> Tensor:
    """The bias that gives the mean output of full precision."""
    value = rounded.weight.double().view_as(statistics.weight)
    target = statistics.weight.double() @ (statistics.sum_f / statistics.rows)[:, :, None]
    mean = value @ (statistics.sum_q / statistics.rows)[:, :, None]
    return (bias.double() + (target - mean).flatten()).to(bias.dtype)


def _center_(statistics: InputStatistics) -> None:
    """Center the statistics and add white noise to each channel, the same in both models.

    It has NOISE of the channel's own power, so that a channel of massive mean adds none to others.

    Of an input that is the same in every row (one guidance scale, a padded text) nothing is left
    about its mean but rounding, of any sign, which must not steer the weights.
    """
    noise = NOISE * statistics.gram.diagonal(dim1=1, dim2=2)
    statistics.center_()
    statistics.gram.diagonal(dim1=1, dim2=2).add_(noise)


def _error(difference: Tensor, gram: Tensor) -> float:
    """Squared output error that a difference of weights (out, in) causes."""
    d = difference.double().view(gram.shape[0], -1, difference.shape[1])
    return float(((d @ gram) * d).sum())
