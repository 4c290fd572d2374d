"""Split layers that read a channel concatenation into one layer for each part.

y = conv(x)    ->    y = conv.0(x[:, :n]) + conv.1(x[:, n:]),  x = cat(a, b), normed and activated
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx, nn

from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.concat_tracking import concat_parts, part_sizes
from tfmq_fx.ir.graph_pass import Declined, Rewrite, graph_pass
from tfmq_fx.ir.layer_edits import (
    bias_of,
    call_before,
    channel_dim,
    groups_of,
    layer_before,
    layer_input,
    layer_with,
    replace_call,
    sites_named,
    weight_of,
)
from tfmq_fx.ir.sites import Site


@graph_pass(takes=Stage.CAPTURED, gives=Stage.CAPTURED)
def split_concat(gm: fx.GraphModule, *, only: Collection[str]) -> Rewrite:
    """The graph whose layers read concatenated channels part by part; outputs are equal up to float
    reassociation. As Q-Diffusion's split shortcut.

    only: sites to rewrite where a concatenation of their input channels reaches them, through
    whatever keeps channels in their places; a concatenation of concatenations has all their parts.
    The parts of `<site>` lie at `<site>.0`, `<site>.1`, ...; the first one has the bias.
    Declined: sites whose input was concatenated and mixed since, and grouped convolutions.
    details["parts"]: the paths of the parts, by site.
    """
    sites, declined = sites_named(gm, only)
    tracked = concat_parts(gm)  # of the graph as it is: one layer may read what another one gives
    parts: dict[str, list[str]] = {}
    chosen: list[tuple[Site, list[int]]] = []
    for site in sites:
        weight, dim = weight_of(site.layer), channel_dim(site.layer)
        inputs = [layer_input(node) for node in site.nodes]
        cuts = {tracked[x].cuts.get(x.meta["val"].dim() + dim, frozenset()) for x in inputs}
        if cuts == {frozenset()}:
            if lost := next((tracked[x].lost for x in inputs if tracked[x].lost), None):
                reason = f"its input was concatenated, but {lost}"
                declined.append(Declined(site.name, reason))
            continue
        if len(cuts) > 1:
            declined.append(Declined(site.name, "its calls read different parts"))
            continue
        if groups_of(site.layer) > 1:
            declined.append(Declined(site.name, "a grouped convolution of concatenated channels"))
            continue
        chosen.append((site, part_sizes(cuts.pop(), weight.shape[1])))
    for site, sizes in chosen:
        layers = [
            layer_with(site.layer, part.clone(), None if i else bias_of(site.layer))
            for i, part in enumerate(weight_of(site.layer).split(sizes, 1))
        ]
        gm.set_submodule(site.name, nn.Module())
        named = {f"{site.name}.{i}": layer for i, layer in enumerate(layers)}
        for path, layer in named.items():
            gm.add_submodule(path, layer)
        for node in site.nodes:
            _split(node, channel_dim(site.layer), sizes, named)
        parts[site.name] = list(named)
    return Rewrite(gm, len(parts), declined, {"parts": parts})


def _split(node: fx.Node, dim: int, sizes: list[int], layers: dict[str, nn.Module]) -> None:
    """Replace the call of a layer by the sum of its parts' calls."""
    x, name, start = layer_input(node), node.name, 0
    terms = []
    for i, ((path, layer), size) in enumerate(zip(layers.items(), sizes, strict=True)):
        part = call_before(node, torch.narrow, x, dim, start, size, name=f"{name}_slice_{i}")
        terms.append(layer_before(node, path, layer, part, f"{name}_{i}"))
        start += size
    total = terms[0]
    for term in terms[1:]:
        total = call_before(node, torch.add, total, term, name=f"{name}_sum")
    replace_call(node, total)
