"""Exact rewrites of the layers that are to be quantized, one after another, and the input ranges of
what comes out. The rewritten graph is the full-precision reference of everything after it."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from .channel_scaling import smoothing_factors, tcr_factors
from .config import LayerConfig, RewriteSpec
from .graph import Rewrite
from .observers import Ranges
from .passes.keep_first_token import keep_first_token
from .passes.observe_layers import observe_layers, observer_name
from .passes.rotate_inputs import rotate_inputs
from .passes.scale_channels import scale_channels
from .passes.split_concat import split_concat
from .passes.split_low_rank import split_low_rank
from .profiles import Profile, ProfileObserver, input_ranges
from .progress import progress_bar
from .sites import Site, find_sites

Chunks = Sequence[Sequence[Tensor]]


@dataclass(slots=True)
class Rewritten:
    """The graph after its rewrites, what each of its layers becomes, and the passes that ran."""

    gm: fx.GraphModule
    plan: dict[str, LayerConfig]
    passes: list[Rewrite] = field(default_factory=list)

    def apply(self, rewrite: Rewrite) -> None:
        """Go on with what a pass returned."""
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

    def quantized(most: int = 16) -> list[str]:
        """Sites to rewrite whose inputs have at most `most` bits (any if they stay in float)."""
        return [
            name
            for name, layer in result.plan.items()
            if name not in fixed
            and layer.weights is not None
            and (layer.activations.bits if layer.activations else 0) <= most
        ]

    if spec.split_concat:
        result.apply(split_concat(result.gm, only=quantized()))
        for site, parts in result.passes[-1].details["parts"].items():
            layer = result.plan.pop(site)
            result.plan.update(dict.fromkeys(parts, layer))
    if spec.first_token:
        result.apply(keep_first_token(result.gm, chunks=chunks, only=quantized()))
    if spec.tcr is not None or spec.smooth is not None:
        seen = profiles(result.gm, chunks, only=quantized(8), seed=seed, progress=progress)
        factors = _factors(result.gm, spec, seen)
        result.apply(scale_channels(result.gm, factors=factors))
    if spec.rotate is not None:
        result.apply(rotate_inputs(result.gm, group=spec.rotate, only=quantized(8)))
    if spec.low_rank:
        seen = profiles(result.gm, chunks, only=quantized(8), seed=seed, progress=progress)
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


def profiled_ranges(
    gm: fx.GraphModule,
    plan: Mapping[str, LayerConfig],
    *,
    timesteps: Tensor,
    chunks: Chunks,
    seed: int,
    progress: bool = False,
) -> dict[str, Ranges]:
    """The input range of every site whose activations are quantized, over `timesteps` (K,), each
    by the estimator that its plan names."""
    specs = {name: layer.activations for name, layer in plan.items() if layer.activations}
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
        weights = [_weight(sites[name].layer) for name in names]
        found = smoothing_factors(seen[names[0]].peaks, weights, alpha=spec.smooth)
        factors.update(dict.fromkeys(names, found))
    return factors


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _energy(layer: nn.Module) -> Tensor:
    """Sum of squares of the weights that read each input channel: (in,)."""
    weight = _weight(layer).float()
    groups = int(getattr(layer, "groups", 1))
    parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return parts.square().sum((1, 3)).flatten()
