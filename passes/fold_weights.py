"""Make layers of the convolutions and linear products whose weights no input changes.

w = (v - mean(v)) / std(v);  y = conv2d(x, w, b)    ->    y = conv(x), a torch.nn layer that holds w
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from tfmq_fx.core.stages import REPLACED, Stage
from tfmq_fx.ir.binding_times import binding_times
from tfmq_fx.ir.graph import fork, module_path
from tfmq_fx.ir.graph_pass import Rewrite, graph_pass, prune

_aten = torch.ops.aten
_KINDS: dict[Any, type[nn.Module]] = {
    F.linear: nn.Linear,
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    _aten.linear.default: nn.Linear,
    _aten.conv1d.default: nn.Conv1d,
    _aten.conv1d.padding: nn.Conv1d,
    _aten.conv2d.default: nn.Conv2d,
    _aten.conv2d.padding: nn.Conv2d,
    _aten.conv3d.default: nn.Conv3d,
    _aten.conv3d.padding: nn.Conv3d,
}
_OPERANDS = ("input", "weight", "bias")
_SETTINGS = ("stride", "padding", "dilation", "groups")


@graph_pass(takes=Stage.CAPTURED, gives=Stage.CAPTURED)
def fold_weights(gm: fx.GraphModule) -> Rewrite:
    """The graph with a layer for each product of an input with constant weights; outputs are
    unchanged (exactly).

    A layer is called like the module whose forward multiplies, or after that and the operation
    where one module multiplies with several weights.  What a replaced forward does stays as it is.
    details["folded"]: the path of each layer -> names of the tensors that its "weight" and its
    "bias" are computed from.
    """
    constants = _Constants(gm)
    found: dict[Any, tuple[nn.Module, list[fx.Node], dict[str, Any]]] = {}
    for node in gm.graph.nodes:
        given = _arguments(node)
        if REPLACED in node.meta or not given or not constants.may_fold(given):
            continue
        key = (_KINDS[node.target], *(repr(given.get(n)) for n in (*_OPERANDS[1:], *_SETTINGS)))
        if key not in found:
            layer = _layer(_KINDS[node.target], given, constants.value)
            if layer is None:
                continue
            found[key] = (layer, [], given)
        found[key][1].append(node)
    sources = {
        layer: {
            name: constants.sources(given[name]) if given.get(name) is not None else []
            for name in _OPERANDS[1:]
        }
        for layer, _, given in found.values()
    }
    calls: dict[nn.Module, list[fx.Node]] = {}
    for i, (layer, nodes, _) in enumerate(found.values()):
        gm.add_submodule(f"folded_weights_{i}", layer)
        calls[layer] = [_call(gm, node, f"folded_weights_{i}") for node in nodes]
    prune(gm.graph)
    names = _name(gm, calls)
    gm = fork(gm)  # without the tensors that nothing reads now
    folded = {names[layer]: sources[layer] for layer in calls}
    return Rewrite(gm, sum(map(len, calls.values())), details={"folded": folded})


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a product by name; empty for other nodes."""
    if node.op != "call_function" or node.target not in _KINDS:
        return {}
    return {**dict(zip((*_OPERANDS, *_SETTINGS), node.args, strict=False)), **node.kwargs}


class _Constants:
    """The values of a graph that no input decides, computed when they are asked for."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        deps = binding_times(gm).deps
        self._fixed: set[fx.Node] = set()
        for node in gm.graph.nodes:
            if node.op in ("get_attr", "call_function", "call_method", "call_module") and (
                not deps[node] and all(used in self._fixed for used in node.all_input_nodes)
            ):
                self._fixed.add(node)
        self._interpreter = fx.Interpreter(gm, garbage_collect_values=False)

    def may_fold(self, given: Mapping[str, Any]) -> bool:
        """Whether the weight and bias of a product are constant, its input is not, and its settings
        are numbers."""
        x, weight, bias = (given.get(name) for name in _OPERANDS)
        settings = tree_leaves([given[name] for name in _SETTINGS if name in given])
        plain = not any(isinstance(value, fx.Node) for value in settings)
        fixed = weight in self._fixed and (bias is None or bias in self._fixed)
        return plain and fixed and isinstance(x, fx.Node) and x not in self._fixed

    def value(self, node: fx.Node) -> Any:
        """The value of a constant node."""
        values, todo = self._interpreter.env, [node]
        while todo:
            at = todo[-1]
            missing = [used for used in at.all_input_nodes if used not in values]
            if at not in values and missing:
                todo += missing
                continue
            todo.pop()
            if at not in values:
                values[at] = self._interpreter.run_node(at)
        return values[node]

    def sources(self, node: fx.Node) -> list[str]:
        """Names of the tensors that a constant is computed from."""
        found: dict[str, None] = {}
        todo = [node]
        while todo:
            at = todo.pop()
            todo += at.all_input_nodes
            if at.op == "get_attr":
                found[str(at.target)] = None
            elif at.op == "call_module":
                inner = self._gm.get_submodule(str(at.target)).named_parameters()
                found |= {f"{at.target}.{name}": None for name, _ in inner}
        return [*found]


def _layer(
    kind: Any, given: Mapping[str, Any], value: Callable[[fx.Node], Any]
) -> nn.Module | None:
    """A layer that holds the weight and bias of a product; None where there is none for them."""
    weight = value(given["weight"])
    bias = None if given.get("bias") is None else value(given["bias"])
    dims = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}[kind]
    if not (isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == dims):
        return None
    out, width = weight.shape[:2]
    if bias is not None and bias.shape != (out,):
        return None
    common: dict[str, Any] = {"bias": bias is not None, "device": "meta"}  # replaced below
    if kind is nn.Linear:
        made = nn.Linear(width, out, **common)
    else:
        settings = {n: _setting(given[n]) for n in _SETTINGS if n in given}
        size = tuple(weight.shape[2:])
        made = kind(width * settings.get("groups", 1), out, size, **settings, **common)
    made.weight = _parameter(weight)
    if bias is not None:
        made.bias = _parameter(bias)
    return made.eval()


def _setting(value: Any) -> Any:
    """A setting of a convolution as its layer takes it: a number, or one for each dimension."""
    if isinstance(value, (list, tuple)):
        return tuple(value) if len(value) > 1 else value[0]
    return value


def _parameter(value: Tensor) -> nn.Parameter:
    """A parameter of the model as it is, else a computed value in memory of its own."""
    if isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def _call(gm: fx.GraphModule, node: fx.Node, path: str) -> fx.Node:
    """A call of the layer at `path` in the place of a product."""
    x = node.args[0] if node.args else node.kwargs["input"]
    with gm.graph.inserting_before(node):
        made = gm.graph.create_node("call_module", path, (x,))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made, propagate_meta=False)
    gm.graph.erase_node(node)
    made.name = node.name  # what is compared with the original is found by name
    return made


def _name(gm: fx.GraphModule, calls: Mapping[nn.Module, list[fx.Node]]) -> dict[nn.Module, str]:
    """Move the new layers to where their users look for them; their paths."""
    made = {node for nodes in calls.values() for node in nodes}
    taken = [
        str(node.target)
        for node in gm.graph.nodes
        if node.op in ("get_attr", "call_module") and node not in made
    ]
    paths = [module_path(nodes[0]) for nodes in calls.values()]
    names: dict[nn.Module, str] = {}
    for layer, path in zip(calls, paths, strict=True):
        inside = (name.startswith(f"{path}.") for name in [*taken, *paths])
        if not path or paths.count(path) > 1 or path in taken or any(inside):
            stem, n = f"{path}.{type(layer).__name__.lower()}".removeprefix("."), 0
            path = stem
            while any(f"{name}.".startswith(f"{path}.") for name in [*taken, *names.values()]):
                n += 1
                path = f"{stem}_{n}"
        names[layer] = path
    for layer, nodes in calls.items():
        gm.delete_submodule(str(nodes[0].target))
        gm.add_submodule(names[layer], layer)
        for node in nodes:
            node.target = names[layer]
            place = {names[layer]: (names[layer], type(layer))}
            node.meta["nn_module_stack"] = {**node.meta["nn_module_stack"], **place}
    return names
