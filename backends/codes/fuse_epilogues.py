"""Fuse additions and quantization that follow a layer into the kernel of that layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tfmq_fx.ir.layer_edits import call_before
from tfmq_fx.ir.node_info import op_name

from .layers import CodesLayer, ConcatLayer, quantize_input
from .matching import (
    Codes,
    as_tokens,
    codes_layer,
    is_tensor,
    layer_on_codes,
    moves,
    node_shape,
    only_user,
    positions_after,
    positions_of,
    same_kind,
)


def merge_concat(gm: fx.GraphModule) -> int:
    """Run two layers whose results are added as one kernel, in place; returns how many pairs.

    conv.0(q0, s0) + conv.1(q1, s1)    ->    conv.0_1(q0, s0, q1, s1)

    Both have one geometry, at most one has a bias, and each result is used once.  A third summand
    stays apart: it becomes the residual of the two.
    """
    changed = 0
    for node in list(gm.graph.nodes):
        pair = _summands(node)
        if pair is None or not _share_kernel(gm, *pair):
            continue
        if not all(
            _has_free_epilogue(gm, call, "row", "residual") and same_kind(call, node)
            for call in pair
        ):
            continue
        first, second = sorted(
            pair, key=lambda call: gm.get_submodule(str(call.target)).bias is None
        )
        path = _concat_layer(gm, str(first.target), str(second.target))
        _replace(node, first, path, (*first.args, *second.args))
        gm.graph.erase_node(second)
        changed += 1
    return changed


def absorb_rows(gm: fx.GraphModule) -> int:
    """Let layers add a value for each sample and channel, in place; returns how many.

    conv(q, s) + row[:, :, None, None]    ->    conv(q, s, row=row)

    And linear(q, s) + row[:, None].  The layer's result is used once.
    """
    changed = 0
    for node in list(gm.graph.nodes):
        for call, other in _summand_pairs(node):
            if not _has_free_epilogue(gm, call, "row") or not same_kind(call, node):
                continue
            batch, *rest = node_shape(node)
            ones = ["1"] * (len(rest) - 1)
            layer = layer_on_codes(gm, call)
            is_conv = layer is not None and layer.is_conv
            shape = [rest[0], *ones] if is_conv else [*ones, rest[-1]]
            if ones and node_shape(other) == [batch, *shape]:
                row = call_before(node, torch.flatten, other, 1, name=f"{call.name}_row")
                _replace(node, call, row=row)
                changed += 1
                break
    return changed


def absorb_residuals(gm: fx.GraphModule) -> int:
    """Let layers add a tensor of the size of their result, in place; returns how many.

    conv(q, s) + r    ->    conv(q, s, residual=r)

    And image(linear(q, s)) + r    ->    image(linear(q, s, residual=tokens(r))), where views make
    an image (B, C, H, W) of tokens (B, H * W, C).  The layer's result is used once.  Of two layers
    the later one takes the result of the other.
    """
    changed = 0
    for node in list(gm.graph.nodes):
        for value, other in _summand_pairs(node):
            if not (same_kind(value, node) and same_kind(other, node)):
                continue
            call, views = _source(value)
            if not _has_free_epilogue(gm, call, "residual") or (
                views and not _makes_images(call, views)
            ):
                continue
            if views:
                flat = call_before(node, torch.flatten, other, 2, name=f"{call.name}_flat")
                other = call_before(node, torch.transpose, flat, 1, 2, name=f"{call.name}_tokens")
            _replace(node, call, views=views, residual=other)
            changed += 1
            break
    return changed


def requantize(gm: fx.GraphModule) -> int:
    """Let layers make the codes that the next layer reads, in place; returns how many.

    quantize_input(linear(q, s), s1)    ->    linear(q, s, out_scale=s1), which gives codes

    And of convolutions, where the codes need no borders.  The layer is called once.
    """
    changed = 0
    for node in gm.graph.find_nodes(op="call_function", target=quantize_input):
        codes = Codes._make(node.args)
        layer = codes_layer(gm, codes.x)
        if layer is None or not _has_free_epilogue(gm, codes.x):
            continue
        fits = layer.is_conv == (codes.pads is not None) and not any(codes.pads or ())
        once = len(gm.graph.find_nodes(op="call_module", target=codes.x.target)) == 1
        if fits and once and codes.scale.meta["val"].dim() == 1:
            layer.requantizes(codes.zero, codes.levels, codes.dtype)
            _replace(node, codes.x, out_scale=codes.scale)
            changed += 1
    return changed


def _summands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that a node adds into new memory."""
    if op_name(node) != "add" or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if first is second or not (is_tensor(first) and is_tensor(second)):
        return None
    return first, second


def _summand_pairs(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The pairs (layer result, other summand) to try for a node that adds, the later node first."""
    pair = _summands(node)
    if pair is None:
        return []
    return sorted([pair, pair[::-1]], key=lambda order: order[0], reverse=True)


def _has_free_epilogue(gm: fx.GraphModule, call: Any, *arguments: str) -> bool:
    """Whether a node calls a layer without any of these arguments, and one node reads it."""
    if layer_on_codes(gm, call) is None or only_user(call) is None:
        return False
    return not {*arguments, "out_scale"} & set(call.kwargs)


def _share_kernel(gm: fx.GraphModule, call: fx.Node, other: fx.Node) -> bool:
    """Whether one kernel can run two layers: only their channels, ranges and values differ."""
    first, second = (codes_layer(gm, c) for c in (call, other))
    if first is None or second is None or (first.bias is not None and second.bias is not None):
        return False

    def settings(layer: CodesLayer, c: fx.Node) -> list[Any]:
        problem = layer.problem
        geometry = [layer.is_conv, problem.stride, problem.dilation, layer.weight.shape[:3]]
        return [*geometry, layer.codes_dtype, layer.dtype, node_shape(c.all_input_nodes[0])[:-1]]

    takes = first.takes_second_segment and second.takes_second_segment
    return takes and settings(first, call) == settings(second, other)


def _concat_layer(gm: fx.GraphModule, first: str, second: str) -> str:
    """The path of the `ConcatLayer` of two layers, created if there is none yet."""
    parts = []
    for path in (first, second):
        part = gm.get_submodule(path)
        assert isinstance(part, CodesLayer)
        parts.append(part)
    path = f"{first}_{second.rpartition('.')[2]}"
    owner = gm.get_submodule(path.rpartition(".")[0])
    while hasattr(owner, path.rpartition(".")[2]):
        known = gm.get_submodule(path)
        if isinstance(known, ConcatLayer) and [known.first, known.second] == parts:
            return path
        path += "_"
    gm.add_submodule(path, ConcatLayer(*parts))
    for old, new in ((first, f"{path}.first"), (second, f"{path}.second")):
        for node in gm.graph.find_nodes(op="get_attr", target=f"{old}.act_scale"):
            node.target = f"{new}.act_scale"
    return path


def _source(value: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The value under a chain of views that are used once, and these views in order."""
    views: list[fx.Node] = []
    while moves(value) and only_user(value) is not None:
        views.insert(0, value)
        value = value.all_input_nodes[0]
    return value, views


def _makes_images(call: fx.Node, views: list[fx.Node]) -> bool:
    """Whether views show tokens (B, H * W, C) as images (B, C, H, W)."""
    positions = positions_of(call)
    images = positions_after(views, positions)
    return images.dim() == 4 and torch.equal(as_tokens(images), positions)


def _replace(
    node: fx.Node,
    call: fx.Node,
    path: str | None = None,
    args: tuple[Any, ...] | None = None,
    views: Sequence[fx.Node] = (),
    **added: Any,
) -> None:
    """Replace a call of a layer, and `node` that adds to its result, by one call with `added`.

    path, args: of the call, where they are not what they were.  views: of the result, in between.
    """
    graph = node.graph
    with graph.inserting_before(node):
        fused = graph.call_module(path or str(call.target), args or call.args)
    fused.kwargs = {**call.kwargs, **added}
    fused.meta = {**call.meta, "val": (call if views else node).meta["val"]}
    call.replace_all_uses_with(fused)
    for view in views:
        node.prepend(view)
    node.replace_all_uses_with(views[-1] if views else fused)
    graph.erase_node(node)
    graph.erase_node(call)
    fused.name = (call if views else node).name
    for view in views:  # other layers' images lie channels last too
        if op_name(view) == "contiguous":
            view.replace_all_uses_with(view.all_input_nodes[0])
            graph.erase_node(view)
