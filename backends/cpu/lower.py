"""Lower the quantized layers of a graph on the CPU to the kernels of this package, or to patterns
that Inductor gives to oneDNN where these do not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import fx, nn

from tfmq_fx.backends.codes.choice import Choice, Chooser, slower
from tfmq_fx.backends.codes.fuse import fuse
from tfmq_fx.backends.codes.fuse_epilogues import requantize
from tfmq_fx.backends.codes.layers import problem_at
from tfmq_fx.backends.codes.lower import Lowered, declined, dtype_obstacle, lower_layers
from tfmq_fx.backends.codes.problem import Tile
from tfmq_fx.backends.cpu.kernels import fast_dtype
from tfmq_fx.backends.float_layers import DequantizedLayer, FloatLayer
from tfmq_fx.backends.saturation import onednn_is_exact, saturates
from tfmq_fx.backends.support import keeps_integer_weights, obstacle
from tfmq_fx.backends.torchao import to_torchao
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph_pass import Rewrite, graph_pass, prune
from tfmq_fx.quant.modules import QuantConv, QuantLinear
from tfmq_fx.quant.quant_layer import QuantLayer

from . import kernels
from .attention import pad_attention, use_kernel
from .codes_layer import CpuCodesLayer
from .fuse_activations import fuse_activations
from .fuse_concat import fuse_concat
from .norm_codes import norm_codes
from .onednn import OnednnLayer

MOST_LOOSE = 1 << 20  # bytes of float weights that are worth no folding


@graph_pass(takes=(Stage.CAPTURED, Stage.FOLDED, Stage.QUANTIZED), gives=Stage.LOWERED)
def lower(
    gm: fx.GraphModule, *, choose: Chooser, refused: Mapping[str, str] | None = None
) -> Rewrite:
    """The graph with every quantized layer on the engine that `choose` picks.

    refused: layers whose kernels are not to be used, and why.
    Declined: layers that run in floating point, with the reason.
    details: "integer", the layers on integer kernels, and of these "onednn", those on oneDNN's;
    "weight_only", linear layers on torchao's int8 weights; "fused", what was fused, by kind;
    "attention", calls on our kernel; "padded_attention", calls with wider heads; "micros", what was
    measured, by layer.
    """
    quantized = any(isinstance(module, QuantLayer) for module in gm.modules())
    if quantized and kernels.unavailable() is None:
        kernels.load()
    layers = lower_layers(gm, partial(_lowered, choose=choose), refused)
    weight_only = [name for name, each in layers.items() if isinstance(each.module, nn.Linear)]
    on_onednn = [name for name, each in layers.items() if isinstance(each.module, OnednnLayer)]
    in_float = declined(layers)
    lowered = len(layers) - len(weight_only) - len(in_float)
    fused = fuse(gm, choose, norm=norm_codes)
    fused["activations"] = fuse_activations(gm)
    fused["concat"] = fuse_concat(gm)
    prune(gm.graph)
    fused["requantize"] += requantize(gm)  # codes of activations
    for module in list(gm.modules()):
        if isinstance(module, CpuCodesLayer):
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
        "micros": {name: each.micros for name, each in layers.items() if each.micros},
    }
    changed = lowered + len(weight_only) + attention + padded
    return Rewrite(gm, changed, in_float, details)


def _lowered(layer: QuantLayer, nodes: Sequence[fx.Node], choose: Chooser) -> Lowered:
    """The module that replaces a layer on this machine."""
    if (reason := obstacle(layer, "cpu")) is not None:
        if keeps_integer_weights(layer):
            assert isinstance(layer, QuantLinear)
            return Lowered(to_torchao(layer))
        return Lowered(FloatLayer(layer), reason)
    if (reason := kernel_obstacle(layer, nodes)) is not None:
        reason = reason if layer.dynamic else onednn_obstacle(layer)
        return Lowered(OnednnLayer(layer) if reason is None else FloatLayer(layer), reason)
    dtype, problem = nodes[0].meta["val"].dtype, problem_at(layer, nodes[0])
    choice = choose(problem, dtype)
    if choice.engine == "float":
        reason = slower(choice, "bf16", "int8")
        return Lowered(DequantizedLayer(layer, fast_dtype()), reason)
    ranged = layer.dynamic  # oneDNN's patterns have no range at run time
    if choice.engine == "onednn" and not ranged and onednn_obstacle(layer) is None:
        return Lowered(OnednnLayer(layer))
    return Lowered(CpuCodesLayer(layer, dtype, problem, choice), None, choice.micros)


def kernel_obstacle(layer: QuantLayer, nodes: Sequence[fx.Node]) -> str | None:
    """Why the kernels of this package cannot run a layer here, or None where they can."""
    if (reason := kernels.unavailable()) is not None:
        return reason
    if layer.weight_shape[1] % 4:
        return f"the kernels read channels in fours, not {layer.weight_shape[1]}"
    if isinstance(layer, QuantConv) and layer.groups > 1:
        return f"a convolution of {layer.groups} groups"
    return dtype_obstacle(nodes, kernels.DTYPES)


def alone(layer: QuantLayer, node: fx.Node) -> CpuCodesLayer | None:
    """The layer that a node calls as one for the kernel of this package, ready to run; None where
    the kernel cannot run it."""
    if obstacle(layer, "cpu") or kernel_obstacle(layer, [node]):
        return None
    kernels.load()
    choice = Choice("cpu", Tile())
    kernel = CpuCodesLayer(layer, node.meta["val"].dtype, problem_at(layer, node), choice)
    kernel.to_panels()
    return kernel


def onednn_obstacle(layer: QuantLayer) -> str | None:
    """Why oneDNN's integer kernels must not run a layer on this processor, or None where they
    compute it exactly."""
    return saturates(layer, "oneDNN", onednn_is_exact)


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
