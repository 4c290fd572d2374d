"""Quantized linear and convolution layers: the one canonical, saved form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from tfmq_fx.core.layer_config import WeightSpec
from tfmq_fx.core.module_overrides import is_plain

from .affine import weight_qparams
from .gptq import round_nearest
from .quant_layer import QuantLayer


class QuantLinear(QuantLayer):
    """y = x W^T + b with quantized W (out, in) and, as configured, quantized x (B, ..., in)."""

    settings = ("in_features", "out_features")

    @property
    def in_features(self) -> int:
        """Size of the last dimension of x."""
        return self.weight_shape[1]

    @property
    def out_features(self) -> int:
        """Size of the last dimension of y."""
        return self.weight_shape[0]

    @classmethod
    def from_float(cls, layer: nn.Linear, **quantization: Any) -> Self:
        """An empty quantized layer for `layer`, with its bias; quantization: as in __init__."""
        made = cls(
            **quantization,
            weight_shape=tuple(layer.weight.shape),
            bias=layer.bias is not None,
            dtype=layer.weight.dtype,
        ).to(layer.weight.device)
        if layer.bias is not None:
            made.bias = layer.bias.detach().clone()
        return made

    def apply_op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class QuantConv(QuantLayer):
    """Common part of quantized convolutions; weights are (out, in / groups, *kernel)."""

    convolution: Callable[..., Tensor]
    settings = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
    )

    def __init__(
        self,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...] | str,
        dilation: tuple[int, ...],
        groups: int,
        padding_mode: str,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.stride, self.dilation, self.groups = tuple(stride), tuple(dilation), groups
        self.padding = padding if isinstance(padding, str) else tuple(padding)
        self.padding_mode = padding_mode

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.weight_shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.weight_shape[0]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Extent of the kernel."""
        return self.weight_shape[2:]

    @classmethod
    def from_float(cls, layer: Any, **quantization: Any) -> Self:
        """An empty quantized layer for a torch convolution, with its bias; quantization: as in
        QuantLayer.__init__."""
        weight, bias = layer.weight, layer.bias
        made = cls(
            **quantization,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            weight_shape=tuple(weight.shape),
            bias=bias is not None,
            dtype=weight.dtype,
        ).to(weight.device)
        if isinstance(bias, Tensor):
            made.bias = bias.detach().clone()
        return made

    def spec(self) -> dict[str, Any]:
        return super().spec() | {
            "stride": list(self.stride),
            "padding": self.padding if isinstance(self.padding, str) else list(self.padding),
            "dilation": list(self.dilation),
            "groups": self.groups,
            "padding_mode": self.padding_mode,
        }

    @property
    def bias_shape(self) -> tuple[int, ...]:
        return (-1, *[1] * (len(self.weight_shape) - 2))

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, ...] | str]:
        """x padded by a mode that convolutions do not have, and the padding left to do."""
        if self.padding_mode == "zeros":
            return x, self.padding
        return F.pad(x, self.pad_widths, mode=self.padding_mode), (0,) * (x.dim() - 2)

    @property
    def pad_widths(self) -> tuple[int, ...]:
        """`borders` as torch.nn.functional.pad takes them: last dimension first."""
        return tuple(width for pair in reversed(self.borders()) for width in pair)

    def borders(self) -> list[tuple[int, int]]:
        """How far x is padded before and after each of its spatial dimensions."""
        if not isinstance(self.padding, str):
            return [(n, n) for n in self.padding]
        kernel = self.weight_shape[2:]
        total = [d * (k - 1) for d, k in zip(self.dilation, kernel, strict=True)]
        return [(n // 2, n - n // 2) if self.padding == "same" else (0, 0) for n in total]

    def apply_op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, padding = self.pad(x)
        return type(self).convolution(
            x, weight, bias, self.stride, padding, self.dilation, self.groups
        )


class QuantConv1d(QuantConv):
    """Quantized nn.Conv1d."""

    convolution = staticmethod(F.conv1d)


class QuantConv2d(QuantConv):
    """Quantized nn.Conv2d."""

    convolution = staticmethod(F.conv2d)


class QuantConv3d(QuantConv):
    """Quantized nn.Conv3d."""

    convolution = staticmethod(F.conv3d)


QUANTIZED: dict[type[nn.Module], type[QuantLinear] | type[QuantConv]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
}
"""The quantized class for each layer class that has one; subclasses are matched by `kind_of`."""


def kind_of(layer: nn.Module) -> type[QuantLinear] | type[QuantConv] | None:
    """The quantized class for `layer`, or None where there is none: for transposed convolutions,
    and for a layer that computes something else than its class and its settings say."""
    for kind, quantized in QUANTIZED.items():
        if isinstance(layer, kind) and type(layer).forward is kind.forward:
            return quantized if is_plain(layer) else None
    return None


def emptied(layer: QuantLayer, **changes: object) -> QuantLayer:
    """A layer like `layer` whose weight is still empty; changes: of the arguments that made it."""
    made = type(layer).from_spec({**layer.spec(), **changes}).to(layer.codes.device)
    made.bias, made.act_scale, made.act_zero = layer.bias, layer.act_scale, layer.act_zero
    return made


def with_weight(
    layer: QuantLayer, weight: Tensor, bias: Tensor | None, spec: WeightSpec
) -> QuantLayer:
    """A layer like `layer` with the codes of `weight` (out, ...) by `spec`, rounded to nearest,
    and `bias` (out,)."""
    grid = weight_qparams(weight, spec)
    groups = 1 if grid.scale.dim() == 1 else grid.scale.shape[1]
    made = emptied(layer, weight_bits=spec.bits, weight_groups=groups, weight_format=spec.format)
    codes = round_nearest(weight.float().flatten(1), grid)
    made.set_weight(codes.view(weight.shape), grid)
    made.bias = bias
    return made
