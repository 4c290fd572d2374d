"""Round weights against what the layers really see, in execution order, in closed form.

codes = round(W)    ->    codes = second_order(W aligned to the quantized inputs), bias shifted
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.affine import weight_qparams
from tfmq_fx.config import LayerConfig, ReconstructionSpec
from tfmq_fx.dialect import Stage
from tfmq_fx.errors import CalibrationError
from tfmq_fx.gram import InputStatistics, input_rows, row_count
from tfmq_fx.graph import Declined, Rewrite, graph_pass
from tfmq_fx.nn import QuantConv, QuantLayer
from tfmq_fx.progress import progress_bar
from tfmq_fx.rounding import aligned_weight, round_nearest, round_second_order
from tfmq_fx.sites import Site, find_sites
from tfmq_fx.walk import Walk

ROWS = 20_000  # rows of each layer's input that its Gram matrix is made of
NOISE = 1e-4  # of the mean square; float32 sums of thousands of products are good to about 1e-6


@graph_pass(takes=Stage.QUANTIZED, gives=Stage.QUANTIZED)
def round_weights(
    gm: fx.GraphModule,
    *,
    reference: fx.GraphModule,
    chunks: Sequence[Sequence[Tensor]],
    plan: dict[str, LayerConfig],
    spec: ReconstructionSpec,
    skip: Collection[str] = (),
    progress: bool = False,
) -> Rewrite:
    """The graph with second-order rounded weights.

    Both models walk over the same samples; each layer is rounded on the inputs it gets from the
    part already quantized, to give the full-precision output (the weight is aligned first, the
    bias takes up the mean).  reference: the captured graph.  chunks: placeholder values.
    skip: sites to leave (the temporal block, which TIAR has done).
    """
    sites, _ = find_sites(gm)
    full, quantized = Walk(reference, chunks), Walk(gm, chunks)
    generator = torch.Generator().manual_seed(spec.seed)
    details: dict[str, Any] = {"error": {}}
    declined = []
    for site in progress_bar(sites, "second-order rounding", enabled=progress):
        if site.name in skip or not isinstance(site.layer, QuantLayer):
            declined.append(Declined(site.name, "rounded elsewhere, or in floating point"))
            continue
        node = site.nodes[0]
        quantized.stop_before(node)
        full.stop_before(full.node(node.name))
        statistics = _statistics(site, full, quantized, generator)
        original = reference.get_submodule(site.name).weight
        assert isinstance(original, Tensor)
        layer, errors = _rounded(site, original.detach(), statistics, plan[site.name], spec)
        gm.set_submodule(site.name, layer)
        details["error"][site.name] = errors
    return Rewrite(gm, len(details["error"]), declined, details)


def _statistics(
    site: Site, full: Walk, quantized: Walk, generator: torch.Generator
) -> InputStatistics:
    layer, node = site.layer, site.nodes[0]
    assert isinstance(layer, QuantLayer)
    groups = layer.groups if isinstance(layer, QuantConv) else 1
    width = torch.Size(layer.weight_shape[1:]).numel()
    result = InputStatistics.empty(groups, width, layer.codes.device)
    share = -(-ROWS // len(quantized.chunks))
    for i in range(len(quantized.chunks)):
        args, _ = quantized.arguments(node, i)
        seen = layer.quantized_input(*args)
        true = full.arguments(full.node(node.name), i)[0][0]
        picks = torch.randperm(row_count(layer, seen), generator=generator)[:share]
        result.add(input_rows(layer, seen, picks), input_rows(layer, true, picks))
    if not bool(torch.isfinite(result.gram).all() & torch.isfinite(result.cross).all()):
        raise CalibrationError(f"the inputs of {site.name} hold NaN or Inf on calibration data")
    return result


def _rounded(
    site: Site,
    weight: Tensor,
    statistics: InputStatistics,
    plan: LayerConfig,
    spec: ReconstructionSpec,
) -> tuple[QuantLayer, dict[str, float]]:
    """A new layer with rounded weights, and its relative output error before and after."""
    layer = copy.deepcopy(site.layer)
    assert isinstance(layer, QuantLayer) and plan.weights is not None
    has_bias = layer.bias is not None
    used = _centered(statistics) if has_bias else statistics
    rows = weight.float().flatten(1)
    per_group = rows.view(used.gram.shape[0], -1, rows.shape[1])
    aligned = torch.stack(
        [
            aligned_weight(w, cross, gram, spec.damping)
            for w, cross, gram in zip(per_group, used.cross, used.gram, strict=True)
        ]
    ).view_as(rows)
    grid = weight_qparams(aligned, plan.weights)
    candidates = {"nearest": round_nearest(aligned, grid)}
    parts = zip(aligned.view_as(per_group), used.gram, strict=True)
    channels = per_group.shape[1]
    candidates["second-order"] = torch.cat(
        [
            round_second_order(part, gram, _rows_of(grid, i, channels), damping=spec.damping).codes
            for i, (part, gram) in enumerate(parts)
        ]
    )
    scale, zero = grid.scale[:, None], grid.zero[:, None]
    errors = {
        name: _error((codes - zero) * scale - aligned, used.gram)
        for name, codes in candidates.items()
    }
    best = min(errors, key=errors.__getitem__)
    layer.set_weight(candidates[best].view(weight.shape), grid)
    if has_bias:
        assert layer.bias is not None
        value = ((candidates[best] - zero) * scale).double().view_as(per_group)
        wanted = (per_group.double() @ (statistics.sum_f / statistics.rows)[:, :, None]).flatten()
        given = (value @ (statistics.sum_q / statistics.rows)[:, :, None]).flatten()
        layer.bias = (layer.bias.double() + wanted - given).to(layer.bias.dtype)
    return layer, errors


def _centered(statistics: InputStatistics) -> InputStatistics:
    """The statistics about the means, as if both models' inputs carried the same white NOISE.

    Of an input that is the same in every row (one guidance scale, a padded text) nothing is left
    about its mean but rounding, of any sign, which must not steer the weights.
    """
    used = statistics.centered()
    noise = NOISE * statistics.gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    used.gram.diagonal(dim1=1, dim2=2).add_(noise)
    used.cross.diagonal(dim1=1, dim2=2).add_(noise)
    return used


def _rows_of(grid: Any, group: int, channels: int) -> Any:
    rows = slice(group * channels, (group + 1) * channels)
    return type(grid)(grid.scale[rows], grid.zero[rows], grid.bits)


def _error(difference: Tensor, gram: Tensor) -> float:
    """Squared output error that a difference of weights (out, in) causes."""
    d = difference.double().view(gram.shape[0], -1, difference.shape[1])
    return float(((d @ gram) * d).sum())
