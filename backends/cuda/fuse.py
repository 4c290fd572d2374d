"""Fusions of a graph lowered to the CUDA kernels: codes made once, by what computes the input, and
sums taken over by the kernels' epilogues."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.graph import prune
from tfmq_fx.layers import call_before
from tfmq_fx.ops import is_random, op_name, timestep_row, writers

from .fuse_norms import fuse_norms
from .layers import ConcatLayer, CudaLayer, dynamic_scale, quantize_input
from .views import channels_last_of, node_shape, view_chain

Layer = CudaLayer | ConcatLayer
_NO_BORDERS = (None, (0, 0, 0, 0))


def fuse(gm: fx.GraphModule) -> dict[str, int]:
    """Fuse what can be, in place; how often each kind was."""
    counts = {}
    for fusion in FUSIONS:
        counts[fusion.__name__] = fusion(gm)
        prune(gm.graph)
    return counts


def drop_noops(gm: fx.GraphModule) -> int:
    """x / 1, dropout(x), identity(x), quantize_input(x.contiguous())    ->    x

    Dropout in eval mode; only where nothing is written in place.
    """
    written, changed = written_nodes(gm), 0
    for node in list(gm.graph.nodes):
        if _is_noop(gm, node):
            x = node.args[0] if isinstance(node.args[0], fx.Node) else node.args[1]
            assert isinstance(x, fx.Node)
            if not {x, node} & written:
                node.replace_all_uses_with(x)
                gm.graph.erase_node(node)
                changed += 1
    return changed


def share_quantize(gm: fx.GraphModule) -> int:
    """q0 = quantize_input(x, s0); q1 = quantize_input(x, s1), s0 == s1    ->    q0 for both

    Scales are equal by content: columns of one look-up, static ranges, or measured alike.
    """
    written, changed = written_nodes(gm), 0
    found: dict[Any, fx.Node] = {}
    for node in gm.graph.find_nodes(op="call_function", target=quantize_input):
        x, scale, *settings = node.args
        if x in written:
            continue
        first = found.setdefault((x, _content(gm, scale), *settings), node)
        if first is not node:
            for user in list(node.users):
                user.replace_input_with(scale, first.args[1])
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)
            changed += 1
    return changed


def skip_concat(gm: fx.GraphModule) -> int:
    """narrow(cat([a, b], 1), 1, 0, channels of a)    ->    a"""
    written, changed = written_nodes(gm), 0
    for node in list(gm.graph.nodes):
        whole = node.args[0] if op_name(node) == "narrow" else None
        part = _part(whole, *node.args[1:]) if isinstance(whole, fx.Node) else None
        if part is not None and not {part, whole, node} & written:
            node.replace_all_uses_with(part)
            gm.graph.erase_node(node)
            changed += 1
    return changed


def merge_concat(gm: fx.GraphModule) -> int:
    """conv.0(q0, s0) + conv.1(q1, s1)    ->    conv.0_1(q0, s0, q1, s1), one kernel

    Both of one geometry and used once, at most one with a bias.  A further part stays beside them:
    its epilogue takes the sum of the others.
    """
    changed = 0
    for node in list(gm.graph.nodes):
        pair = _summands(node)
        layers = [_layer(gm, value) for value in pair]
        if len(layers) != 2 or not all(isinstance(layer, CudaLayer) for layer in layers):
            continue
        if any(len(call.users) > 1 or len(call.args) > 2 or call.kwargs for call in pair):
            continue
        if any(node_shape(call) != node_shape(node) for call in pair) or not _fit(gm, *pair):
            continue
        first, second = pair if _bias_free(gm, pair[1]) else reversed(pair)
        path = _merged(gm, str(first.target), str(second.target))
        replace_sum(node, first, path, (*first.args, *second.args), {}, also=[second])
        changed += 1
    return changed


def absorb_rows(gm: fx.GraphModule) -> int:
    """conv(q, s) + row[:, :, None, None]    ->    conv(q, s, row=row)

    And linear(q, s) + row[:, None]; in place too, as nothing else reads the layer's result.
    """
    changed = 0
    for node in list(gm.graph.nodes):
        for call, other in _sums_with_layer(gm, node, "row"):
            layer, (batch, *rest) = _layer(gm, call), node_shape(node)
            ones = ["1"] * (len(rest) - 1)
            inner = [rest[0], *ones] if _is_conv(layer) else [*ones, rest[-1]]
            if len(rest) > 1 and node_shape(other) == [batch, *inner]:
                row = call_before(node, torch.flatten, other, 1, name=f"{call.name}_row")
                replace_sum(node, call, call.target, call.args, {**call.kwargs, "row": row})
                changed += 1
                break
    return changed


def absorb_residuals(gm: fx.GraphModule) -> int:
    """conv(q, s) + r    ->    conv(q, s, residual=r)

    And view(linear(q, s)) + r, where the view makes an image (B, C, H, W) of tokens (B, H * W, C):
    r is viewed as tokens.  Of two layers the later one takes the other's result.
    """
    changed = 0
    for node in list(gm.graph.nodes):
        for call, other in _sums_with_layer(gm, node, "residual"):
            if node_shape(other) == node_shape(node):
                replace_sum(node, call, call.target, call.args, {**call.kwargs, "residual": other})
                changed += 1
                break
        else:
            changed += _absorb_behind_view(gm, node)
    return changed


def requantize(gm: fx.GraphModule) -> int:
    """quantize_input(linear(q, s), s1)    ->    linear(q, s, out_scale=s1), which gives codes

    And convolutions, where the codes need no borders; of layers that are called once.
    """
    changed = 0
    for node in gm.graph.find_nodes(op="call_function", target=quantize_input):
        call, scale, zero, levels, dtype, pads = node.args
        layer = _layer(gm, call)
        if not isinstance(layer, CudaLayer) or len(call.users) > 1 or "out_scale" in call.kwargs:
            continue
        alone = len(gm.graph.find_nodes(op="call_module", target=call.target)) == 1
        fits = pads in _NO_BORDERS and layer.is_conv == (pads is not None)
        if alone and fits and scale.meta["val"].dim() == 1:
            layer.requantizes(zero, levels, dtype)
            replace_sum(node, call, call.target, call.args, {**call.kwargs, "out_scale": scale})
            changed += 1
    return changed


FUSIONS: list[Callable[[fx.GraphModule], int]] = [
    drop_noops,
    share_quantize,
    skip_concat,
    merge_concat,
    absorb_rows,
    absorb_residuals,
    fuse_norms,
    requantize,
]
"""In this order: what comes later reads what earlier ones leave."""
