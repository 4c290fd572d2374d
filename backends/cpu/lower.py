"""Lower quantized layers of a graph on the CPU: to the kernels of this package, or where these do
not run to patterns that Inductor gives to oneDNN.

y = conv_q(x, s)    ->    y = conv(quantize_input(x, s), s): codes computed apart, so that they can
be fused into what computes x
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from tfmq_fx.backends.attention import pad_attention
from tfmq_fx.backends.cuda.fuse import fuse
from tfmq_fx.backends.cuda.fuse_epilogues import requantize
from tfmq_fx.backends.cuda.layers import CodesLayer, problem_of
from tfmq_fx.backends.cuda.lower import give_codes
from tfmq_fx.backends.cuda.tiles import Problem, Tile
from tfmq_fx.backends.cuda.trial import Choice, Chooser
from tfmq_fx.backends.dequantized import DequantizedLayer, fast_dtype
from tfmq_fx.backends.float_layer import FloatLayer
from tfmq_fx.backends.saturation import onednn_is_exact, saturates
from tfmq_fx.backends.torchao import to_torchao
from tfmq_fx.dialect import Stage
from tfmq_fx.graph import Declined, Rewrite, graph_pass, prune
from tfmq_fx.kernels import keeps_integer_weights, obstacle
from tfmq_fx.layers import layer_input
from tfmq_fx.nn import QuantConv, QuantLayer, QuantLinear
from tfmq_fx.ops import size_hint

from . import kernels
from .attention import use_kernel
from .fuse_activations import fuse_activations
from .fuse_concat import fuse_concat
from .onednn import OnednnLayer

MOST_LOOSE = 1 << 20  # bytes of float weights that are worth no folding


@graph_pass(takes=(Stage.CAPTURED, Stage.FOLDED, Stage.QUANTIZED), gives=Stage.LOWERED)
def lower(
    gm: fx.GraphModule, *, choose: Chooser, refused: Mapping[str, str] | None = None
) -> Rewrite:
    """The graph with every quantized layer on what `choose` gives it.

    refused: layers whose kernels are not to be used, and why.
    Declined: layers that run in floating point, with the reason.
    details: "integer", the layers on integer kernels, and of these "onednn", those on oneDNN's;
    "weight_only", linear layers on torchao's int8 weights; "fused", what was fused, by kind;
    "attention", calls on our kernel; "padded_attention", calls with wider heads; "micros", what was
    measured, by layer.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="call_module"):
        if isinstance(gm.get_submodule(str(node.target)), QuantLayer):
            calls.setdefault(str(node.target), []).append(node)
    if calls and kernels.unavailable() is None:
        kernels.load()
    declined, weight_only, on_onednn, lowered = [], [], [], 0
    micros: dict[str, Any] = {}
    made: nn.Module
    for name, nodes in calls.items():
        layer = gm.get_submodule(name)
        assert isinstance(layer, QuantLayer)
        if (reason := (refused or {}).get(name)) is not None:
            made = FloatLayer(layer)
        else:
            made, reason = _lowered(layer, nodes, choose)
        if reason is not None:
            declined.append(Declined(name, f"runs in floating point: {reason}"))
        gm.set_submodule(name, made)
        if isinstance(made, nn.Linear):
            weight_only.append(name)
        elif reason is None:
            lowered += 1
        if isinstance(made, OnednnLayer):
            on_onednn.append(name)
        if isinstance(made, CodesLayer):
            micros[name] = made.choice.micros
            for node in nodes:
                give_codes(gm, node, name, layer, made)
    fused = fuse(gm, choose)
    fused["activations"] = fuse_activations(gm)
    fused["concat"] = fuse_concat(gm)
    prune(gm.graph)
    fused["requantize"] += requantize(gm)  # codes of activations
    for module in list(gm.modules()):
        if isinstance(module, CodesLayer):
            module.to_panels()
    # bf16 products are for models whose layers round more than that: others stay exact
    attention = use_kernel(gm) if lowered and kernels.unavailable() is None else 0
    padded = pad_attention(gm)
    details = {
        "integer": lowered,
        "onednn": on_onednn,
        "weight_only": weight_only,
        "fused": fused,
        "attention": attention,
        "padded_attention": padded,
        "micros": {name: times for name, times in micros.items() if times},
    }
    changed = lowered + len(weight_only) + attention + padded
    return Rewrite(gm, changed, declined, details)


def _lowered(
    layer: QuantLayer, nodes: Sequence[fx.Node], choose: Chooser
) -> tuple[nn.Module, str | None]:
    """What runs a layer, and the reason where that is floating point."""
    if (reason := obstacle(layer, "cpu")) is not None:
        if keeps_integer_weights(layer):
            assert isinstance(layer, QuantLinear)
            return to_torchao(layer), None
        return FloatLayer(layer), reason
    dtype, sizes = nodes[0].meta["val"].dtype, layer_input(nodes[0]).meta["val"].shape
    if (reason := kernel_obstacle(layer, nodes)) is not None:
        reason = reason if layer.dynamic else onednn_obstacle(layer)
        return (OnednnLayer(layer), None) if reason is None else (FloatLayer(layer), reason)
    problem = problem_of(layer, [size_hint(size) for size in sizes])
    choice = choose(problem, dtype)
    if choice.engine == "float":
        return DequantizedLayer(layer, fast_dtype()), slower(choice)
    ranged = layer.dynamic  # oneDNN's patterns have no range at run time
    if choice.engine == "onednn" and not ranged and onednn_obstacle(layer) is None:
        return OnednnLayer(layer), None
    return CodesLayer(layer, dtype, problem, dataclasses.replace(choice, engine="cpu")), None


def kernel_obstacle(layer: QuantLayer, nodes: Sequence[fx.Node]) -> str | None:
    """Why the kernels of this package cannot run a layer here, or None where they can."""
    if (reason := kernels.unavailable()) is not None:
        return reason
    if layer.weight_shape[1] % 4:
        return f"the kernels read channels in fours, not {layer.weight_shape[1]}"
    if isinstance(layer, QuantConv) and layer.groups > 1:
        return f"a convolution of {layer.groups} groups"
    dtypes = {node.meta["val"].dtype for node in nodes}
    if len(dtypes) > 1 or not dtypes <= set(kernels.DTYPES):
        return f"its results have dtypes {', '.join(sorted(map(str, dtypes)))}"
    return None


def alone(layer: QuantLayer, node: fx.Node) -> CodesLayer | None:
    """The kernel of this package for a layer that a node calls, weights not yet in panels; None
    where there is none."""
    if obstacle(layer, "cpu") or kernel_obstacle(layer, [node]):
        return None
    kernels.load()
    sizes = [size_hint(size) for size in layer_input(node).meta["val"].shape]
    problem, dtype = problem_of(layer, sizes), node.meta["val"].dtype
    return CodesLayer(layer, dtype, problem, Choice("cpu", Tile()))


def onednn_obstacle(layer: QuantLayer) -> str | None:
    """Why oneDNN's integer kernels must not run a layer on this processor, or None where they
    compute it exactly."""
    return saturates(layer, "oneDNN", onednn_is_exact)


def slower(choice: Choice) -> str:
    """Why an integer kernel is not used although there is one: bfloat16 was measured faster."""
    ours = min((t for name, t in choice.micros.items() if name != "float"), default=float("inf"))
    return f"bf16 took {choice.micros['float']:.1f} us, int8 {ours:.1f} us"


def untried(problem: Problem, dtype: object) -> Choice:
    """The kernels of this package, where nothing is measured."""
    return Choice("cpu", Tile())


def freezes(gm: fx.GraphModule) -> bool:
    """Whether Inductor must fold constants: for oneDNN's integer layers, and where it pays to pack
    the weights of layers in floating point."""
    loose = 0
    for module in gm.modules():
        if isinstance(module, OnednnLayer):
            return True
        if isinstance(module, (FloatLayer, DequantizedLayer)):
            loose += module.dequantized.nbytes
        elif isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            loose += sum(p.nbytes for p in module.parameters(recurse=False))
    return loose > MOST_LOOSE
