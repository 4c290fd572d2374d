"""Replace the quantized layers of a graph, whatever engine runs them.

y = conv_q(x, s)    ->    y = conv(quantize_input(x, s), s): codes computed apart, so that they can
be fused into what computes x
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from tfmq_fx.backends.float_layers import FloatLayer
from tfmq_fx.ir.graph_pass import Declined
from tfmq_fx.ir.layer_edits import buffer_before, call_before, layer_input
from tfmq_fx.quant.affine import dynamic_scale, symmetric_steps
from tfmq_fx.quant.modules import QuantConv
from tfmq_fx.quant.quant_layer import QuantLayer

from .layers import CodesLayer, quantize_input


@dataclass(frozen=True, slots=True)
class Lowered:
    """The module that replaces a quantized layer.

    reason: why it runs in floating point, None where it does not.  micros: microseconds by engine
    that was timed, empty where none was.
    """

    module: nn.Module
    reason: str | None = None
    micros: dict[str, float] = field(default_factory=dict)


def quantized_calls(gm: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The nodes that call each quantized layer of a graph, by its name."""
    calls: dict[str, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="call_module"):
        if isinstance(gm.get_submodule(str(node.target)), QuantLayer):
            calls.setdefault(str(node.target), []).append(node)
    return calls


def lower_layers(
    gm: fx.GraphModule,
    lower_one: Callable[[QuantLayer, Sequence[fx.Node]], Lowered],
    refused: Mapping[str, str] | None,
) -> dict[str, Lowered]:
    """Replace each quantized layer by the module that `lower_one` returns, in place.

    Layers on codes are then called with the codes of their input.
    refused: layers that stay in floating point whatever an engine could do, and why.
    """
    replaced = {}
    for name, nodes in quantized_calls(gm).items():
        layer = gm.get_submodule(name)
        assert isinstance(layer, QuantLayer)
        if (reason := (refused or {}).get(name)) is not None:
            lowered = Lowered(FloatLayer(layer), reason)
        else:
            lowered = lower_one(layer, nodes)
        gm.set_submodule(name, lowered.module)
        if isinstance(lowered.module, CodesLayer):
            for node in nodes:
                _give_codes(gm, node, name, layer, lowered.module)
        replaced[name] = lowered
    return replaced


def declined(layers: Mapping[str, Lowered]) -> list[Declined]:
    """A `Declined` for each layer that runs in floating point, with the reason."""
    return [
        Declined(name, f"runs in floating point: {lowered.reason}")
        for name, lowered in layers.items()
        if lowered.reason is not None
    ]


def dtype_obstacle(nodes: Sequence[fx.Node], written: Collection[torch.dtype]) -> str | None:
    """Why kernels that write these dtypes cannot run a layer called by `nodes`, or None."""
    dtypes = {node.meta["val"].dtype for node in nodes}
    if len(dtypes) > 1 or not dtypes <= set(written):
        return f"its results have dtypes {', '.join(sorted(map(str, dtypes)))}"
    return None


def _give_codes(
    gm: fx.GraphModule, node: fx.Node, name: str, layer: QuantLayer, lowered: CodesLayer
) -> None:
    """Pass the codes of its input, and their scale, to the call of a layer."""
    x = layer_input(node)
    if isinstance(layer, QuantConv) and layer.padding_mode != "zeros":
        padded, mode = f"{node.name}_padded", layer.padding_mode
        x = call_before(node, F.pad, x, layer.pad_widths, mode=mode, name=padded)
    if layer.dynamic:
        assert layer.act_bits is not None
        steps = symmetric_steps(layer.act_bits, layer.act_format)
        measured = (dynamic_scale, x, layer.ranged_dims, steps)
        scale = call_before(node, *measured, name=f"{node.name}_scale")
    elif layer.per_timestep:
        row = node.args[1] if len(node.args) > 1 else node.kwargs["scale"]
        assert isinstance(row, fx.Node)
        scale = row
    else:
        scale = buffer_before(gm, node, f"{name}.act_scale")
    settings = (lowered.zero_point, lowered.levels, lowered.codes_dtype, lowered.pads)
    codes = call_before(node, quantize_input, x, scale, *settings, name=f"{node.name}_codes")
    node.args, node.kwargs = (codes, scale), {}
