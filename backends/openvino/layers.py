"""Write quantized layers in the form that OpenVINO turns into int8 kernels.

OpenVINO fuses quantization, an integer product and its scales where a FakeQuantize operation with
constant bounds stands in front of a convolution or matrix product, and the weight is an int8
constant times a scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfmq_fx.backends.float_layers import IntegerPattern, LoweredLayer
from tfmq_fx.backends.support import obstacle
from tfmq_fx.core.stages import Stage
from tfmq_fx.quant.modules import QuantConv, QuantConvTranspose, QuantLinear
from tfmq_fx.quant.quant_layer import QuantLayer

_LIBRARY = torch.library.Library("tfmq_fx", "FRAGMENT")
_LIBRARY.define("fake_quantize(Tensor x, float scale, int zero, int top) -> Tensor")


def _fake_quantize(x: Tensor, scale: float, zero: int, top: int) -> Tensor:
    codes = (torch.round(x * (1.0 / scale)) + zero).clamp(0, top)
    return (codes - zero) * scale


# torch's own fake_quantize has no shape function: it cannot be exported with free sizes (2.13).
_LIBRARY.impl("fake_quantize", _fake_quantize, "CompositeExplicitAutograd")
_LIBRARY.impl("fake_quantize", lambda x, scale, zero, top: torch.empty_like(x), "Meta")
fake_quantize = torch.ops.tfmq_fx.fake_quantize.default
"""fake_quantize(x, scale, zero, top): the nearest scale * (q - zero) to x, q in [0, top]; float32.

One node in an exported graph, which becomes OpenVINO's FakeQuantize.
"""


def float_reason(layer: QuantLayer) -> str | None:
    """Why a layer is computed in floating point, or None where its product is of integers."""
    if layer.dynamic:
        return "ranges measured at run time"
    if isinstance(layer, QuantConvTranspose):
        return obstacle(layer, "cpu")
    integers = layer.weight_format == layer.act_format == "int" and layer.weight_groups == 1
    bits = layer.act_bits
    if integers and bits is not None and bits <= 8 and isinstance(layer, (QuantConv, QuantLinear)):
        return None  # of any dimension, grouping and padding mode
    return obstacle(layer, "cpu") or f"no int8 kernel for {type(layer).__name__}"


class IntegerLayer(IntegerPattern):
    """A quantized layer as FakeQuantize and an integer product; `weight_scale` is (out, 1, ...)."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__(layer)
        self.weight_scale = self.weight_scale.view(-1, *[1] * (self.weight.dim() - 1))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As `IntegerPattern.product`, behind one FakeQuantize."""
        layer = self.layer
        if isinstance(layer, QuantConv):
            # before quantization: what stands between it and the product would keep int8 away
            x, padding = layer.pad(x)
        if self.top < 255:  # FakeQuantize of 256 levels is what becomes int8
            x = x.clamp(max=(self.top - self.zero) * self.scale)
        x = fake_quantize(x, self.scale, self.zero, 255)
        weight = self.weight.float() * self.weight_scale
        if isinstance(layer, QuantConv):
            settings = (layer.stride, padding, layer.dilation, layer.groups)
            return type(layer).convolution(x, weight, bias, *settings)
        return F.linear(x, weight, bias)


class CompressedLinear(LoweredLayer):
    """A linear layer in floating point with int8 weights in memory, one scale for each group.

    Its input is rounded as in the quantized layer.
    """

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__(layer)
        out, width = layer.weight_shape
        codes = layer.weight_codes()
        if layer.weight_groups > 1:
            codes = codes.view(out, layer.weight_groups, width // layer.weight_groups)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", layer.weight_scale.clone()[..., None])
        self.weight: Tensor
        self.weight_scale: Tensor

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The layer's output on x (B, ..., in); scale: (B,) where ranges come per timestep."""
        seen = self.layer.quantized_input(x, scale)
        weight = (self.weight.float() * self.weight_scale).view(self.layer.weight_shape)
        return F.linear(seen, weight.to(x.dtype), self.layer.bias)


class ChannelsLastNorm(nn.Module):
    """A group norm computed from statistics of single channels, on channels-last memory.

    OpenVINO's own wants channels first, and so a copy before and after it.

    The variance is E[x^2] - E[x]^2: equal to the two-pass one up to (1 + mean^2 / variance) times
    float32's rounding, so not for half precision.
    """

    stage = Stage.LOWERED

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.num_channels = norm.num_groups, norm.num_channels
        self.eps, self.affine = norm.eps, norm.affine
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """The normalized x (B, channels, ...)."""
        dims = list(range(2, x.dim()))
        if not dims:
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        dtype, x = x.dtype, x.float()
        count, grouped = 1, (-1, self.num_groups, self.num_channels // self.num_groups)
        for i in dims:
            count = count * x.shape[i]
        mean = x.mean(dims).view(grouped).mean(2, keepdim=True)
        length = torch.linalg.vector_norm(x, dim=dims)  # one pass, where squares would be written
        square = (length * length / count).view(grouped).mean(2, keepdim=True)
        factor = torch.rsqrt((square - mean * mean).clamp(min=0) + self.eps)
        shift = -mean * factor
        if self.affine:
            weight = self.weight.float().view(1, *grouped[1:])
            shift = shift * weight + self.bias.float().view(1, *grouped[1:])
            factor = factor * weight
        shape = (-1, self.num_channels, *[1] * len(dims))
        factor, shift = (v.expand(-1, *grouped[1:]).reshape(shape) for v in (factor, shift))
        return (x * factor + shift).to(dtype)
