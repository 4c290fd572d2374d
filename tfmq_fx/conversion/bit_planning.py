"""Choose the weight bits of each layer under a budget, from output errors measured on the model."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
from collections.abc import Collection, Mapping

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
from tfmq_fx.quant.modules import weight_rows, with_weight
from tfmq_fx.quant.packing import packed_size
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.serialization.checkpoint import with_rounded_state

from .job import Job
from .sensitivity import Sensitivity, measure

BITS = (2, 3, 4, 5, 6, 8)
JUDGED = 64  # samples that measure each option; one for each timestep where there are more
_BROKEN = 1e30  # noise of an option that gives NaN or inf


def plan_bits(quantized: fx.GraphModule, job: Job) -> BitPlan:
    """The weight bits of every layer with integer weights, within the budget of `job`.

    Layers with an override and quantized layers of the temporal block keep their bits.  Each width
    in `BITS` is measured in each layer alone, rounded as the recipe rounds it (without refinement
    and learning), its input quantized; under a budget of time each layer is timed as well, and may
    stay in floating point.
    quantized: the graph at the widths of the recipe.
    Raises ConfigError where there is nothing to plan or the budget cannot be met.
    """
    fixed = {*job.temporal.layers, *overridden(job.plan, job.prepared.overrides)}
    sites = [s for s in find_sites(quantized)[0] if s.name not in fixed and _is_integer(s, job)]
    if not sites:
        raise ConfigError(
            f"budget {job.budget!r}: recipe {job.recipe.name!r} has no layer with integer weights "
            "whose bits could be chosen; use one that quantizes weights, as 'w4a8' does"
        )
    tensors = {t.data_ptr(): t for t in (*quantized.parameters(), *quantized.buffers())}
    codes = sum(s.layer.codes.nbytes for s in sites if isinstance(s.layer, QuantLayer))
    fixed_bytes = sum(t.nbytes for t in tensors.values()) - codes
    times: dict[str, LayerTime] = {}
    if asks_for_time(job.budget):
        choose = chooser(device_of(quantized))
        layers = [(s.name, s.layer, s.nodes) for s in sites if isinstance(s.layer, QuantLayer)]
        times = {name: layer_time(layer, nodes, choose) for name, layer, nodes in layers}

    def plan(errors: Sensitivity) -> BitPlan:
        planned = {}
        for site in sites:
            options = _options(site, errors, times.get(site.name), job.reference)
            bits = job.plan[site.name].weights.bits  # type: ignore[union-attr]
            planned[site.name] = SiteBits(site.weights, options, bits)
        return BitPlan(
            timesteps=tuple(job.timesteps.tolist()),
            sites=planned,
            rest=tuple(errors.rest.tolist()),
            fixed_bytes=fixed_bytes,
            float_bytes=job.prepared.nbytes(),
            budget="the recipe",
        )

    silent = torch.zeros(len(BITS), len(job.timesteps), dtype=torch.float32)
    # fail early: reject an infeasible budget before the long measurement
    plan(Sensitivity({site.name: silent for site in sites}, silent[0])).within(job.budget)
    spec, cache, chunks = job.recipe.reconstruction, job.prepared.cache, job.samples.chunks
    visited = sum(1 for rows in cache.rows.values() if rows)
    second_order = spec.rounding == "second-order"
    errors = measure(
        quantized,
        reference=job.reference,
        names=[site.name for site in sites],
        options=_RoundedOptions(job),
        chunks=cache.chunks(
            max(JUDGED, visited),
            batched=job.prepared.batched(),
            batch_size=spec.batch_size,
            seed=spec.seed,
        ),
        timesteps=job.timesteps,
        seen=[chunks[i] for i in shard_indices(len(chunks))] if second_order else (),
        memory=spec.memory,
        checkpoint=job.parts("plan_bits"),
        progress=job.progress,
    )
    return plan(errors).within(job.budget)


def overridden(layers: Mapping[str, LayerConfig], patterns: Collection[str]) -> set[str]:
    """The sites whose layer matches an override, those that rewrites made from one included."""
    parts = {name: name.split(".") for name in layers}
    paths = {n: [".".join(p[:i]) for i in range(1, len(p) + 1)] for n, p in parts.items()}
    return {name for name in layers for p in patterns if fnmatch.filter(paths[name], p)}


def _is_integer(site: Site, job: Job) -> bool:
    weights = job.plan[site.name].weights
    return isinstance(site.layer, QuantLayer) and weights is not None and weights.format == "int"


def _options(
    site: Site, errors: Sensitivity, time: LayerTime | None, reference: fx.GraphModule
) -> tuple[Option, ...]:
    """The candidate formats of a site: each width, and floating point where it was timed."""
    noise = errors.noise[site.name]
    noise = noise.masked_fill(~noise.isfinite(), _BROKEN)
    noise = torch.where(errors.rest.isnan(), torch.nan, noise)  # steps without a sample
    micros = 0.0 if time is None else time.integer
    options = [
        Option(bits, packed_size(site.weights, bits), micros, tuple(values))
        for bits, values in zip(BITS, noise.tolist(), strict=True)
    ]
    if time is not None:
        weight = reference.get_submodule(site.name).weight
        assert isinstance(weight, Tensor)
        exact = torch.zeros_like(errors.rest).masked_fill(errors.rest.isnan(), torch.nan)
        options.append(Option(None, weight.nbytes, time.floating, tuple(exact.tolist())))
    return tuple(options)


class _RoundedOptions:
    """Makes a layer at each width in `BITS`, rounded on its full-precision inputs."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.spec = dataclasses.replace(job.recipe.reconstruction, refine=0)

    def __call__(self, site: Site, walk: LayerwiseExecutor) -> list[QuantLayer]:
        original, config = self.job.reference.get_submodule(site.name), self.job.plan[site.name]
        weight, bias = weight_rows(original), original.bias
        assert isinstance(site.layer, QuantLayer) and config.weights is not None
        assert bias is None or isinstance(bias, Tensor)
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        specs = [dataclasses.replace(config.weights, bits=bits) for bits in BITS]
        if self.spec.rounding != "second-order":
            return [with_weight(site.layer, weight, bias, each) for each in specs]
        samples = self.job.samples
        statistics = input_statistics(
            site,
            site.layer,
            weight,
            walk,
            walk,
            samples.weights,
            self.spec.seed,
            len(samples.chunks),
        )
        if rank():
            return []  # the statistics are whole in the first process alone
        layers = []
        for each in specs:
            start = with_weight(site.layer, weight, bias, dataclasses.replace(each, search=1))
            config = dataclasses.replace(config, weights=each)
            part = round_layer(site.name, start, copy.deepcopy(statistics), config, self.spec)
            layers.append(with_rounded_state(start, part.states.get(site.name, {})))
        return layers
