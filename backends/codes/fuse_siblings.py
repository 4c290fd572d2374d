"""Join layers that read the same codes: queries, keys and values of attention.

q(c, s), k(c, s), v(c, s)    ->    y = q_k_v(c, s);  y[..., :n], y[..., n:m], y[..., m:]
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from tfmq_fx.ir.layer_edits import call_before

from .choice import Choice, Chooser
from .layers import CodesLayer, joint_problem
from .matching import codes_layer


def join_siblings(gm: fx.GraphModule, choose: Chooser) -> int:
    """Join layers that read the same codes with the same scale, in place; returns the calls saved.

    One wide product fills a device that narrow ones leave idle. Left alone where a layer is called
    twice or adds anything to its sums, and where the trial found the narrow ones faster together.
    choose: the kernel for the joint problem.
    """
    families: dict[Any, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="call_module"):
        layer = codes_layer(gm, node)
        if layer is None or node.kwargs:
            continue
        if len(gm.graph.find_nodes(op="call_module", target=node.target)) == 1:
            alike = dataclasses.replace(layer.problem, out_channels=0)
            key = (*node.args, layer.is_conv, layer.dtype, alike)
            families.setdefault(key, []).append(node)
    changed = 0
    for nodes in families.values():
        layers = [layer for node in nodes if (layer := codes_layer(gm, node))]
        choice = _worth_it(layers, choose) if len(nodes) > 1 else None
        if choice is not None:
            _join(gm, nodes, layers, choice)
            changed += len(nodes) - 1
    return changed


def _worth_it(layers: Sequence[CodesLayer], choose: Chooser) -> Choice | None:
    """The kernel for layers side by side, or None where they are faster apart."""
    joint = choose(joint_problem(layers), layers[0].dtype)
    if joint.engine == "float":
        return None
    joint = layers[0].with_own_engine(joint)
    if joint.micros and all(layer.choice.micros for layer in layers):
        apart = sum(layer.choice.micros[layer.choice.engine] for layer in layers)
        return joint if joint.micros[joint.engine] < apart else None
    return joint


def _join(
    gm: fx.GraphModule, nodes: Sequence[fx.Node], layers: Sequence[CodesLayer], choice: Choice
) -> None:
    """Replace calls of layers by slices of one joint call in the place of the first."""
    first, paths = nodes[0], [str(node.target) for node in nodes]
    path = "_".join([paths[0], *(other.rpartition(".")[2] for other in paths[1:])])
    owner = gm.get_submodule(path.rpartition(".")[0])
    while hasattr(owner, path.rpartition(".")[2]):
        path += "_"
    gm.add_submodule(path, CodesLayer.side_by_side(layers, choice))
    for node in gm.graph.find_nodes(op="get_attr"):
        if node.target in [f"{old}.act_scale" for old in paths]:
            node.target = f"{path}.act_scale"
    with gm.graph.inserting_before(first):
        joint = gm.graph.call_module(path, first.args)
    channels = 1 if layers[0].is_conv else first.meta["val"].dim() - 1
    shape = list(first.meta["val"].shape)
    shape[channels] = sum(len(layer.weight) for layer in layers)
    joint.meta = {**first.meta, "val": first.meta["val"].new_empty(shape)}
    start = 0
    for node, layer in zip(nodes, layers, strict=True):
        end = start + len(layer.weight)
        index = (slice(None),) * channels + (slice(start, end),)
        part = call_before(first, operator.getitem, joint, index, name=f"{node.name}_part")
        node.replace_all_uses_with(part)
        part.meta = {**node.meta}
        start = end
    for node in nodes:
        gm.graph.erase_node(node)
