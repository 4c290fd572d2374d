"""Which quantized layers an integer kernel runs, and why the others do not."""

from __future__ import annotations

from .nn import QuantConv, QuantLayer, QuantLinear


def obstacle(layer: QuantLayer) -> str | None:
    """Why no int8 kernel runs the layer, or None where one does."""
    if layer.codes.device.type != "cpu":
        return f"no int8 kernel on {layer.codes.device.type} in this version"
    if "fp8" in (layer.weight_format, layer.act_format):
        return "no fp8 kernel on cpu"
    if layer.weight_groups > 1:
        return "weights have scales per group"
    if layer.act_bits is None:
        return "activations are in floating point"
    if layer.dynamic:
        return "ranges measured at run time"
    if layer.act_bits > 8:
        return f"activations have {layer.act_bits} bits"
    if isinstance(layer, QuantConv):
        if len(layer.weight_shape) != 4:
            return "int8 kernels exist for 2-d convolutions only"
        if layer.padding_mode != "zeros":
            return f"padding mode {layer.padding_mode!r}"
    elif not isinstance(layer, QuantLinear):
        return f"no int8 kernel for {type(layer).__name__}"
    return None


def keeps_integer_weights(layer: QuantLayer) -> bool:
    """Whether weights stay int8 beside inputs in floating point (torchao's linear layers)."""
    plain = layer.weight_format == "int" and layer.weight_groups == 1
    return isinstance(layer, QuantLinear) and layer.act_bits is None and plain
