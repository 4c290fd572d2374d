"""Helpers shared by layer rewrites: build, insert and replace layers and their calls."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.quant.modules import QUANTIZED, channels_swapped, weight_rows

from .graph_pass import Declined
from .node_info import writers
from .sites import Site, find_sites

Call = tuple[Site, fx.Node]  # a layer and one node that calls it


def sites_named(gm: fx.GraphModule, names: Collection[str]) -> tuple[list[Site], list[Declined]]:
    """The sites with the names `names` in execution order, and the declined layers among them.

    Raises ConfigError for a name of neither.
    """
    sites, declined = find_sites(gm)
    sites = [site for site in sites if site.name in names]
    declined = [each for each in declined if each.site in names]
    if unknown := sorted(set(names) - {s.name for s in sites} - {d.site for d in declined}):
        raise ConfigError(f"no layer {', '.join(unknown)} in the graph; see find_sites")
    return sites, declined


def layer_input(node: fx.Node) -> fx.Node:
    """The input value of a layer's call, passed by position or as `input`."""
    x = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(x, fx.Node)
    return x


def weight_of(layer: nn.Module) -> Tensor:
    """The detached weight of a layer, (out, in / groups, *kernel)."""
    return weight_rows(layer).detach()


def bias_of(layer: nn.Module) -> Tensor | None:
    """A copy of the bias of a layer, (out,), or None."""
    return layer.bias.detach().clone() if isinstance(layer.bias, Tensor) else None


def groups_of(layer: nn.Module) -> int:
    """The number of groups of a convolution; 1 for a linear layer."""
    groups = getattr(layer, "groups", 1)
    assert isinstance(groups, int)
    return groups


def channel_dim(layer: nn.Module) -> int:
    """The channel dimension of a layer's input, counted from the end."""
    return 1 - weight_of(layer).dim()


def layer_with(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A new torch.nn layer with `weight` (out, in / groups, *kernel), `bias` (out,), and the other
    settings of `layer`."""
    kind: Any = next(kind for kind in QUANTIZED if isinstance(layer, kind))
    out, width = weight.shape[:2]
    common: dict[str, Any] = {"bias": bias is not None, "device": "meta"}  # replaced below
    if kind is nn.Linear:
        new = nn.Linear(width, out, **common)
    else:
        settings = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        common |= {name: getattr(layer, name) for name in settings}
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            common["output_padding"] = layer.output_padding
            new = kind(width * layer.groups, out, **common)
            weight = channels_swapped(weight, layer.groups)
        else:
            new = kind(width * layer.groups, out, **common)
    wants_grad = layer.weight.requires_grad
    new.weight = nn.Parameter(weight, requires_grad=wants_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias, requires_grad=wants_grad)
    return new.train(layer.training)


def readers(gm: fx.GraphModule, sites: Collection[Site]) -> list[tuple[fx.Node, list[Call]]]:
    """Each value that layers read, with the layer calls that read it, both in graph order.

    A value that is written in place is listed once for every call, as its content may differ.
    """
    owner = {node: site for site in sites for node in site.nodes}
    written = {node for _, bases in writers(gm) for node in bases}
    calls: dict[Any, tuple[fx.Node, list[Call]]] = {}
    for node in gm.graph.nodes:
        if node in owner:
            x = layer_input(node)
            key = (x, node) if x in written else x
            calls.setdefault(key, (x, []))[1].append((owner[node], node))
    return list(calls.values())


def call_before(
    node: fx.Node, target: Callable[..., Any], *args: Any, name: str, **kwargs: Any
) -> fx.Node:
    """Insert a call of a function in front of `node`, with its value and the module of `node`."""
    with node.graph.inserting_before(node):
        new = node.graph.create_node("call_function", target, args, kwargs, name=name)
    values, named = fx.map_arg((args, kwargs), lambda used: used.meta["val"])
    with enable_python_dispatcher():
        result = target(*values, **named)
    new.meta = {"val": result, "nn_module_stack": node.meta["nn_module_stack"]}
    return new


def buffer_before(gm: fx.GraphModule, node: fx.Node, buffer: str) -> fx.Node:
    """Insert a node that reads a buffer or parameter of the graph in front of `node`."""
    with gm.graph.inserting_before(node):
        new = gm.graph.get_attr(buffer)
    fake = node.meta["val"].fake_mode
    tensor: Tensor = operator.attrgetter(buffer)(gm)
    value = fake.from_tensor(tensor.detach(), static_shapes=True)
    new.meta = {"val": value, "nn_module_stack": node.meta["nn_module_stack"]}
    return new


def layer_before(node: fx.Node, path: str, layer: nn.Module, x: fx.Node, name: str) -> fx.Node:
    """Insert a call of the layer at `path` on x in front of `node`, with a value shaped alike."""
    with node.graph.inserting_before(node):
        new = node.graph.create_node("call_module", path, (x,), name=name)
    value = node.meta["val"]
    with value.fake_mode:  # memory of its own: values that share some may be written together
        new.meta["val"] = torch.empty_like(value)
    stack = node.meta["nn_module_stack"]
    outer = {
        key: (p, kind) for key, (p, kind) in stack.items() if not p or path.startswith(p + ".")
    }
    new.meta["nn_module_stack"] = outer | {path: (path, type(layer))}
    return new


def replace_call(node: fx.Node, new: fx.Node) -> None:
    """Replace a layer's call by `new`, which takes over its name and metadata."""
    node.replace_all_uses_with(new)
    new.meta = {**node.meta, "val": new.meta["val"]}
    node.graph.erase_node(node)
    new.name = node.name  # verify matches nodes of two graphs by name
