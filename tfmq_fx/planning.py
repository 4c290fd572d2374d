"""The bits of each layer under a budget: measured on the model, chosen by integer programme."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, fx

from .backends.layer_times import LayerTime, chooser, layer_time
from .bit_plan import BitPlan, Option, SiteBits
from .budget import asks_for_time
from .checkpoint import Checkpoint
from .config import LayerConfig
from .errors import ConfigError
from .graph import device_of
from .modules import Prepared
from .nn import QuantLayer
from .packing import packed_size
from .requantized import with_weight
from .sensitivity import measure
from .sites import Site, find_sites

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
    timesteps: Tensor,
    budget: object,
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
) -> BitPlan:
    """Weight bits of every layer that is integers, but for those that are `fixed`.

    Each width in `BITS` is tried in each layer alone, rounded to nearest, its input quantized as it
    will be; under a budget of time each layer is timed as well, and may stay in floating point.
    quantized: the graph as the recipe makes it.  reference: the full-precision graph.  layers: what
    the recipe makes of each site.  timesteps: (K,).
    Raises ConfigError where there is nothing to plan or the budget cannot be met.
    """
    timed = asks_for_time(budget)
    sites = [s for s in find_sites(quantized)[0] if _plannable(s, layers, fixed)]
    if not sites:
        raise ConfigError(
            f"budget {budget!r}: recipe {prepared.recipe.name!r} has no layer with integer weights "
            "whose bits could be chosen; use one that quantizes weights, as 'w4a8' does"
        )
    candidates = {site.name: _candidates(site, layers[site.name], reference) for site in sites}
    spec = prepared.recipe.reconstruction
    seen = sum(1 for rows in prepared.cache.rows.values() if rows)
    chunks: Sequence[Sequence[Tensor]] = prepared.cache.chunks(
        max(JUDGED, seen),
        batched=prepared.batched(),
        batch_size=spec.batch_size,
        seed=spec.seed,
    )
    found = measure(
        quantized,
        reference=reference,
        options={name: list(made.values()) for name, made in candidates.items()},
        chunks=chunks,
        timesteps=timesteps,
        checkpoint=checkpoint,
        progress=progress,
    )
    times = _times(sites, device_of(quantized)) if timed else {}
    planned, codes = {}, 0
    for site in sites:
        assert isinstance(site.layer, QuantLayer)
        time = times.get(site.name, LayerTime(0.0, 0.0, True))
        noise = found.noise[site.name].masked_fill(~found.noise[site.name].isfinite(), _BROKEN)
        noise = torch.where(found.rest.isnan(), torch.nan, noise)
        options = [
            Option(bits, packed_size(site.weights, bits), time.integer, tuple(values))
            for bits, values in zip(candidates[site.name], noise.tolist(), strict=True)
        ]
        if timed:
            weight = reference.get_submodule(site.name).weight
            assert isinstance(weight, Tensor)
            exact = tuple(torch.zeros(len(timesteps)).masked_fill(found.rest.isnan(), torch.nan))
            options.append(
                Option(None, weight.nbytes, time.floating, tuple(float(x) for x in exact))
            )
        bits = layers[site.name].weights.bits  # type: ignore[union-attr]
        planned[site.name] = SiteBits(site.weights, tuple(options), bits)
        codes += site.layer.codes.nbytes
    tensors = [*quantized.parameters(), *quantized.buffers()]
    total = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
    plan = BitPlan(
        timesteps=tuple(timesteps.tolist()),
        sites=planned,
        rest=tuple(found.rest.tolist()),
        fixed_bytes=total - codes,
        float_bytes=prepared.nbytes(),
        budget="the recipe",
    )
    return plan.within(budget)


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


def _candidates(site: Site, layer: LayerConfig, reference: fx.GraphModule) -> dict[int, QuantLayer]:
    """The layer at each number of bits that may be chosen."""
    original = reference.get_submodule(site.name)
    assert isinstance(site.layer, QuantLayer) and layer.weights is not None
    weight, bias = original.weight, original.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    return {
        bits: with_weight(
            site.layer,
            weight.detach(),
            None if bias is None else bias.detach(),
            dataclasses.replace(layer.weights, bits=bits),
        )
        for bits in BITS
    }


def _times(sites: Sequence[Site], device: torch.device) -> dict[str, LayerTime]:
    choose = chooser(device)
    return {
        site.name: layer_time(site.layer, site.nodes, choose)
        for site in sites
        if isinstance(site.layer, QuantLayer)
    }
