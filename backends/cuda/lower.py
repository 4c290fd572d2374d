"""Lower the quantized layers of a graph on CUDA to the kernels of this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TypeGuard

import torch
from torch import fx, nn

from tfmq_fx.backends.codes.choice import Chooser, slower
from tfmq_fx.backends.codes.fuse import fuse
from tfmq_fx.backends.codes.layers import problem_at
from tfmq_fx.backends.codes.lower import Lowered, declined, dtype_obstacle, lower_layers
from tfmq_fx.backends.float_layers import FloatLayer
from tfmq_fx.backends.support import obstacle
from tfmq_fx.backends.torchao import to_torchao, too_old, torchao_obstacle
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph_pass import Rewrite, graph_pass
from tfmq_fx.quant.modules import QuantLinear
from tfmq_fx.quant.quant_layer import QuantLayer

from .codes_layer import CudaCodesLayer
from .norm import norm_codes

_RESULTS = (torch.float32, torch.float16, torch.bfloat16)


@graph_pass(takes=(Stage.CAPTURED, Stage.FOLDED, Stage.QUANTIZED), gives=Stage.LOWERED)
def lower(
    gm: fx.GraphModule,
    *,
    choose: Chooser,
    capability: tuple[int, int],
    refused: Mapping[str, str] | None = None,
) -> Rewrite:
    """The graph with every quantized layer on the kernel that `choose` gives it.

    Linear layers whose input is in floating point, or ranged at every call, run on torchao's
    tensors where it has one.  capability: of the device.  refused: layers whose
    kernels are not to be used, and why.
    Declined: layers that run in floating point, with the reason.
    details: "integer", the layers on kernels; "torchao", those on its tensors; "fused", what was
    fused, by kind; "micros", what was measured, by layer.
    """
    lower_one = partial(_lowered, choose=choose, capability=capability)
    layers = lower_layers(gm, lower_one, refused)
    integer = sum(isinstance(each.module, CudaCodesLayer) for each in layers.values())
    on_torchao = [name for name, each in layers.items() if isinstance(each.module, nn.Linear)]
    details = {
        "integer": integer,
        "torchao": on_torchao,
        "fused": fuse(gm, choose, norm=norm_codes),
        "micros": {name: each.micros for name, each in layers.items() if each.micros},
    }
    return Rewrite(gm, integer + len(on_torchao), declined(layers), details)


def _lowered(
    layer: QuantLayer, nodes: Sequence[fx.Node], choose: Chooser, capability: tuple[int, int]
) -> Lowered:
    """The module that replaces a layer on this device."""
    if _on_torchao(layer):
        return Lowered(to_torchao(layer))
    if (reason := _obstacle(layer, nodes, capability)) is not None:
        return Lowered(FloatLayer(layer), reason)
    dtype, problem = nodes[0].meta["val"].dtype, problem_at(layer, nodes[0])
    choice = choose(problem, dtype)
    if choice.engine == "float":
        reason = slower(choice, str(dtype).removeprefix("torch."), "the kernels")
        return Lowered(FloatLayer(layer), reason, choice.micros)
    return Lowered(CudaCodesLayer(layer, dtype, problem, choice), None, choice.micros)


def alone(
    layer: QuantLayer, node: fx.Node, choose: Chooser, capability: tuple[int, int]
) -> CudaCodesLayer | None:
    """The layer that a node calls as one for the kernel of this package; None where something else
    runs it."""
    if _on_torchao(layer) or _obstacle(layer, [node], capability):
        return None
    problem, dtype = problem_at(layer, node), node.meta["val"].dtype
    choice = choose(problem, dtype)
    return None if choice.engine == "float" else CudaCodesLayer(layer, dtype, problem, choice)


def _on_torchao(layer: QuantLayer) -> TypeGuard[QuantLinear]:
    if not isinstance(layer, QuantLinear) or not (layer.act_bits is None or layer.dynamic):
        return False
    return torchao_obstacle(layer, layer.codes.device.type) is None


def _obstacle(
    layer: QuantLayer, nodes: Sequence[fx.Node], capability: tuple[int, int]
) -> str | None:
    """Why the kernels cannot run a layer on this device, or None where they can."""
    if (reason := obstacle(layer, "cuda")) is not None:
        return reason
    kind, since = ("fp8", (8, 9)) if layer.act_format == "fp8" else ("int8", (8, 0))
    return too_old(capability, since, kind) or dtype_obstacle(nodes, _RESULTS)
