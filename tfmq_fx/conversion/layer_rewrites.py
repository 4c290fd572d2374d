"""Exact rewrites of the layers that are to be quantized, one after another, and the input ranges of
what comes out. The rewritten graph is the full-precision reference of everything after it."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from tfmq_fx.calibration.input_profiles import Profile, ProfileObserver, input_ranges
from tfmq_fx.calibration.observers import Ranges
from tfmq_fx.core.config import RewriteSpec
from tfmq_fx.core.layer_config import ActivationSpec, LayerConfig
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

Chunks = Sequence[Sequence[Tensor]]


@dataclass(slots=True)
class Rewritten:
    """The graph after its rewrites, what each of its layers becomes, and the passes that ran."""

    gm: fx.GraphModule
    plan: dict[str, LayerConfig]
    passes: list[Rewrite] = field(default_factory=list)

    def apply(self, rewrite: Rewrite, left: Iterable[str] = ()) -> None:
        """Go on with what a pass returned.  left: sites with inputs too fine for it to matter."""
        rewrite.declined += [Declined(name, "its input has more than 8 bits") for name in left]
        self.gm = rewrite.gm
        self.passes.append(rewrite)


def rewrite_layers(
    gm: fx.GraphModule,
    spec: RewriteSpec,
    *,
    plan: Mapping[str, LayerConfig],
    fixed: Collection[str],
    chunks: Chunks,
    seed: int,
    progress: bool = False,
) -> Rewritten:
    """The graph with the rewrites of `spec`, equal to `gm` up to float reassociation.

    plan: what each site becomes; only those quantized are rewritten.  fixed: sites to leave (the
    temporal block).  chunks: placeholder values; statistics are taken of them, one chunk at a time.
    """
    result = Rewritten(gm, dict(plan))

    def quantized() -> list[str]:
        """Sites to rewrite."""
        named = result.plan.items()
        return [name for name, layer in named if layer.weights is not None and name not in fixed]

    def by_width() -> tuple[list[str], list[str]]:
        """Sites to rewrite whose inputs have up to 8 bits, and those that have more."""
        fine = [n for n in quantized() if (a := result.plan[n].activations) and a.bits > 8]
        return [name for name in quantized() if name not in fine], fine

    if spec.split_concat:
        result.apply(split_concat(result.gm, only=quantized()))
        for site, parts in result.passes[-1].details["parts"].items():
            layer = result.plan.pop(site)
            result.plan.update(dict.fromkeys(parts, layer))
    if spec.tcr is not None or spec.smooth is not None:
        coarse, fine = by_width()
        seen = profiles(result.gm, chunks, only=coarse, seed=seed, progress=progress)
        result.apply(scale_channels(result.gm, factors=_factors(result.gm, spec, seen)), fine)
    if spec.rotate is not None:
        coarse, fine = by_width()
        result.apply(rotate_inputs(result.gm, group=spec.rotate, only=coarse), fine)
    if spec.low_rank:
        seen = profiles(result.gm, chunks, only=quantized(), seed=seed, progress=progress)
        importance = {name: profile.power.sqrt() for name, profile in seen.items()}
        result.apply(
            split_low_rank(
                result.gm, rank=spec.low_rank, only=list(importance), importance=importance
            )
        )
    return result


def profiles(
    gm: fx.GraphModule,
    chunks: Chunks,
    *,
    only: Iterable[str],
    seed: int,
    progress: bool = False,
) -> dict[str, Profile]:
    """The input profile of each site in `only`, over all of `chunks`, one chunk in memory."""
    wanted = set(only)

    def observer(site: Site) -> nn.Module | None:
        if site.name not in wanted:
            return None
        own = zlib.crc32(site.name.encode()) ^ seed
        dim = -1 if isinstance(site.layer, nn.Linear) else 1
        return ProfileObserver(site.name, channel_dim=dim, seed=own)

    observed = observe_layers(gm, observer).gm
    with torch.no_grad():
        for chunk in progress_bar(chunks, "profiles", enabled=progress):
            observed(*chunk)
    made = {name: observed.get_submodule(observer_name(name)) for name in wanted}
    return {name: o.profile() for name, o in made.items() if isinstance(o, ProfileObserver)}


def unchanged_sites(before: fx.GraphModule, after: fx.GraphModule) -> set[str]:
    """The sites that rewrites left as they were, the value they read included."""
    old = {site.name: site for site in find_sites(before)[0]}
    return {
        site.name
        for site in find_sites(after)[0]
        if site.name in old
        and site.layer is old[site.name].layer
        and _read(site) == _read(old[site.name])
    }


def _read(site: Site) -> list[str]:
    return [used.name for node in site.nodes for used in node.all_input_nodes]


def profiled_ranges(
    gm: fx.GraphModule,
    specs: Mapping[str, ActivationSpec],
    *,
    timesteps: Tensor,
    chunks: Chunks,
    seed: int,
    progress: bool = False,
) -> dict[str, Ranges]:
    """The input range of each site of `specs` over `timesteps` (K,), by the estimator it names."""
    sites = {site.name: site for site in find_sites(gm)[0]}
    seen = profiles(gm, chunks, only=specs, seed=seed, progress=progress)
    return {
        name: input_ranges(profile, specs[name], timesteps, _energy(sites[name].layer))
        for name, profile in seen.items()
    }


def _factors(
    gm: fx.GraphModule, spec: RewriteSpec, seen: Mapping[str, Profile]
) -> dict[str, Tensor]:
    """What to divide the input channels of each profiled site by."""
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
        found = smoothing_factors(seen[names[0]].peaks, weights, alpha=spec.smooth)
        factors.update(dict.fromkeys(names, found))
    return factors


def _energy(layer: nn.Module) -> Tensor:
    """Sum of squares of the weights that read each input channel: (in,)."""
    weight, groups = weight_of(layer).float(), groups_of(layer)
    parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return parts.square().sum((1, 3)).flatten()
