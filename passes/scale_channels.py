"""Divide the input channels of layers by factors, and multiply their weights by them.

y = conv(x)    ->    y = conv'(x * (1 / r)),  with weights W' = W * r along the input channels
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph import set_buffer
from tfmq_fx.ir.graph_pass import Declined, Rewrite, graph_pass
from tfmq_fx.ir.layer_edits import (
    bias_of,
    buffer_before,
    call_before,
    groups_of,
    layer_with,
    readers,
    sites_named,
    weight_of,
)
from tfmq_fx.ir.sites import Site

SCALES = "input_scale"  # buffers of the multipliers 1 / r


@graph_pass(takes=Stage.CAPTURED, gives=Stage.CAPTURED)
def scale_channels(gm: fx.GraphModule, *, factors: Mapping[str, Tensor]) -> Rewrite:
    """The graph with layers that read scaled inputs; outputs are equal up to float rounding.

    They are equal bit for bit where factors are powers of two (and nothing over- or underflows).

    factors: r of each site to rewrite, (in_channels,), finite and positive.  Sites that read the
    same value by equal factors read one product.  Scaling twice multiplies the factors.
    details["largest"]: the largest factor of each site.  Raises ConfigError, naming the site, for
    factors that cannot be used.
    """
    sites, declined = sites_named(gm, factors)
    multipliers: dict[str, Tensor] = {}
    largest: dict[str, float] = {}
    for site in sites:
        factor = _checked(site, factors[site.name])
        if bool((factor == 1).all()):
            declined.append(Declined(site.name, "every factor is 1"))
            continue
        multiplier = _multiplier(site, factor)
        weight = _scaled_weight(site.layer, multiplier)
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            declined.append(Declined(site.name, f"its scaled weight overflows {weight.dtype}"))
            continue
        gm.set_submodule(site.name, layer_with(site.layer, weight, bias_of(site.layer)))
        multipliers[site.name], largest[site.name] = multiplier, float(factor.max())
    buffers: dict[str, str] = {}
    for x, calls in readers(gm, [site for site in sites if site.name in multipliers]):
        products: list[tuple[Tensor, fx.Node]] = []
        for site, node in calls:
            value = multipliers[site.name]
            product = next(
                (p for m, p in products if m.shape == value.shape and m.equal(value)), None
            )
            if product is None:
                if site.name not in buffers:
                    buffers[site.name] = set_buffer(gm, SCALES, value.to(x.meta["val"].device))
                scale = buffer_before(gm, node, buffers[site.name])
                product = call_before(node, torch.mul, x, scale, name=f"{node.name}_scaled")
                products.append((value, product))
            node.replace_input_with(x, product)
    return Rewrite(gm, len(multipliers), declined, {"largest": largest})


def _checked(site: Site, factor: Tensor) -> Tensor:
    """The checked factors of a site on the CPU, (in_channels,) float64."""
    channels = weight_of(site.layer).shape[1] * groups_of(site.layer)
    if tuple(factor.shape) != (channels,):
        raise ConfigError(
            f"{site.name}: factors of shape {tuple(factor.shape)}, "
            f"but the layer has {channels} input channels"
        )
    wide = factor.detach().cpu().double()
    if not bool((torch.isfinite(wide) & (wide > 0)).all()):
        raise ConfigError(f"{site.name}: factors must be finite and positive")
    return wide


def _multiplier(site: Site, factor: Tensor) -> Tensor:
    """1 / r in the weight's dtype, shaped to multiply the layer's input."""
    weight = weight_of(site.layer)
    multiplier = (1 / factor).to(weight.dtype).view(-1, *[1] * (weight.dim() - 2))
    if not bool((torch.isfinite(multiplier) & (multiplier > 0)).all()):
        raise ConfigError(
            f"{site.name}: 1 / r of factors from {float(factor.min()):.3g} to "
            f"{float(factor.max()):.3g} does not fit {weight.dtype}"
        )
    return multiplier


def _scaled_weight(layer: nn.Module, multiplier: Tensor) -> Tensor:
    """The weight for inputs multiplied by `multiplier`; it makes up for the rounding of that."""
    weight, groups = weight_of(layer), groups_of(layer)
    by_group = weight.double().view(groups, -1, *weight.shape[1:])
    scale = multiplier.double().to(weight.device)
    return (
        (by_group / scale.view(groups, 1, *weight.shape[1:2], *multiplier.shape[1:]))
        .to(weight.dtype)
        .view_as(weight)
    )
