"""Define the quantized linear and convolution layers, in the form that is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tfmq_fx.core.layer_config import WeightSpec
from tfmq_fx.core.module_overrides import is_plain
from tfmq_fx.core.padding import functional_widths, padding_widths

from .affine import weight_qparams
from .gptq import round_nearest
from .quant_layer import QuantLayer


class QuantLinear(QuantLayer):
    """y = x W^T + b with quantized W (out, in) and, as configured, quantized x (B, ..., in)."""

    settings: tuple[str, ...] = ("in_features", "out_features")

    @property
    def in_features(self) -> int:
        """Size of the last dimension of x."""
        return self.weight_shape[1]

    @property
    def out_features(self) -> int:
        """Size of the last dimension of y."""
        return self.weight_shape[0]

    def apply_op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class QuantConv(QuantLayer):
    """The base class of quantized convolutions; weights are (out, in / groups, *kernel)."""

    convolution: Callable[..., Tensor]
    settings: tuple[str, ...] = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
    )
    layer_settings: tuple[str, ...] = ("stride", "padding", "dilation", "groups", "padding_mode")

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

    @property
    def bias_shape(self) -> tuple[int, ...]:
        return (-1, *[1] * (len(self.weight_shape) - 2))

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, ...] | str]:
        """Pad x by a mode other than zeros; returns it and the padding left to the convolution."""
        if self.padding_mode == "zeros":
            return x, self.padding
        return F.pad(x, self.pad_widths, mode=self.padding_mode), (0,) * (x.dim() - 2)

    @property
    def pad_widths(self) -> tuple[int, ...]:
        """`borders` in the order of torch.nn.functional.pad."""
        return functional_widths(self.borders())

    def borders(self) -> list[tuple[int, int]]:
        """The padding before and after each spatial dimension of x."""
        return padding_widths(self.padding, self.kernel_size, self.dilation)

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


class QuantConvTranspose(QuantConv):
    """The base class of quantized transposed convolutions.

    Weights are (out, in / groups, *kernel), as a convolution's are; torch.nn has them as
    (in, out / groups, *kernel).
    """

    settings: tuple[str, ...] = (*QuantConv.settings, "output_padding")
    layer_settings: tuple[str, ...] = (*QuantConv.layer_settings, "output_padding")

    def __init__(self, *, output_padding: tuple[int, ...], **common: Any) -> None:
        super().__init__(**common)
        self.output_padding = tuple(output_padding)

    @classmethod
    def rows_of(cls, weight: Tensor, layer: Any) -> Tensor:
        return channels_swapped(weight, layer.groups)

    def borders(self) -> list[tuple[int, int]]:
        """What is put before and after each spatial dimension of x with its gaps filled, so that a
        convolution with the flipped kernel gives the output; negative where rows are left out."""
        padding: Any = self.padding
        zipped = zip(self.kernel_size, self.dilation, padding, self.output_padding, strict=True)
        reach = [(d * (k - 1) - int(p), o) for k, d, p, o in zipped]
        return [(before, before + more) for before, more in reach]

    def apply_op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return type(self).convolution(
            x,
            channels_swapped(weight, self.groups),
            bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )


def channels_swapped(weight: Tensor, groups: int) -> Tensor:
    """A weight (a, b / groups, *kernel) as (b, a / groups, *kernel), group by group."""
    first, second, *kernel = weight.shape
    split = weight.reshape(groups, first // groups, second, *kernel)
    return split.transpose(1, 2).reshape(groups * second, first // groups, *kernel)


class QuantConvTranspose1d(QuantConvTranspose):
    """Quantized nn.ConvTranspose1d."""

    convolution = staticmethod(F.conv_transpose1d)


class QuantConvTranspose2d(QuantConvTranspose):
    """Quantized nn.ConvTranspose2d."""

    convolution = staticmethod(F.conv_transpose2d)


class QuantConvTranspose3d(QuantConvTranspose):
    """Quantized nn.ConvTranspose3d."""

    convolution = staticmethod(F.conv_transpose3d)


QUANTIZED: dict[type[nn.Module], type[QuantLinear] | type[QuantConv]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
}
"""The quantized class for each layer class that has one; `kind_of` matches subclasses."""


def kind_of(layer: nn.Module) -> type[QuantLinear] | type[QuantConv] | None:
    """The quantized class for `layer`, or None if it cannot be quantized.

    None for layers that do not compute what their class and settings say.
    """
    for kind, quantized in QUANTIZED.items():
        if isinstance(layer, kind) and type(layer).forward is kind.forward:
            return quantized if is_plain(layer) else None
    return None


def weight_rows(layer: nn.Module) -> Tensor:
    """The weight of a torch.nn layer, output channels first: (out, in / groups, ...)."""
    kind = next(quantized for kind, quantized in QUANTIZED.items() if isinstance(layer, kind))
    assert isinstance(layer.weight, Tensor)
    return kind.rows_of(layer.weight, layer)


def with_weight(
    layer: QuantLayer, weight: Tensor, bias: Tensor | None, spec: WeightSpec
) -> QuantLayer:
    """A copy of `layer` with `bias` (out,) and `weight` (out, ...), rounded by `spec`."""
    grid = weight_qparams(weight, spec)
    changes = {
        "weight_bits": spec.bits,
        "weight_groups": 1 if grid.scale.dim() == 1 else grid.scale.shape[1],
        "weight_format": spec.format,
    }
    copy = type(layer).from_spec({**layer.spec(), **changes}).to(layer.codes.device)
    codes = round_nearest(weight.float().flatten(1), grid)
    copy.set_weight(codes.view(weight.shape), grid)
    copy.bias, copy.act_scale, copy.act_zero = bias, layer.act_scale, layer.act_zero
    return copy
