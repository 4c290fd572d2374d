"""Choose the form of each feature of the temporal information block, by error and bytes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.calibration.observers import Ranges
from tfmq_fx.core.config import Config, TemporalSpec
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.ir.graph_pass import Rewrite
from tfmq_fx.ir.subgraphs import as_input, at_timesteps, compute_rows
from tfmq_fx.ir.temporal_block import TemporalBlock
from tfmq_fx.passes.quantize_layers import quantize_layers
from tfmq_fx.passes.reconstruct_tib import reconstruct_tib, relative_errors
from tfmq_fx.quant.feature_selection import TABLE, TIB, Candidate, cache_name, select
from tfmq_fx.quant.packing import packed_size
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.quant.timestep_table import cache_error
from tfmq_fx.serialization.checkpoint import Checkpoint

_UNLIMITED = 1 << 62  # bytes


@dataclass(slots=True)
class TemporalChoice:
    """The form chosen for each feature, and the measurements behind it.

    choice: feature -> "table", "cache8", "cache4" or "tib".  layers: quantized layers of the block,
    by module path, for the features that stay in it.  passes: those that ran on the block alone.
    quantized: the block that was measured.
    """

    choice: dict[str, str]
    layers: dict[str, QuantLayer] = field(default_factory=dict)
    passes: list[Rewrite] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    quantized: fx.GraphModule | None = None

    @property
    def tabled(self) -> list[str]:
        """Features that tables replace, with exact or cached rows."""
        return [f for f, form in self.choice.items() if form != TIB]

    @property
    def cached(self) -> dict[str, int]:
        """Features with integer rows, and their bits."""
        return {
            f: int(form.removeprefix("cache"))
            for f, form in self.choice.items()
            if form.startswith("cache")
        }


def choose_temporal(
    block: TemporalBlock,
    *,
    config: Config,
    plan: Mapping[str, LayerConfig],
    ranges: Mapping[str, Ranges],
    timesteps: Tensor,
    visits: Tensor,
    checkpoint: Checkpoint | None = None,
) -> TemporalChoice:
    """The form of every temporal feature under `config.temporal`.

    Every candidate that the mode allows is built and measured over the whole set: the quantized
    block after TIAR, rows cached at each bit width, exact rows.  Where exact rows of every feature
    fit the budget the block is only rounded to nearest, since no learning could win.
    timesteps: (K,); visits: (K,) weights of the mean error.  checkpoint: holds the reconstructed
    block.
    """
    spec = config.temporal
    names = [f.name for f in block.features]
    if not names:
        return TemporalChoice({})
    rows, share = compute_rows(block.graph, timesteps), _share(visits, timesteps)
    result = TemporalChoice({})
    stored = [f.stored(row) for f, row in zip(block.features, rows, strict=True)]
    options = {n: _row_candidates(row, spec, share) for n, row in zip(names, stored, strict=True)}
    layers = {path: block.graph.get_submodule(path) for path in block.modules}
    module_bytes = {path: sum(p.nbytes for p in m.parameters()) for path, m in layers.items()}
    quantized = None
    if spec.mode in ("select", "tib"):
        quantized = quantize_layers(block.graph, plan=plan, ranges=ranges, timesteps=timesteps).gm
        for path, module in quantized.named_modules():
            if isinstance(module, QuantLayer):
                scales = 4 * len(timesteps) if module.per_timestep else 0
                module_bytes[path] = sum(b.nbytes for b in module.buffers()) + scales
    budget = spec.budget
    if budget is None:
        budget = sum(module_bytes.values()) if spec.mode == "select" else _UNLIMITED
    exact_fits = spec.mode == "select" and sum(row.nbytes for row in stored) <= budget
    if quantized is not None:
        if not exact_fits:
            learnt = reconstruct_tib(
                quantized,
                reference=block.graph,
                timesteps=as_input(block.graph, timesteps),
                visits=visits,
                iters=spec.tiar_iters,
                spec=config.reconstruction,
                checkpoint=checkpoint,
            )
            result.passes.append(learnt)
            quantized = learnt.gm
        for name, error in zip(names, _errors(quantized, rows, timesteps, share), strict=True):
            options[name][TIB] = Candidate(error, 0)
        result.quantized = quantized
        modules = quantized.named_modules()
        result.layers = {path: m for path, m in modules if isinstance(m, QuantLayer)}
    result.choice = select(options, uses=block.uses, module_bytes=module_bytes, budget=budget)
    if exact_fits and TIB not in result.choice.values():
        result.layers = {}  # one that is called elsewhere too is rounded like any other layer
    result.details = {
        "exact_fits": exact_fits,
        "budget": None if budget >= _UNLIMITED else budget,
        "parameters": sum(p.numel() for p in block.graph.parameters()),
        "block_bytes": sum(module_bytes.values()),
        "features": {
            name: {
                "chosen": result.choice[name],
                "error": options[name][result.choice[name]].error,
                "candidates": {
                    form: {"error": c.error, "bytes": c.bytes} for form, c in options[name].items()
                },
            }
            for name in names
        },
    }
    return result


def _row_candidates(row: Tensor, spec: TemporalSpec, share: Tensor) -> dict[str, Candidate]:
    """The exact and cached rows of a feature (K, ...), where the mode allows them.

    share: (K,), the weight of each timestep in the mean error.
    """
    candidates = {}
    if spec.mode in ("select", "table"):
        candidates[TABLE] = Candidate(0.0, row.nbytes)
    if spec.mode in ("select", "cache"):
        flat = row.reshape(len(row), -1)
        for bits in spec.cache_bits:
            error = float((cache_error(flat, bits) * share).sum())
            scales = 2 * 4 * len(flat)  # a float32 scale and zero point for each row
            size = packed_size(flat.numel(), bits) + scales
            candidates[cache_name(bits)] = Candidate(error, size)
    return candidates


def final_details(
    choice: TemporalChoice,
    block: TemporalBlock,
    gm: fx.GraphModule,
    *,
    timesteps: Tensor,
    visits: Tensor,
) -> dict[str, Any]:
    """`choice.details` with the final errors of the features that stay in the block.

    gm: the graph after all passes.  The errors before them stay among the candidates.
    """
    details = copy.deepcopy(choice.details)
    if choice.quantized is None or TIB not in choice.choice.values():
        return details
    shipped = fx.GraphModule(choice.quantized, choice.quantized.graph)
    shipped.meta = dict(choice.quantized.meta)
    modules = dict(gm.named_modules())
    for path in choice.layers:
        if isinstance(module := modules.get(path), QuantLayer):
            shipped.set_submodule(path, module)
    rows = compute_rows(block.graph, timesteps)
    errors = _errors(shipped, rows, timesteps, _share(visits, timesteps))
    for feature, error in zip(block.features, errors, strict=True):
        if choice.choice[feature.name] == TIB:
            details["features"][feature.name]["error"] = error
    return details


def _errors(
    quantized: fx.GraphModule, rows: tuple[Tensor, ...], timesteps: Tensor, share: Tensor
) -> list[float]:
    """The mean relative error of each feature; share: (K,), the weight of each timestep."""
    with torch.no_grad():
        features = at_timesteps(quantized, as_input(quantized, timesteps))
    errors: list[float] = (relative_errors(features, rows) @ share).tolist()
    return errors


def _share(visits: Tensor, timesteps: Tensor) -> Tensor:
    """The weight of each timestep in a mean, by how often it was visited: (K,), with sum 1."""
    return (visits.float() / visits.sum()).to(timesteps.device)
