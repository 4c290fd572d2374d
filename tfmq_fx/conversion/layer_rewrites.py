"""Rewrite the layers that are to be quantized, one exact rewrite after another, and profile the
inputs of the rewritten layers."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx, nn

from tfmq_fx.calibration.input_profiles import Profile, ProfileObserver, input_ranges
from tfmq_fx.calibration.observers import Ranges
from tfmq_fx.core.config import RewriteSpec
from tfmq_fx.core.progress import progress_bar
from tfmq_fx.ir.graph_pass import Declined, Rewrite
from tfmq_fx.ir.layer_edits import groups_of, weight_of
from tfmq_fx.ir.sites import Site, find_sites
from tfmq_fx.passes.observe_layers import observe_layers, observer_name
from tfmq_fx.passes.rotate_inputs import rotate_inputs
from tfmq_fx.passes.scale_channels import scale_channels
from tfmq_fx.passes.split_concat import split_concat
from tfmq_fx.passes.split_low_rank import split_low_rank
from tfmq_fx.quant.channel_scaling import smoothing_factors, tcr_factors

from .job import Job


def rewrite_layers(job: Job) -> Job:
    """The job after the rewrites of its recipe; its graph is equal up to float reassociation.

    Only layers with quantized weights outside the temporal block are rewritten.
    """
    spec, fixed = job.recipe.rewrites, job.temporal_block().modules

    def quantized() -> list[str]:
        names = [site.name for site in job.sites if site.name not in fixed]
        return [name for name in names if job.plan[name].weights is not None]

    if spec.split_concat:
        split = split_concat(job.gm, only=quantized())
        sources = {part: site for site, parts in split.details["parts"].items() for part in parts}
        plan = {**job.plan, **{part: job.plan[site] for part, site in sources.items()}}
        job = job.applied(split, plan=plan)
    names = quantized()
    fine = [name for name in names if (a := job.plan[name].activations) and a.bits > 8]
    coarse = [name for name in names if name not in fine]

    def declining(rewrite: Rewrite) -> Rewrite:
        rewrite.declined += [Declined(name, "its input has more than 8 bits") for name in fine]
        return rewrite

    if spec.tcr is not None or spec.smooth is not None:
        factors = _factors(job.gm, spec, profiles(job, coarse))
        job = job.applied(declining(scale_channels(job.gm, factors=factors)))
    if spec.rotate is not None:
        job = job.applied(declining(rotate_inputs(job.gm, group=spec.rotate, only=coarse)))
    if spec.low_rank:
        importance = {name: p.power.sqrt() for name, p in profiles(job, names).items()}
        job = job.applied(
            split_low_rank(job.gm, rank=spec.low_rank, only=list(importance), importance=importance)
        )
    job.gm.requires_grad_(False)  # what a rewrite computes is not learnt
    return job


def profiles(job: Job, names: Collection[str]) -> dict[str, Profile]:
    """The input profile of each of the sites `names`, over all samples, one chunk in memory."""

    def observer(site: Site) -> nn.Module | None:
        if site.name not in names:
            return None
        seed = zlib.crc32(site.name.encode()) ^ job.recipe.reconstruction.seed
        dim = -1 if isinstance(site.layer, nn.Linear) else 1
        return ProfileObserver(site.name, channel_dim=dim, seed=seed)

    observed = observe_layers(job.gm, observer).gm
    with torch.no_grad():
        for chunk in progress_bar(job.samples.chunks, "profiles", enabled=job.progress):
            observed(*chunk)
    observers = {name: observed.get_submodule(observer_name(name)) for name in names}
    return {name: o.profile() for name, o in observers.items() if isinstance(o, ProfileObserver)}


def unchanged_sites(before: fx.GraphModule, after: fx.GraphModule) -> set[str]:
    """The sites whose layer and input nodes are the same in both graphs."""

    def sites(gm: fx.GraphModule) -> dict[str, tuple[nn.Module, list[str]]]:
        return {
            site.name: (site.layer, [used.name for n in site.nodes for used in n.all_input_nodes])
            for site in find_sites(gm)[0]
        }

    old = sites(before)
    return {name for name, site in sites(after).items() if old.get(name) == site}


def profiled_ranges(job: Job, names: Collection[str]) -> dict[str, Ranges]:
    """The input range of each of the sites `names`, by the estimator in its configuration."""
    layers = {site.name: site.layer for site in job.sites}
    ranges = {}
    for name, profile in profiles(job, names).items():
        spec = job.plan[name].calibrated
        assert spec is not None
        ranges[name] = input_ranges(profile, spec, job.timesteps, _energy(layers[name]))
    return ranges


def _factors(
    gm: fx.GraphModule, spec: RewriteSpec, seen: Mapping[str, Profile]
) -> dict[str, Tensor]:
    """The factors that divide the input channels of each profiled site."""
    sites = {site.name: site for site in find_sites(gm)[0]}
    if spec.tcr is not None:
        return {name: tcr_factors(p.peaks, limit=spec.tcr) for name, p in seen.items()}
    assert spec.smooth is not None
    readers: dict[fx.Node, list[str]] = {}
    for name in seen:
        if isinstance(sites[name].layer, nn.Linear):
            readers.setdefault(sites[name].nodes[0].all_input_nodes[0], []).append(name)
    factors = {}
    for names in readers.values():
        weights = [weight_of(sites[name].layer) for name in names]
        shared = smoothing_factors(seen[names[0]].peaks, weights, alpha=spec.smooth)
        factors.update(dict.fromkeys(names, shared))
    return factors


def _energy(layer: nn.Module) -> Tensor:
    """The sum of squares of the weights that read each input channel: (in,)."""
    weight, groups = weight_of(layer).float(), groups_of(layer)
    parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return parts.square().sum((1, 3)).flatten()
