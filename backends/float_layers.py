"""Modules that replace a quantized layer where no kernel of this package runs it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tfmq_fx.core.stages import Stage
from tfmq_fx.quant.affine import levels
from tfmq_fx.quant.quant_layer import QuantLayer


class LoweredLayer(nn.Module):
    """Hold the settings of a quantized layer and, as `layer`, a copy of it without weights."""

    stage = Stage.LOWERED

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        for name in layer.settings:  # diffusers' pipelines read some
            setattr(self, name, getattr(layer, name))
        self.layer = copy.copy(layer)  # with buffers of its own
        buffers = {**layer._buffers, "codes": layer.codes.new_empty(0)}
        self.layer._buffers = {name: b if b is None else b.clone() for name, b in buffers.items()}


class DequantizedLayer(LoweredLayer):
    """A layer with the weights of a quantized one, computed in `dtype` on inputs that are not
    rounded to the layer's grid: nearer to full precision than the reference, and faster than
    rounding first. Results have the dtype of the input."""

    def __init__(self, layer: QuantLayer, dtype: torch.dtype) -> None:
        super().__init__(layer)
        self.register_buffer("dequantized", layer.weight.to(dtype))
        self.register_buffer("float_bias", None if layer.bias is None else layer.bias.to(dtype))
        self.dequantized: Tensor
        self.float_bias: Tensor | None

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The layer's output on x (B, ...); scale is not needed."""
        y = self.layer.apply_op(x.to(self.dequantized.dtype), self.dequantized, self.float_bias)
        return y.to(x.dtype)


class FloatLayer(LoweredLayer):
    """A layer with dequantized weights that rounds its input as the quantized one does and computes
    in floating point."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__(layer)
        self.register_buffer("dequantized", layer.weight.to(layer.dtype))
        self.dequantized: Tensor

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The layer's output on x (B, ...); scale: (B,) where ranges come per timestep."""
        seen = self.layer.quantized_input(x, scale).to(x.dtype)
        return self.layer.apply_op(seen, self.dequantized, self.layer.bias)


class IntegerPattern(LoweredLayer):
    """A quantized layer written so that a compiler fuses it into one int8 kernel.

    A subclass defines `product`. The compiler needs a constant input scale. So a scale per timestep
    multiplies before and after: x / s[t] is quantized with scale 1, and the product is multiplied
    by s[t].
    Buffers: `weight` int8 (out, ...), codes less their zero points at every bit width;
    `weight_scale` (out,) float32.
    """

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__(layer)
        assert layer.act_bits is not None
        self.zero, self.top = int(layer.act_zero), levels(layer.act_bits)
        self.scale = 1.0 if layer.per_timestep else float(layer.act_scale)
        for name in ("weight_scale", "weight_zero", "act_scale", "act_zero"):  # held below instead
            setattr(self.layer, name, getattr(layer, name).new_empty(0))
        self.register_buffer("weight", layer.weight_codes())
        self.register_buffer("weight_scale", layer.weight_scale.clone())
        self.weight: Tensor
        self.weight_scale: Tensor

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output on x (B, ...) float32, quantized with the constant scale."""
        raise NotImplementedError(f"{type(self).__name__} defines no product")

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The layer's output on x (B, ...); scale: (B,) where ranges come per timestep."""
        layer, dtype, x = self.layer, x.dtype, x.float()
        bias = None if layer.bias is None else layer.bias.float()
        if not layer.per_timestep:
            return self.product(x, bias).to(dtype)
        assert scale is not None
        scale = scale.view(-1, *[1] * (x.dim() - 1))
        y = self.product(x * (1.0 / scale), None) * scale
        return (y if bias is None else y + bias.view(layer.bias_shape)).to(dtype)
