"""Decide which quantized layers an integer kernel can run, and why not the others."""

from __future__ import annotations

import torch

from tfmq_fx.quant.modules import QuantConv, QuantConvTranspose, QuantLinear
from tfmq_fx.quant.quant_layer import QuantLayer

CPU = torch.device("cpu")


def obstacle(layer: QuantLayer, device: str | None = None) -> str | None:
    """Why no int8 or fp8 kernel runs a layer on a kind of device, "cpu" or "cuda", or None where
    one does. device: None takes the layer's own."""
    device = device or layer.codes.device.type
    if device not in ("cpu", "cuda"):
        return f"no int8 kernel on {device} in this version"
    formats = {layer.weight_format} | ({layer.act_format} if layer.act_bits else set())
    if device == "cpu" and "fp8" in formats:
        return "no fp8 kernel on cpu"
    if layer.weight_groups > 1:
        return "weights have scales per group"
    if layer.act_bits is None:
        return "activations are in floating point"
    if len(formats) > 1:
        return f"{layer.weight_format} weights and {layer.act_format} activations"
    if layer.act_bits > 8:
        return f"activations have {layer.act_bits} bits"
    if isinstance(layer, QuantConvTranspose):
        return "no int8 kernel for transposed convolutions"
    if isinstance(layer, QuantConv):
        if len(layer.weight_shape) != 4:
            return "int8 kernels exist for 2-d convolutions only"
        if device == "cpu" and layer.padding_mode != "zeros":
            return f"padding mode {layer.padding_mode!r}"
        if device == "cuda" and layer.groups > 1:
            return f"a convolution of {layer.groups} groups"
    elif not isinstance(layer, QuantLinear):
        return f"no int8 kernel for {type(layer).__name__}"
    return None


def keeps_integer_weights(layer: QuantLayer) -> bool:
    """Whether weights stay int8 beside inputs in floating point (torchao's linear layers)."""
    plain = layer.weight_format == "int" and layer.weight_groups == 1
    return isinstance(layer, QuantLinear) and layer.act_bits is None and plain
