"""Write quantized layers as patterns that Inductor gives to oneDNN.

They serve machines and layers that the kernels of this package do not run.

Quantize / dequantize written round a convolution or linear becomes one oneDNN int8 kernel
(`qconv_pointwise`, `qlinear_pointwise`) when Inductor freezes constants.
"""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor

from tfmq_fx.backends.float_layers import IntegerPattern
from tfmq_fx.quant.quant_layer import QuantLayer


class OnednnLayer(IntegerPattern):
    """A quantized layer as the op pattern that Inductor fuses into an int8 kernel.

    4-bit weights are expanded to int8: the kernels are the same. A further buffer: `weight_zero`
    (out,) int64 zeros.
    """

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__(layer)
        self.register_buffer("weight_zero", torch.zeros(len(self.weight_scale), dtype=torch.int64))
        self.weight_zero: Tensor

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As `IntegerPattern.product`, between operators that quantize and dequantize."""
        ops = torch.ops.quantized_decomposed
        grid = (self.scale, self.zero, 0, self.top, torch.uint8)
        x = ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *grid), *grid)
        weight = ops.dequantize_per_channel.default(
            self.weight, self.weight_scale, self.weight_zero, 0, -128, 127, torch.int8
        )
        return self.layer.apply_op(x, weight, bias)
