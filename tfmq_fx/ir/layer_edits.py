"""Layers and nodes in place of others: what the rewrites of layers share."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.quant.modules import QUANTIZED

from .graph_pass import Declined
from .node_info import writers
from .sites import Site, find_sites

Call = tuple[Site, fx.Node]  # a layer and one node that calls it


def sites_named(gm: fx.GraphModule, names: Collection[str]) -> tuple[list[Site], list[Declined]]:
    """The sites of these names in execution order, and those names that are no sites, with why.

    Raises ConfigError on a name that is neither.
    """
    sites, declined = find_sites(gm)
    found = [site for site in sites if site.name in names]
    others = [d for d in declined if d.site in names]
    if unknown := sorted(set(names) - {s.name for s in found} - {d.site for d in others}):
        raise ConfigError(f"no layer {', '.join(unknown)} in the graph; see find_sites")
    return found, others


def layer_input(node: fx.Node) -> fx.Node:
    """The value that the call of a layer reads, given by position or as `input`."""
    x = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(x, fx.Node)
    return x


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer, (out, in / groups, *kernel), detached."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach()


def bias_of(layer: nn.Module) -> Tensor | None:
    """A copy of the bias of a layer, (out,), or None."""
    return layer.bias.detach().clone() if isinstance(layer.bias, Tensor) else None


def groups_of(layer: nn.Module) -> int:
    """The groups of a convolution; 1 for a linear layer."""
    groups = getattr(layer, "groups", 1)
    assert isinstance(groups, int)
    return groups


def channel_dim(layer: nn.Module) -> int:
    """The dimension of a layer's input that holds the channels, counted from the end."""
    return 1 - weight_of(layer).dim()


def layer_with(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A new torch.nn layer with this weight (out, in / groups, *kernel) and bias (out,), and all
    other settings of `layer`, which is left alone."""
    kind: Any = next(kind for kind in QUANTIZED if isinstance(layer, kind))
    out, width = weight.shape[:2]
    common: dict[str, Any] = {"bias": bias is not None, "device": "meta"}  # replaced below
    if kind is nn.Linear:
        made = nn.Linear(width, out, **common)
    else:
        made = kind(
            width * layer.groups,
            out,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            **common,
        )
    wants_grad = layer.weight.requires_grad
    made.weight = nn.Parameter(weight, requires_grad=wants_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=wants_grad)
    return made.train(layer.training)


def readers(gm: fx.GraphModule, sites: Collection[Site]) -> list[tuple[fx.Node, list[Call]]]:
    """Each value that layers read, with the calls that read it, both in graph order.

    The calls see the same content: a value that is written in place comes once for every call.
    """
    owner = {node: site for site in sites for node in site.nodes}
    written = {node for _, bases in writers(gm) for node in bases}
    found: dict[Any, tuple[fx.Node, list[Call]]] = {}
    for node in gm.graph.nodes:
        if node in owner:
            x = layer_input(node)
            key = (x, node) if x in written else x
            found.setdefault(key, (x, []))[1].append((owner[node], node))
    return list(found.values())


def call_before(
    node: fx.Node, target: Callable[..., Any], *args: Any, name: str, **kwargs: Any
) -> fx.Node:
    """A new call in front of `node`, with its value, recorded where `node` was."""

    def value(used: fx.Node) -> Any:
        return used.meta["val"]

    graph = node.graph
    with graph.inserting_before(node):
        made = graph.create_node("call_function", target, args, kwargs, name=name)
    values, named = fx.map_arg(args, value), fx.map_arg(kwargs, value)
    with enable_python_dispatcher():
        result = target(*values, **named)
    made.meta = {"val": result, "nn_module_stack": node.meta["nn_module_stack"]}
    return made


def buffer_before(gm: fx.GraphModule, node: fx.Node, buffer: str) -> fx.Node:
    """A new node in front of `node` that reads a buffer or parameter of the graph by its path."""
    with gm.graph.inserting_before(node):
        made = gm.graph.get_attr(buffer)
    fake = node.meta["val"].fake_mode
    tensor: Tensor = operator.attrgetter(buffer)(gm)
    value = fake.from_tensor(tensor.detach(), static_shapes=True)
    made.meta = {"val": value, "nn_module_stack": node.meta["nn_module_stack"]}
    return made


def layer_before(node: fx.Node, path: str, layer: nn.Module, x: fx.Node, name: str) -> fx.Node:
    """A new call of the layer at `path` on x in front of `node`, whose value it resembles."""
    with node.graph.inserting_before(node):
        made = node.graph.create_node("call_module", path, (x,), name=name)
    value = node.meta["val"]
    with value.fake_mode:  # memory of its own: values that share some may be written together
        made.meta["val"] = torch.empty_like(value)
    stack = node.meta["nn_module_stack"]
    outer = {
        key: (p, kind) for key, (p, kind) in stack.items() if not p or path.startswith(p + ".")
    }
    made.meta["nn_module_stack"] = outer | {path: (path, type(layer))}
    return made


def replace_call(node: fx.Node, new: fx.Node) -> None:
    """Put `new` in the place of the call of a layer, whose name and metadata it takes over."""
    node.replace_all_uses_with(new)
    new.meta = {**node.meta, "val": new.meta["val"]}
    node.graph.erase_node(node)
    new.name = node.name  # what is compared with the original is found by name
