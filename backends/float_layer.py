"""Quantized layers that no kernel of this machine runs, in floating point."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from tfmq_fx.dialect import Stage
from tfmq_fx.nn import QuantLayer


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
