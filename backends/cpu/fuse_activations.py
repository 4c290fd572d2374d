"""Fuse the activation that follows a layer into its kernel.

gelu(linear(q, s))    ->    linear(q, s), which applies gelu
"""

from __future__ import annotations

from torch import fx, nn

from tfmq_fx.backends.codes.layers import ConcatLayer
from tfmq_fx.backends.codes.matching import called, layer_on_codes, only_user, written_nodes
from tfmq_fx.ir.node_info import op_name

from .codes_layer import CpuCodesLayer


def fuse_activations(gm: fx.GraphModule) -> int:
    """Let layers apply the SiLU or GELU that reads their result, in place; returns how many.

    Left alone where something else reads the result, and where a layer is called twice.
    """
    changed, written = 0, written_nodes(gm)
    for node in list(gm.graph.nodes):
        layer = layer_on_codes(gm, node)
        user = only_user(node) if layer is not None else None
        if user is None or layer is None or {node, user} & written:
            continue
        first = layer.first if isinstance(layer, ConcatLayer) else layer
        assert isinstance(first, CpuCodesLayer)
        name = activation(gm, user)
        once = len(gm.graph.find_nodes(op="call_module", target=node.target)) == 1
        fresh = first.activation == "none" and "out_scale" not in node.kwargs
        if name is None or not once or not fresh:
            continue
        first.activation = name
        user.replace_all_uses_with(node)
        gm.graph.erase_node(user)
        changed += 1
    return changed


def activation(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """The kernels' name of the activation that a node applies; None where it is no activation."""
    silu, gelu = called(gm, node, nn.SiLU), called(gm, node, nn.GELU)
    settings = {**node.kwargs}
    if silu is not None:
        return None if silu.inplace else "silu"
    if gelu is not None:
        settings = {"approximate": gelu.approximate}
    elif op_name(node) == "silu":
        return "silu" if len(node.args) == 1 and not settings.get("inplace") else None
    elif op_name(node) != "gelu" or len(node.args) > 1:
        return None
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(settings.get("approximate", "none")))
