"""Define the base class of quantized layers, with their reference semantics in eager mode.

A layer holds packed weight codes and a scale and zero point per output channel. Its input is not
quantized, or with one static range, with a scale per timestep that is passed as an argument, or
with ranges measured at every call. Backends replace these modules by their own, whose results are
compared with these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.layer_config import Format
from tfmq_fx.core.stages import Stage

from .affine import (
    FP8,
    QParams,
    dynamic_scale,
    finite_only,
    rounded_to_fp8,
    symmetric_steps,
    to_fp8,
)
from .base import RangedModule, plain_spec
from .packing import pack, packed_size, unpack


class QuantLayer(RangedModule):
    """The base class of quantized linear and convolution layers.

    weight_format, act_format: "int", or "fp8" (float8_e4m3fn, 8 bits).  dynamic: whether the
    input's range is measured at every call, instead of one static range or one per timestep.
    Buffers: `codes` uint8, packed (see `packing`; of fp8 the bits); `weight_scale` float32 and
    `weight_zero` uint8, (out,), or (out, weight_groups) where runs of input channels have their
    own; `bias` (out,) in the model's dtype, or None; `act_scale`, `act_zero`: see `RangedModule`.
    """

    stage = Stage.QUANTIZED
    settings: tuple[str, ...] = ()  # attributes of the torch.nn layer that this one has too
    layer_settings: tuple[str, ...] = ()  # those of them that are constructor arguments here

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
        weight_format: Format = "int",
        act_format: Format = "int",
        dynamic: bool = False,
    ) -> None:
        super().__init__()
        if (per_timestep or dynamic) and act_bits is None:
            raise ConfigError("a layer without activation bits has no scale per timestep or call")
        if per_timestep and dynamic:
            raise ConfigError("ranges measured at every call have no scale per timestep")
        if weight_format == "fp8" and (weight_bits != 8 or weight_groups > 1):
            raise ConfigError("fp8 weights have 8 bits and one scale per output channel")
        if weight_bits not in range(1, 9) or act_bits not in (None, *range(2, 17)):
            raise ConfigError(f"no layer has weights of {weight_bits} bits, inputs of {act_bits}")
        if {weight_format, act_format} - {"int", "fp8"} or weight_groups < 1:
            raise ConfigError(
                f"no layer has {weight_groups} groups of {weight_format} for {act_format} inputs"
            )
        if act_format == "fp8" and act_bits != 8:
            raise ConfigError(f"fp8 activations have 8 bits, not {act_bits}")
        self.weight_shape, self.weight_bits = tuple(weight_shape), weight_bits
        self.act_bits, self.per_timestep, self.dtype = act_bits, per_timestep, dtype
        self.weight_groups = weight_groups
        self.weight_format, self.act_format, self.dynamic = weight_format, act_format, dynamic
        out, count = weight_shape[0], torch.Size(weight_shape).numel()
        self.register_buffer(
            "codes", torch.empty(packed_size(count, weight_bits), dtype=torch.uint8)
        )
        grid = (out,) if weight_groups == 1 else (out, weight_groups)
        self.register_buffer("weight_scale", torch.empty(grid, dtype=torch.float32))
        self.register_buffer("weight_zero", torch.empty(grid, dtype=torch.uint8))
        self.register_buffer("bias", torch.empty(out, dtype=dtype) if bias else None)
        middle = 2 ** (act_bits - 1) if dynamic and act_bits and act_format == "int" else 0
        self.register_range(middle)
        self.codes: Tensor
        self.weight_scale: Tensor
        self.weight_zero: Tensor
        self.bias: Tensor | None

    # ------------------------------------------------------------------ weights

    def set_weight(self, codes: Tensor, grid: QParams) -> None:
        """Store `codes` (out, ...) on `grid`: integers, or of fp8 the values in units of the scale.

        Earlier tensors are replaced, not written.
        """
        fits = tuple(codes.shape) == self.weight_shape and grid.scale.shape[1:].numel() == (
            self.weight_groups
        )
        actual = _number(grid.bits, grid.format)
        expected = _number(self.weight_bits, self.weight_format)
        if not fits or actual != expected:
            raise ConfigError(
                f"codes of shape {tuple(codes.shape)} at {actual} do not fit a layer of "
                f"shape {self.weight_shape} at {expected} (scales "
                f"{tuple(grid.scale.shape)}, {self.weight_groups} for each channel)"
            )
        if self.weight_format == "fp8":
            codes = to_fp8(codes.detach()).view(torch.uint8)
        self.codes = pack(codes, self.weight_bits)
        self.weight_scale = grid.scale.detach().float().clone()
        self.weight_zero = grid.zero.detach().to(torch.uint8)

    def grid(self) -> QParams:
        """The scales and zero points of the weight."""
        zero = self.weight_zero.float()
        return QParams(self.weight_scale, zero, self.weight_bits, self.weight_format)

    def weight_codes(self) -> Tensor:
        """The codes less their zero points: (out, ...) int8 at every bit width.

        fp8: float8_e4m3fn, sharing memory with `codes`.
        """
        if self.weight_format == "fp8":
            return self.codes.view(FP8).view(self.weight_shape)
        codes = unpack(self.codes, self.weight_bits, self.weight_shape).to(torch.int16).flatten(1)
        _, zero = self.grid().over(codes.shape[1])
        return (codes - zero.to(torch.int16)).to(torch.int8).view(self.weight_shape)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight: (out, ...) float32."""
        codes = self.weight_codes().float().flatten(1)
        scale, _ = self.grid().over(codes.shape[1])
        return (codes * scale).view(self.weight_shape)

    # ------------------------------------------------------------------ activations

    def input_codes(self, x: Tensor, scale: Tensor) -> Tensor:
        """The codes of x less the zero point, as float32: see `integer_codes`."""
        assert self.act_bits is not None
        x = x.float()  # half precision holds neither all codes nor a product with 1 / scale
        if self.act_format == "fp8":
            return finite_only(rounded_to_fp8(x * (1.0 / scale)), x)
        return self.integer_codes(x, scale, self.act_bits)

    def broadcast_scale(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """The scale of x (B, ...), shaped to multiply it; scale: (B,), with one per timestep."""
        if self.dynamic:
            return self.measured_scale(x)
        if not self.per_timestep:
            return self.act_scale
        if scale is None:
            raise ConfigError("this layer's input is quantized per timestep: it needs a scale")
        return scale.view(-1, *[1] * (x.dim() - 1))

    def measured_scale(self, x: Tensor) -> Tensor:
        """The dynamic scale of each token or sample of x, float32, shaped to multiply it.

        It is the largest magnitude over 2**(bits - 1) - 1, or over 448 in fp8.
        """
        assert self.act_bits is not None
        return dynamic_scale(x, self.ranged_dims, symmetric_steps(self.act_bits, self.act_format))

    @property
    def ranged_dims(self) -> tuple[int, ...]:
        """The dimensions of x that share a dynamic scale: the last of a linear layer's input, the
        channels and positions of a convolution's."""
        return tuple(range(1 - len(self.weight_shape), 0))

    def quantized_input(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Round x to the layer's input grid, in x's dtype; x itself if inputs are not quantized."""
        if self.act_bits is None:
            return x
        broadcast = self.broadcast_scale(x, scale)
        return (self.input_codes(x, broadcast) * broadcast).to(x.dtype)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The layer's output on x (B, ...), in x's dtype; scale: (B,), with one per timestep."""
        if self.act_bits is None:
            return self.apply_op(x, self.weight.to(x.dtype), self.bias)
        broadcast = self.broadcast_scale(x, scale)
        y = self.apply_op(self.input_codes(x, broadcast), self.weight, None) * broadcast
        if self.bias is not None:
            y = y + self.bias.view(self.bias_shape)
        return y.to(x.dtype)

    @classmethod
    def from_float(cls, layer: Any, **quantization: Any) -> Self:
        """Create a quantized layer for a torch.nn layer, with its bias but without weights.

        quantization: arguments of QuantLayer.__init__.
        """
        weight, bias = cls.rows_of(layer.weight, layer), layer.bias
        quantized = cls(
            **quantization,
            **{name: getattr(layer, name) for name in cls.layer_settings},
            weight_shape=tuple(weight.shape),
            bias=bias is not None,
            dtype=weight.dtype,
        ).to(weight.device)
        quantized.bias = None if bias is None else bias.detach().clone()
        return quantized

    @classmethod
    def rows_of(cls, weight: Tensor, layer: Any) -> Tensor:
        """The weight of a torch.nn layer as a quantized one has it: output channels first."""
        return weight

    def apply_op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float operation: linear or convolution."""
        raise TypeError("use QuantLinear or one of the QuantConv classes")

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """The shape in which a bias broadcasts to the output."""
        return (-1,)

    # ------------------------------------------------------------------ plumbing

    def weight_shape_numel(self) -> int:
        """The number of weights."""
        return torch.Size(self.weight_shape).numel()

    def range_kind(self) -> str:
        """The kind of input range: "none", "static", "per timestep" or "dynamic"."""
        if self.act_bits is None:
            return "none"
        if self.dynamic:
            return "dynamic"
        return "per timestep" if self.per_timestep else "static"

    def spec(self) -> dict[str, Any]:
        """The constructor arguments, JSON-ready, for `from_spec`."""
        return {
            **plain_spec(
                self,
                "weight_shape",
                "weight_bits",
                "act_bits",
                "per_timestep",
                "dtype",
                "weight_groups",
                "weight_format",
                "act_format",
                "dynamic",
                *self.layer_settings,
            ),
            "bias": self.bias is not None,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        bias = self.bias
        super()._apply(fn, recurse)
        self.bias = None if bias is None else fn(bias)  # the only tensor in the model's dtype
        return self

    def extra_repr(self) -> str:
        acts = "float"
        if self.act_bits is not None:
            acts = f"{_number(self.act_bits, self.act_format)} {self.range_kind()}"
        shape = "x".join(map(str, self.weight_shape))
        groups = f" in {self.weight_groups} groups" if self.weight_groups > 1 else ""
        weights = _number(self.weight_bits, self.weight_format)
        return f"{shape}, weights {weights}{groups}, activations {acts}"


def _number(bits: int, format: Format) -> str:
    """The number format as text."""
    return "fp8" if format == "fp8" else f"{bits} bits"
