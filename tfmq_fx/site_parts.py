"""How a quantized model computes what one layer of its reference computes, rewrites included.

y = conv(x)    is, in the model,    y = conv_q.0(x[:, :n], scale) + conv_q.1(x[:, n:], scale) + ...
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .activation import QuantActivation
from .dialect import is_timestep_row
from .errors import GraphError
from .layers import bias_of, groups_of, weight_of
from .lowrank import LowRank
from .nn import QuantLayer
from .passes.split_low_rank import SUFFIX
from .regions import extract
from .sites import find_sites

Column = tuple[str, int]  # a buffer of the graph and one column of it
# what rewrites of a layer put in front of it
_SLICES = (torch.narrow, torch.unflatten, torch.flatten)
_PRODUCTS = (torch.mul, torch.matmul)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One quantized layer of a site.

    weight: (out, in, ...) float32, what its integers stand for, carried over from the reference;
    None where it is not known how.  bias: the reference's, where this layer adds one.  column:
    where its input scales come from, one for each timestep; None for a static range.
    """

    path: str
    layer: QuantLayer
    weight: Tensor | None
    bias: Tensor | None
    column: Column | None


@dataclass(frozen=True, slots=True)
class SitePart:
    """A layer of the reference, or a product in its attention, and the part of the model that
    computes its value.

    name: of the layer, or of the product's node.  target, given: nodes of the reference; the part
    takes the values of `given`.  part: given -> (value, input of each leaf).  leaves: none for a
    product.  products: paths of the modules that round its operands; none for a layer.
    """

    name: str
    target: fx.Node
    given: tuple[fx.Node, ...]
    part: fx.GraphModule
    leaves: tuple[Leaf, ...]
    products: tuple[str, ...]


def find_parts(reference: fx.GraphModule, model: fx.GraphModule) -> list[SitePart]:
    """The part of `model` for each layer of `reference` that it quantizes, and for each product of
    attention whose operands it rounds; in execution order.

    reference: the captured graph.  model: quantized from it; a node has the name that its value has
    there.  A layer called several times is looked at where it is called first.
    """
    mine = {node.name: node for node in reference.graph.nodes}
    like = {node.name: node for node in model.graph.nodes}
    layers = {site.nodes[0]: site for site in find_sites(reference)[0]}
    targets = [n for n in mine.values() if n.name in like]
    targets = [n for n in targets if n in layers or _rounded(model, like[n.name])]
    whole = {node.name for node in targets}
    parts = []
    for target in targets:
        found = like[target.name]
        inside, given = _computation(found, mine, whole)
        calls = {str(n.target): n for n in inside if n.op == "call_module"}
        modules = {path: model.get_submodule(path) for path in calls}
        site = layers.get(target)
        own = [p for p, m in modules.items() if isinstance(m, QuantLayer) and site is not None]
        products = [path for path, m in modules.items() if isinstance(m, QuantActivation)]
        if not own and not products:
            continue
        try:
            part = extract(model, [found, *(_first_argument(calls[path]) for path in own)], given)
        except GraphError:  # it reads an input of the model that the reference does not have
            continue
        parts.append(
            SitePart(
                target.name if site is None else site.name,
                target,
                tuple(mine[node.name] for node in given),
                part,
                tuple(_leaf(model, path, calls[path], site.layer, given) for path in own if site),
                tuple(products),
            )
        )
    return parts


def _rounded(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node reads what is rounded without weights, as the products of attention do."""
    return any(
        used.op == "call_module"
        and isinstance(model.get_submodule(str(used.target)), QuantActivation)
        for used in node.all_input_nodes
    )


def _first_argument(node: fx.Node) -> fx.Node:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return x


def _computation(
    target: fx.Node, reference: dict[str, fx.Node], whole: Collection[str]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes that compute `target` from values the reference has too, and those values.

    whole: names of the reference's layers, whose values count as had whatever computes them.
    """

    def shared(node: fx.Node) -> bool:
        other = reference.get(node.name)
        if other is None or node.op == "get_attr":
            return False
        if node.op == "placeholder" or node.name in whole:
            return True
        inputs = [n.name for n in node.all_input_nodes]
        same = (node.op, node.target, inputs)
        return same == (other.op, other.target, [n.name for n in other.all_input_nodes])

    inside, given, todo = [target], dict[fx.Node, None](), list(target.all_input_nodes)
    seen = set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if shared(node):
            given[node] = None
        else:
            inside.append(node)
            todo += node.all_input_nodes
    return inside[::-1], list(given)


def _leaf(
    model: fx.GraphModule, path: str, node: fx.Node, layer: nn.Module, given: Sequence[fx.Node]
) -> Leaf:
    quantized = model.get_submodule(path)
    assert isinstance(quantized, QuantLayer)
    weight = _carried(model, weight_of(layer).double(), groups_of(layer), _chain(node, given))
    owner, _, name = path.rpartition(".")
    branch = getattr(model.get_submodule(owner), name + SUFFIX, None)
    fits = tuple(weight.shape) == quantized.weight_shape
    if fits and isinstance(branch, LowRank):
        weight = weight - branch.product()
    return Leaf(
        path,
        quantized,
        weight.float() if fits else None,
        None if quantized.bias is None else bias_of(layer),
        _column(node),
    )


def _chain(node: fx.Node, given: Collection[fx.Node]) -> list[fx.Node]:
    """What happens to a value of the reference before a layer reads it, in order."""
    chain, x = [], _first_argument(node)
    while x not in given and x.args and isinstance(x.args[0], fx.Node):
        chain.append(x)
        x = x.args[0]
    return chain[::-1]


def _carried(
    model: fx.GraphModule, weight: Tensor, groups: int, chain: Sequence[fx.Node]
) -> Tensor:
    """The weight (out, in / groups, ...) that makes of the rewritten input what `weight` makes of
    the input itself; steps not known here are taken to ask for none other."""
    for node in chain:
        other: Any = node.args[1] if len(node.args) > 1 else None
        buffer = operator.attrgetter(other.target)(model) if _is_buffer(other) else None
        if node.target is torch.narrow and groups == 1:
            _, _, start, size = node.args
            weight = weight.narrow(1, start, size)  # type: ignore[arg-type]  # of plain integers
        elif node.target is torch.mul and buffer is not None:
            by_group = weight.view(groups, -1, *weight.shape[1:])
            scale = buffer.double().view(groups, 1, weight.shape[1], *[1] * (weight.dim() - 2))
            weight = (by_group / scale).view_as(weight)
        elif node.target is torch.unflatten:
            weight = weight.unflatten(1, node.args[2])  # type: ignore[arg-type]
        elif node.target is torch.matmul and buffer is not None:
            weight = weight @ torch.linalg.inv(buffer.double()).T
        elif node.target is torch.flatten:
            weight = weight.flatten(1)
    return weight


def _is_buffer(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _column(node: fx.Node) -> Column | None:
    """Where the scales that a layer is called with come from."""
    scale = node.args[1] if len(node.args) > 1 else None
    if not isinstance(scale, fx.Node) or scale.target is not operator.getitem:
        return None
    row, place = scale.args
    if not (isinstance(row, fx.Node) and is_timestep_row(row) and isinstance(place, tuple)):
        return None
    table = row.args[0]
    assert isinstance(table, fx.Node)
    column = place[1]
    assert isinstance(column, int)
    return str(table.target), column


def input_scales(model: fx.GraphModule, placeholder: fx.Node) -> list[Tensor]:
    """The scales (K,) of each layer that reads a placeholder, as it is or rewritten."""
    found = []
    for node in model.graph.find_nodes(op="call_module"):
        column = _column(node)
        if column and _root(node) is placeholder:
            found.append(model.get_buffer(column[0])[:, column[1]])
    return found


def _root(node: fx.Node) -> fx.Node:
    """The value that a layer reads, before rewrites of its input."""
    x = _first_argument(node)
    while x.target in _SLICES or (x.target in _PRODUCTS and _is_buffer(x.args[1])):
        x = _first_argument(x)
    return x
