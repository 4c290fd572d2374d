"""Replace convolutions and linear products that have constant weights by layers.

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
from tfmq_fx.ir.layer_edits import layer_input, replace_call

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
    F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
    _aten.conv_transpose1d.default: nn.ConvTranspose1d,
    _aten.conv_transpose2d.input: nn.ConvTranspose2d,
    _aten.conv_transpose3d.input: nn.ConvTranspose3d,
}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_DIMS = {
    nn.Linear: 2,
    **dict.fromkeys((nn.Conv1d, nn.ConvTranspose1d), 3),
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d), 4),
    **dict.fromkeys((nn.Conv3d, nn.ConvTranspose3d), 5),
}
_OPERANDS = ("input", "weight", "bias")
_SETTINGS = ("stride", "padding", "dilation", "groups")
_TRANSPOSED_SETTINGS = ("stride", "padding", "output_padding", "groups", "dilation")


@graph_pass(takes=Stage.CAPTURED, gives=Stage.CAPTURED)
def fold_weights(gm: fx.GraphModule) -> Rewrite:
    """The graph with a layer for each product of an input and constant weights.

    Outputs are unchanged (exactly).

    A layer is called like the module whose forward multiplies, or after that and the operation
    where one module multiplies with several weights.  What a replaced forward does stays as it is.
    details["folded"]: the path of each layer -> names of the tensors that its "weight" and its
    "bias" are computed from.
    """
    constants = _Constants(gm)
    layers: dict[Any, tuple[nn.Module, list[fx.Node], dict[str, Any]]] = {}
    for node in gm.graph.nodes:
        arguments = _arguments(node)
        if REPLACED in node.meta or not arguments or not constants.may_fold(arguments):
            continue
        named = (*_OPERANDS[1:], *_settings(_KINDS[node.target]))
        key = (_KINDS[node.target], *(repr(arguments.get(name)) for name in named))
        if key not in layers:
            layer = _layer(_KINDS[node.target], arguments, constants.value)
            if layer is None:
                continue
            layers[key] = (layer, [], arguments)
        layers[key][1].append(node)
    sources = {
        layer: {
            name: constants.sources(arguments[name]) if arguments.get(name) is not None else []
            for name in _OPERANDS[1:]
        }
        for layer, _, arguments in layers.values()
    }
    calls: dict[nn.Module, list[fx.Node]] = {}
    for i, (layer, nodes, _) in enumerate(layers.values()):
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
    names = (*_OPERANDS, *_settings(_KINDS[node.target]))
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _settings(kind: Any) -> tuple[str, ...]:
    """The names of a product's arguments behind its bias, in order."""
    return _TRANSPOSED_SETTINGS if kind in _TRANSPOSED else _SETTINGS


class _Constants:
    """Compute the values of a graph that depend on no input, each when it is first needed."""

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

    def may_fold(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the weight and bias of a product are constant, its input is not, and its settings
        are numbers."""
        x, weight, bias = (arguments.get(name) for name in _OPERANDS)
        settings = tree_leaves([v for name, v in arguments.items() if name not in _OPERANDS])
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
        names: dict[str, None] = {}
        todo = [node]
        while todo:
            at = todo.pop()
            todo += at.all_input_nodes
            if at.op == "get_attr":
                names[str(at.target)] = None
            elif at.op == "call_module":
                inner = self._gm.get_submodule(str(at.target)).named_parameters()
                names |= {f"{at.target}.{name}": None for name, _ in inner}
        return [*names]


def _layer(
    kind: Any, arguments: Mapping[str, Any], value: Callable[[fx.Node], Any]
) -> nn.Module | None:
    """The layer with the weight and bias of a product; None where no torch layer holds them."""
    weight = value(arguments["weight"])
    bias = None if arguments.get("bias") is None else value(arguments["bias"])
    if not (isinstance(weight, Tensor) and weight.is_floating_point()):
        return None
    if weight.dim() != _DIMS[kind]:
        return None
    groups, (out, width) = arguments.get("groups", 1), weight.shape[:2]
    if kind in _TRANSPOSED:
        out, width = width * groups, out // groups
    if bias is not None and bias.shape != (out,):
        return None
    common: dict[str, Any] = {"bias": bias is not None, "device": "meta"}  # replaced below
    if kind is nn.Linear:
        layer = nn.Linear(width, out, **common)
    else:
        settings = {n: _setting(arguments[n]) for n in _settings(kind) if n in arguments}
        layer = kind(width * groups, out, tuple(weight.shape[2:]), **settings, **common)
    layer.weight = _parameter(weight)
    if bias is not None:
        layer.bias = _parameter(bias)
    return layer.eval()


def _setting(value: Any) -> Any:
    """A setting of a convolution as its layer takes it: a number, or one for each dimension."""
    if isinstance(value, (list, tuple)):
        return tuple(value) if len(value) > 1 else value[0]
    return value


def _parameter(value: Tensor) -> nn.Parameter:
    """The parameter itself, or a computed value as a new parameter in its own memory."""
    if isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def _call(gm: fx.GraphModule, node: fx.Node, path: str) -> fx.Node:
    """Replace a product by a call of the layer at `path`."""
    with gm.graph.inserting_before(node):
        call = gm.graph.create_node("call_module", path, (layer_input(node),))
    call.meta["val"] = node.meta["val"]
    replace_call(node, call)
    return call


def _name(gm: fx.GraphModule, calls: Mapping[nn.Module, list[fx.Node]]) -> dict[nn.Module, str]:
    """Move new layers to the path of the module that calls them, and return their paths."""
    new_calls = {node for nodes in calls.values() for node in nodes}
    taken = [
        str(node.target)
        for node in gm.graph.nodes
        if node.op in ("get_attr", "call_module") and node not in new_calls
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
