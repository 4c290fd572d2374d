"""Quantized layers as patterns that Inductor gives to oneDNN, for machines and layers that the
kernels of this package do not run.

Quantize / dequantize written round a convolution or linear becomes one oneDNN int8 kernel
(`qconv_pointwise`, `qlinear_pointwise`) when Inductor freezes constants. The scale that the pattern
sees must be a constant, so a scale per timestep multiplies before and after: x / s[t] is quantized
with scale 1, and the integer product is multiplied by s[t].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, nn

from tfmq_fx.core.stages import Stage
from tfmq_fx.quant.affine import levels
from tfmq_fx.quant.modules import QuantConv
from tfmq_fx.quant.quant_layer import QuantLayer


class OnednnLayer(nn.Module):
    """A quantized layer as the op pattern that Inductor fuses into an int8 kernel.

    Weights are int8 codes less their zero points (4-bit weights are expanded: the kernels are the
    same). Buffers: `weight` int8 (out, ...), `weight_scale` (out,) float32, `weight_zero` (out,)
    int64 zeros, `bias`.
    """

    stage = Stage.LOWERED

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        assert layer.act_bits is not None
        for name in layer.settings:  # diffusers' pipelines read some
            setattr(self, name, getattr(layer, name))
        # The op that applies weights; its own (packed) buffers are dropped.
        self.op = _Op(layer)
        self.per_timestep = layer.per_timestep
        self.zero, self.top = int(layer.act_zero), levels(layer.act_bits)
        self.scale = 1.0 if layer.per_timestep else float(layer.act_scale)
        self.bias_shape = layer.bias_shape
        self.register_buffer("weight", layer.weight_codes())
        self.register_buffer("weight_scale", layer.weight_scale.clone())
        self.register_buffer("weight_zero", torch.zeros(len(self.weight_scale), dtype=torch.int64))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.clone())
        self.weight: Tensor
        self.weight_scale: Tensor
        self.weight_zero: Tensor
        self.bias: Tensor | None

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The layer's output on x (B, ...); scale: (B,) where ranges come per timestep."""
        ops = torch.ops.quantized_decomposed
        dtype = x.dtype
        if self.per_timestep:
            assert scale is not None
            scale = scale.view(-1, *[1] * (x.dim() - 1))
            x = x * (1.0 / scale)
        grid = (self.scale, self.zero, 0, self.top, torch.uint8)
        x = ops.dequantize_per_tensor.default(
            ops.quantize_per_tensor.default(x.float(), *grid), *grid
        )
        weight = ops.dequantize_per_channel.default(
            self.weight, self.weight_scale, self.weight_zero, 0, -128, 127, torch.int8
        )
        y: Tensor
        if not self.per_timestep:
            y = self.op(x, weight, self.bias)
            return y.to(dtype)
        y = self.op(x, weight, None) * scale
        if self.bias is not None:
            y = y + self.bias.view(self.bias_shape)
        return y.to(dtype)


class _Op(nn.Module):
    """The float operation of a quantized layer, without its weights."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.convolution: Any = None
        if isinstance(layer, QuantConv):
            self.convolution = type(layer).convolution
            self.settings = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.convolution is None:
            return F.linear(x, weight, bias)
        y: Tensor = self.convolution(x, weight, bias, *self.settings)
        return y
