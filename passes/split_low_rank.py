"""Split layers into a low-rank branch in 16 bits and a residual weight that is quantized later.

y = conv(x)    ->    y = conv_R(x) + up(down(x)),  with W = R + up @ down
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph_pass import Declined, Rewrite, graph_pass
from tfmq_fx.ir.layer_edits import (
    bias_of,
    call_before,
    groups_of,
    layer_before,
    layer_input,
    layer_with,
    replace_call,
    sites_named,
    weight_of,
)
from tfmq_fx.ir.sites import Site
from tfmq_fx.quant.low_rank import LowRank, low_rank_factors

SUFFIX = "_low_rank"  # of the branch's path


@graph_pass(takes=Stage.CAPTURED, gives=Stage.CAPTURED)
def split_low_rank(
    gm: fx.GraphModule,
    *,
    rank: int,
    only: Collection[str],
    importance: Mapping[str, Tensor] | None = None,
) -> Rewrite:
    """The graph with a branch of rank `rank` beside each site of `only`; outputs are equal up to
    float rounding. As in SVDQuant.

    The branch is the part of the weight that counts most for inputs of this importance: root mean
    square of each input channel, (in_channels,), by site, 1 where it is not given.  It lies at
    `<site>_low_rank`; the site keeps the residual, less the branch as rounded to 16 bits, and its
    bias.  Declined: grouped convolutions, and layers of which the branch would have half the
    weights.
    details["share"]: the part of each weight's weighted square norm that its branch holds.
    Raises ConfigError for an importance that cannot be used.
    """
    if rank < 1:
        raise ConfigError(f"the rank of a branch must be at least 1, got {rank}")
    sites, declined = sites_named(gm, only)
    shares: dict[str, float] = {}
    for site in sites:
        if reason := _reason(gm, site, rank):
            declined.append(Declined(site.name, reason))
            continue
        weight = weight_of(site.layer)
        s = _checked(site, (importance or {}).get(site.name))
        branch = LowRank.from_layer(site.layer, *low_rank_factors(weight, s, rank))
        residual = weight.double() - branch.product()
        rest, whole = (_square(part, s) for part in (residual, weight.double()))
        residual = residual.to(weight.dtype)
        if not bool(torch.isfinite(residual).all()):
            declined.append(Declined(site.name, f"its factors overflow {branch.down.dtype}"))
            continue
        gm.set_submodule(site.name, layer_with(site.layer, residual, bias_of(site.layer)))
        gm.add_submodule(site.name + SUFFIX, branch)
        for node in site.nodes:
            x, name = layer_input(node), node.name
            layer = gm.get_submodule(site.name)
            terms = (
                layer_before(node, site.name, layer, x, f"{name}_residual"),
                layer_before(node, site.name + SUFFIX, branch, x, f"{name}{SUFFIX}"),
            )
            replace_call(node, call_before(node, torch.add, *terms, name=f"{name}_sum"))
        shares[site.name] = 1 - rest / whole if whole else 0.0
    return Rewrite(gm, len(shares), declined, {"share": shares})


def _reason(gm: fx.GraphModule, site: Site, rank: int) -> str | None:
    """Why a site cannot get a branch, or None where it can."""
    weight, owner = weight_of(site.layer), site.name.rpartition(".")[0]
    out, width = weight.flatten(1).shape
    if groups_of(site.layer) > 1:
        return "a grouped convolution: its weight is not one matrix"
    if hasattr(gm.get_submodule(owner), site.name.rpartition(".")[2] + SUFFIX):
        return f"there is a {site.name}{SUFFIX} already"
    if rank >= min(out, width):
        return f"its rank is {min(out, width)} at most"
    if 2 * rank * (width + out) >= out * width:
        return f"a branch of rank {rank} has half of its {out * width} weights or more"
    if weight.is_meta:
        return "its weight is on the meta device and has no content"
    return None


def _checked(site: Site, importance: Tensor | None) -> Tensor:
    """The checked importance of input channels, (in_channels,) float64, on the weight's device."""
    weight = weight_of(site.layer)
    channels = weight.shape[1]
    if importance is None:
        return torch.ones(channels, dtype=torch.float64, device=weight.device)
    wide = importance.detach().to(weight.device).double()
    if tuple(wide.shape) != (channels,) or not bool((torch.isfinite(wide) & (wide >= 0)).all()):
        raise ConfigError(
            f"{site.name}: the importance of its {channels} input channels must be finite, not "
            f"negative and of shape ({channels},), got shape {tuple(wide.shape)}"
        )
    return wide


def _square(weight: Tensor, importance: Tensor) -> float:
    """The squared norm of a weight (out, in, ...) whose input channels are multiplied by
    `importance`."""
    return float((weight * importance.view(-1, *[1] * (weight.dim() - 2))).square().sum())
