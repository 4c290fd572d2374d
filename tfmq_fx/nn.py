"""Quantized layers: integer buffers, reference semantics in eager. The one canonical, saved form.

A layer holds weight codes (packed), a scale and zero point per output channel, and says how its
input is quantized: not at all, with one static range, or with a scale per timestep that arrives as
an argument. Backends replace these modules by their own; results are compared with these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .affine import QParams, levels
from .dialect import Stage
from .errors import ConfigError
from .packing import pack, packed_size, unpack

_FLOAT_BUFFERS = ("weight_scale", "act_scale")  # keep float32 whatever the model's dtype


class QuantLayer(nn.Module):
    """Common part of quantized linear and convolution layers.

    Buffers: `codes` uint8, packed (see `packing`); `weight_scale` float32 and `weight_zero` uint8,
    (out,), or (out, weight_groups) where runs of input channels have their own; `bias` (out,) in
    the model's dtype, or None; `act_scale`, `act_zero`, 0-d float32 and int32: the static input
    range, or the shared zero point where scales come per timestep.
    """

    stage = Stage.QUANTIZED
    settings: tuple[str, ...] = ()  # what the torch.nn layer calls its settings; answered here too

    def __init__(
        self,
        *,
        weight_shape: tuple[int, ...],
        weight_bits: int,
        act_bits: int | None,
        per_timestep: bool,
        bias: bool,
        dtype: torch.dtype = torch.float32,
        weight_groups: int = 1,
    ) -> None:
        super().__init__()
        if per_timestep and act_bits is None:
            raise ConfigError("a layer without activation bits has no scale per timestep")
        self.weight_shape, self.weight_bits = tuple(weight_shape), weight_bits
        self.act_bits, self.per_timestep, self.dtype = act_bits, per_timestep, dtype
        self.weight_groups = weight_groups
        out, count = weight_shape[0], torch.Size(weight_shape).numel()
        self.register_buffer(
            "codes", torch.empty(packed_size(count, weight_bits), dtype=torch.uint8)
        )
        grid = (out,) if weight_groups == 1 else (out, weight_groups)
        self.register_buffer("weight_scale", torch.empty(grid))
        self.register_buffer("weight_zero", torch.empty(grid, dtype=torch.uint8))
        self.register_buffer("bias", torch.empty(out, dtype=dtype) if bias else None)
        self.register_buffer("act_scale", torch.ones(()))
        self.register_buffer("act_zero", torch.zeros((), dtype=torch.int32))
        self.codes: Tensor
        self.weight_scale: Tensor
        self.weight_zero: Tensor
        self.bias: Tensor | None
        self.act_scale: Tensor
        self.act_zero: Tensor

    # ------------------------------------------------------------------ weights

    def set_weight(self, codes: Tensor, grid: QParams) -> None:
        """Store integer `codes` (out, ...) on `grid`; earlier tensors are replaced, not written."""
        fits = tuple(codes.shape) == self.weight_shape and grid.scale.shape[1:].numel() == (
            self.weight_groups
        )
        if not fits or grid.bits != self.weight_bits:
            raise ConfigError(
                f"codes of shape {tuple(codes.shape)} at {grid.bits} bits do not fit a layer of "
                f"shape {self.weight_shape} at {self.weight_bits} bits (scales "
                f"{tuple(grid.scale.shape)}, {self.weight_groups} for each channel)"
            )
        self.codes = pack(codes, self.weight_bits)
        self.weight_scale = grid.scale.detach().float().clone()
        self.weight_zero = grid.zero.detach().to(torch.uint8)

    def grid(self) -> QParams:
        """Scales and zero points of the weight."""
        return QParams(self.weight_scale, self.weight_zero.float(), self.weight_bits)

    def weight_codes(self) -> Tensor:
        """Codes less their zero points: (out, ...) int8, every bit width included."""
        codes = unpack(self.codes, self.weight_bits, self.weight_shape).to(torch.int16).flatten(1)
        _, zero = self.grid().over(codes.shape[1])
        return (codes - zero.to(torch.int16)).to(torch.int8).view(self.weight_shape)

    @property
    def weight(self) -> Tensor:
        """The weight these integers stand for: (out, ...) float32."""
        codes = self.weight_codes().float().flatten(1)
        scale, _ = self.grid().over(codes.shape[1])
        return (codes * scale).view(self.weight_shape)

    # ------------------------------------------------------------------ activations

    def set_static_range(self, scale: float, zero: int) -> None:
        """Use one range for every timestep (or, with per_timestep, the shared zero point)."""
        self.act_scale = torch.tensor(float(scale), device=self.act_scale.device)
        self.act_zero = torch.tensor(int(zero), dtype=torch.int32, device=self.act_zero.device)

    def input_codes(self, x: Tensor, scale: Tensor) -> Tensor:
        """Input codes less the zero point, as floats; `scale` broadcasts to x.

        Rounding is of x * (1 / scale), as integer kernels do it, not of x / scale.
        """
        assert self.act_bits is not None
        zero = self.act_zero.to(torch.float32)
        # x.float(): half precision holds neither all codes nor a product with 1 / scale
        codes = (torch.round(x.float() * (1.0 / scale)) + zero).clamp(0, levels(self.act_bits))
        return codes - zero

    def broadcast_scale(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """`scale` (B,) shaped to multiply x (B, ...), or the static scale."""
        if not self.per_timestep:
            return self.act_scale
        if scale is None:
            raise ConfigError("this layer's input is quantized per timestep: it needs a scale")
        return scale.view(-1, *[1] * (x.dim() - 1))

    def quantized_input(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """What the layer sees of x, in x's dtype: x itself, or its nearest representable value."""
        if self.act_bits is None:
            return x
        broadcast = self.broadcast_scale(x, scale)
        return (self.input_codes(x, broadcast) * broadcast).to(x.dtype)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The layer's output on x (B, ...), in x's dtype; scale: (B,) where given per timestep."""
        if self.act_bits is None:
            return self.apply_op(x, self.weight.to(x.dtype), self.bias)
        broadcast = self.broadcast_scale(x, scale)
        y = self.apply_op(self.input_codes(x, broadcast), self.weight, None) * broadcast
        if self.bias is not None:
            y = y + self.bias.view(self.bias_shape)
        return y.to(x.dtype)

    def apply_op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float operation: linear or convolution."""
        raise TypeError("use QuantLinear or one of the QuantConv classes")

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape in which a bias is added to the output."""
        return (-1,)

    # ------------------------------------------------------------------ plumbing

    def weight_shape_numel(self) -> int:
        """The number of weights."""
        return torch.Size(self.weight_shape).numel()

    def range_kind(self) -> str:
        """How the input is ranged: "none", "static" or "per timestep"."""
        if self.act_bits is None:
            return "none"
        return "per timestep" if self.per_timestep else "static"

    def spec(self) -> dict[str, Any]:
        """JSON-ready constructor arguments; `from_spec` builds the module, empty, from them."""
        return {
            "weight_shape": list(self.weight_shape),
            "weight_bits": self.weight_bits,
            "act_bits": self.act_bits,
            "per_timestep": self.per_timestep,
            "bias": self.bias is not None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weight_groups": self.weight_groups,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """The module that `spec` describes, its buffers still empty."""
        shape, dtype = tuple(spec["weight_shape"]), getattr(torch, spec["dtype"])
        return cls(**{**spec, "weight_shape": shape, "dtype": dtype})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: getattr(self, name) for name in _FLOAT_BUFFERS}
        super()._apply(fn, recurse)
        for name, value in exact.items():  # .half() must not touch scales
            moved = getattr(self, name)
            if moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        if self.bias is not None:
            self.dtype = self.bias.dtype
        return self

    def extra_repr(self) -> str:
        acts = "float" if self.act_bits is None else f"{self.act_bits} bits {self.range_kind()}"
        shape = "x".join(map(str, self.weight_shape))
        groups = f" in {self.weight_groups} groups" if self.weight_groups > 1 else ""
        return f"{shape}, weights {self.weight_bits} bits{groups}, activations {acts}"


class QuantLinear(QuantLayer):
    """y = x W^T + b with integer W (out, in) and, as configured, integer x (B, ..., in)."""

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
    def from_float(
        cls,
        layer: nn.Linear,
        *,
        weight_bits: int,
        act_bits: int | None,
        per_timestep: bool,
        weight_groups: int = 1,
    ) -> Self:
        """An empty quantized layer for `layer`, with its bias."""
        made = cls(
            weight_shape=tuple(layer.weight.shape),
            weight_bits=weight_bits,
            act_bits=act_bits,
            per_timestep=per_timestep,
            weight_groups=weight_groups,
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
    def from_float(
        cls,
        layer: Any,
        *,
        weight_bits: int,
        act_bits: int | None,
        per_timestep: bool,
        weight_groups: int = 1,
    ) -> Self:
        """An empty quantized layer for a torch convolution, with its bias."""
        weight, bias = layer.weight, layer.bias
        made = cls(
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            weight_shape=tuple(weight.shape),
            weight_bits=weight_bits,
            act_bits=act_bits,
            per_timestep=per_timestep,
            weight_groups=weight_groups,
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
        widths = [width for pair in reversed(self.borders()) for width in pair]
        return F.pad(x, widths, mode=self.padding_mode), (0,) * (x.dim() - 2)

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
    """The quantized class for `layer`, or None where there is none (transposed convolutions)."""
    for kind, quantized in QUANTIZED.items():
        if isinstance(layer, kind) and type(layer).forward is kind.forward:
            return quantized
    return None
