"""The bits of each layer under a budget: measured on the model, chosen by integer programme."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, fx

from tfmq_fx.backends.layer_times import LayerTime, chooser, layer_time
from tfmq_fx.calibration.executor import LayerwiseExecutor
from tfmq_fx.core.distributed import rank, shard_indices
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.ir.graph import device_of
from tfmq_fx.ir.sites import Site, find_sites
from tfmq_fx.passes.round_weights import input_statistics, round_layer
from tfmq_fx.quant.bit_plan import BitPlan, Option, SiteBits
from tfmq_fx.quant.budget import asks_for_time
from tfmq_fx.quant.modules import with_weight
from tfmq_fx.quant.packing import packed_size
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.serialization.checkpoint import Checkpoint, with_rounded_state

from .calibration_data import sample_weights
from .models import Prepared
from .sensitivity import Sensitivity, measure

BITS = (2, 3, 4, 5, 6, 8)
JUDGED = 64  # samples that each option is tried on, or one for each timestep where there are more
_BROKEN = 1e30  # noise of an option that gives NaN or inf


def plan_bits(
    quantized: fx.GraphModule,
    *,
    prepared: Prepared,
    reference: fx.GraphModule,
    layers: Mapping[str, LayerConfig],
    fixed: Collection[str],
    chunks: Sequence[Sequence[Tensor]],
    timesteps: Tensor,
    budget: object,
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
) -> BitPlan:
    """Weight bits of every layer that is integers, but for those that are `fixed`.

    Each width in `BITS` is tried in each layer alone, rounded as the recipe rounds it (but for what
    refines and learns), its input quantized as it will be; under a budget of time each layer is
    timed as well, and may stay in floating point.
    quantized: the graph as the recipe makes it.  reference: the full-precision graph.  layers: what
    the recipe makes of each site.  chunks: calibration samples that weights are rounded on.
    timesteps: (K,).
    Raises ConfigError where there is nothing to plan or the budget cannot be met.
    """
    timed = asks_for_time(budget)
    sites = [s for s in find_sites(quantized)[0] if _plannable(s, layers, fixed)]
    if not sites:
        raise ConfigError(
            f"budget {budget!r}: recipe {prepared.recipe.name!r} has no layer with integer weights "
            "whose bits could be chosen; use one that quantizes weights, as 'w4a8' does"
        )
    times = _times(sites, device_of(quantized)) if timed else {}

    def plan(found: Sensitivity) -> BitPlan:
        planned = {}
        for site in sites:
            options = _options(site, found, times.get(site.name), reference)
            bits = layers[site.name].weights.bits  # type: ignore[union-attr]
            planned[site.name] = SiteBits(site.weights, options, bits)
        return BitPlan(
            timesteps=tuple(timesteps.tolist()),
            sites=planned,
            rest=tuple(found.rest.tolist()),
            fixed_bytes=_bytes_beside(quantized, sites),
            float_bytes=prepared.nbytes(),
            budget="the recipe",
        )

    silent = torch.zeros(len(BITS), len(timesteps), dtype=torch.float32)
    nothing = Sensitivity({site.name: silent for site in sites}, silent[0])
    plan(nothing).within(budget)  # what cannot be met is said before the long work
    spec = prepared.recipe.reconstruction
    visited = sum(1 for rows in prepared.cache.rows.values() if rows)
    found = measure(
        quantized,
        reference=reference,
        names=[site.name for site in sites],
        options=_Rounded(prepared, reference, layers, chunks),
        chunks=prepared.cache.chunks(
            max(JUDGED, visited),
            batched=prepared.batched(),
            batch_size=spec.batch_size,
            seed=spec.seed,
        ),
        timesteps=timesteps,
        seen=[chunks[i] for i in shard_indices(len(chunks))]
        if spec.rounding == "second-order"
        else (),
        memory=spec.memory,
        checkpoint=checkpoint,
        progress=progress,
    )
    return plan(found).within(budget)


def _options(
    site: Site, found: Sensitivity, time: LayerTime | None, reference: fx.GraphModule
) -> tuple[Option, ...]:
    """What a site may be: each width, and where it was timed floating point."""
    noise = found.noise[site.name]
    noise = noise.masked_fill(~noise.isfinite(), _BROKEN)
    noise = torch.where(found.rest.isnan(), torch.nan, noise)  # steps without a sample
    micros = 0.0 if time is None else time.integer
    options = [
        Option(bits, packed_size(site.weights, bits), micros, tuple(values))
        for bits, values in zip(BITS, noise.tolist(), strict=True)
    ]
    if time is not None:
        weight = reference.get_submodule(site.name).weight
        assert isinstance(weight, Tensor)
        exact = torch.zeros_like(found.rest).masked_fill(found.rest.isnan(), torch.nan)
        options.append(Option(None, weight.nbytes, time.floating, tuple(exact.tolist())))
    return tuple(options)


def _bytes_beside(quantized: fx.GraphModule, sites: Sequence[Site]) -> int:
    """Bytes of all parameters and buffers but the codes of the planned layers."""
    tensors = [*quantized.parameters(), *quantized.buffers()]
    total = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
    return total - sum(s.layer.codes.nbytes for s in sites if isinstance(s.layer, QuantLayer))


def given_bits(layers: Mapping[str, LayerConfig], patterns: Collection[str]) -> set[str]:
    """The sites whose layer was given by an override, those that rewrites made of one included."""
    paths = {name: _and_parents(name) for name in layers}
    return {name for name in layers for p in patterns if fnmatch.filter(paths[name], p)}


def _and_parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _plannable(site: Site, layers: Mapping[str, LayerConfig], fixed: Collection[str]) -> bool:
    """Whether the bits of a site are to be chosen."""
    weights = layers[site.name].weights
    return (
        isinstance(site.layer, QuantLayer)
        and weights is not None
        and weights.format == "int"
        and site.name not in fixed
    )


class _Rounded:
    """Makes a layer at each number of bits, rounded on what it would read in floating point."""

    def __init__(
        self,
        prepared: Prepared,
        reference: fx.GraphModule,
        layers: Mapping[str, LayerConfig],
        chunks: Sequence[Sequence[Tensor]],
    ) -> None:
        self.reference, self.layers, self.count = reference, layers, len(chunks)
        self.spec = dataclasses.replace(prepared.recipe.reconstruction, refine=0)
        self.weights = sample_weights(prepared, chunks)

    def __call__(self, site: Site, walk: LayerwiseExecutor) -> list[QuantLayer]:
        original, config = self.reference.get_submodule(site.name), self.layers[site.name]
        weight, bias = original.weight, original.bias
        assert isinstance(site.layer, QuantLayer) and config.weights is not None
        assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        specs = [dataclasses.replace(config.weights, bits=bits) for bits in BITS]
        if self.spec.rounding != "second-order":
            return [with_weight(site.layer, weight, bias, each) for each in specs]
        first = [dataclasses.replace(each, search=1) for each in specs]  # a start, and no more
        made = [with_weight(site.layer, weight, bias, each) for each in first]
        statistics = input_statistics(
            site, site.layer, weight, walk, walk, self.weights, self.spec.seed, self.count
        )
        if rank():
            return []  # the statistics are whole in the first process alone
        parts = [
            round_layer(
                site.name,
                layer,
                copy.deepcopy(statistics),
                dataclasses.replace(config, weights=each),
                self.spec,
            )
            for layer, each in zip(made, specs, strict=True)
        ]
        return [
            with_rounded_state(layer, part.states.get(site.name, {}))
            for layer, part in zip(made, parts, strict=True)
        ]


def _times(sites: Sequence[Site], device: torch.device) -> dict[str, LayerTime]:
    choose = chooser(device)
    return {
        site.name: layer_time(site.layer, site.nodes, choose)
        for site in sites
        if isinstance(site.layer, QuantLayer)
    }
