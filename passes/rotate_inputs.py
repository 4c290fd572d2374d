"""Rotate the inputs of linear layers by Hadamard matrices in blocks, and their weights likewise.

y = linear(x)    ->    y = linear'(flatten(unflatten(x) @ H)),  with W' = W H in blocks, H H^T = 1
"""

from __future__ import annotations

import math
from collections.abc import Collection

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
    layer_input,
    layer_with,
    readers,
    sites_named,
    weight_of,
)
from tfmq_fx.ir.sites import Site

ROTATION = "hadamard"  # buffers of the matrices


@graph_pass(takes=Stage.CAPTURED, gives=Stage.CAPTURED)
def rotate_inputs(gm: fx.GraphModule, *, group: int, only: Collection[str]) -> Rewrite:
    """The graph whose linear layers in `only` read rotated inputs; outputs are equal up to float
    reassociation. As in QuaRot and, in groups, in ConvRot.

    group: channels in a block, a power of two; a layer that it does not divide takes the largest
    power of two that does.  Sites that read one value read one rotation of it.  Declined:
    convolutions, layers with an odd number of input features, and what is rotated already.
    details["group"]: the channels in each block, by site.  Raises ConfigError for another `group`.
    """
    if group < 2 or group & (group - 1):
        raise ConfigError(f"channels in a block must be a power of two, got {group}")
    sites, declined = sites_named(gm, only)
    groups: dict[str, int] = {}
    for site in sites:
        reason = _reason(site)
        if reason:
            declined.append(Declined(site.name, reason))
        else:
            groups[site.name] = math.gcd(weight_of(site.layer).shape[1], group)
    buffers: dict[tuple[int, torch.dtype, torch.device], str] = {}
    for x, calls in readers(gm, [site for site in sites if site.name in groups]):
        rotated: dict[int, fx.Node] = {}
        for site, node in calls:
            size, value = groups[site.name], x.meta["val"]
            if size not in rotated:
                key = (size, value.dtype, value.device)
                if key not in buffers:
                    matrix = hadamard(size).to(value.dtype).to(value.device)
                    buffers[key] = set_buffer(gm, ROTATION, matrix)
                rotated[size] = _rotated(gm, node, x, buffers[key])
            node.replace_input_with(x, rotated[size])
    for site in sites:
        if site.name in groups:
            weight = _rotated_weight(weight_of(site.layer), groups[site.name])
            gm.set_submodule(site.name, layer_with(site.layer, weight, bias_of(site.layer)))
    return Rewrite(gm, len(groups), declined, {"group": groups})


def hadamard(size: int) -> Tensor:
    """The Hadamard matrix (size, size) by Sylvester's construction, orthonormal and symmetric,
    float64; size: a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(pair, matrix)
    return matrix / math.sqrt(size)


def _reason(site: Site) -> str | None:
    """Why the input of a site cannot be rotated, or None where it can."""
    if not isinstance(site.layer, nn.Linear):
        return "a convolution: only linear layers are rotated"
    if weight_of(site.layer).shape[1] % 2:
        return f"no power of two divides its {weight_of(site.layer).shape[1]} input features"
    if any(_is_rotated(layer_input(node)) for node in site.nodes):
        return "its input is rotated already"
    return None


def _is_rotated(x: fx.Node) -> bool:
    """Whether a value is the result of `_rotated`."""
    product = x.args[0] if x.target is torch.flatten else None
    if not isinstance(product, fx.Node) or product.target is not torch.matmul:
        return False
    matrix = product.args[1]
    return isinstance(matrix, fx.Node) and str(matrix.target).startswith(ROTATION)


def _rotated(gm: fx.GraphModule, node: fx.Node, x: fx.Node, buffer: str) -> fx.Node:
    """Insert the rotation of x (..., in) in blocks, in front of `node`."""
    size = gm.get_buffer(buffer).shape[0]
    blocks = x.meta["val"].shape[-1] // size
    split = call_before(node, torch.unflatten, x, -1, (blocks, size), name=f"{node.name}_blocks")
    matrix = buffer_before(gm, node, buffer)
    product = call_before(node, torch.matmul, split, matrix, name=f"{node.name}_product")
    return call_before(node, torch.flatten, product, -2, name=f"{node.name}_rotated")


def _rotated_weight(weight: Tensor, size: int) -> Tensor:
    """The weight (out, in) for rotated inputs.

    By the inverse of the matrix as stored, whose entries are all rounded alike: in half precision
    1 / sqrt(2) is off by 1e-4, which outputs need not be.
    """
    exact = hadamard(size).to(weight.device)
    entry = float(exact[0, 0])
    stored = float(exact[0, 0].to(weight.dtype))
    blocks = torch.unflatten(weight.double(), -1, (-1, size))
    rotated = blocks @ (exact * (entry / stored))
    return rotated.flatten(-2).to(weight.dtype)
