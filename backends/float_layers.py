"""Quantized layers in floating point, where no integer kernel runs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tfmq_fx.core.stages import Stage
from tfmq_fx.quant.quant_layer import QuantLayer


class DequantizedLayer(nn.Module):
    """A layer with the weights of a quantized one, computed in `dtype` on inputs that are not
    rounded to the layer's grid: nearer to full precision than the reference, and faster than
    rounding first. Results have the dtype of the input."""

    stage = Stage.LOWERED

    def __init__(self, layer: QuantLayer, dtype: torch.dtype) -> None:
        super().__init__()
        for name in layer.settings:  # diffusers' pipelines read some
            setattr(self, name, getattr(layer, name))
        self.layer = copy.copy(layer)
        self.layer._buffers = {**layer._buffers, "codes": layer.codes.new_empty(0)}
        self.register_buffer("dequantized", layer.weight.to(dtype))
        self.register_buffer("float_bias", None if layer.bias is None else layer.bias.to(dtype))
        self.dequantized: Tensor
        self.float_bias: Tensor | None

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The layer's output on x (B, ...); scale is not needed."""
        y = self.layer.apply_op(x.to(self.dequantized.dtype), self.dequantized, self.float_bias)
        return y.to(x.dtype)


class FloatLayer(nn.Module):
    """A quantized layer that no integer kernel runs: dequantized weights, the input rounded as it
    was, computed in floating point."""

    stage = Stage.LOWERED

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        for name in layer.settings:
            setattr(self, name, getattr(layer, name))
        self.layer = copy.copy(layer)
        self.layer._buffers = {**layer._buffers, "codes": layer.codes.new_empty(0)}
        self.register_buffer("dequantized", layer.weight.to(layer.dtype))
        self.dequantized: Tensor

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The layer's output on x (B, ...); scale: (B,) where ranges come per timestep."""
        seen = self.layer.quantized_input(x, scale).to(x.dtype)
        return self.layer.apply_op(seen, self.dequantized, self.layer.bias)
