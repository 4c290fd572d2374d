"""Run convolutions and linear layers on integer or fp8 codes, each by one kernel with its
epilogue."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.layer_edits import layer_input
from tfmq_fx.ir.node_info import size_hint
from tfmq_fx.quant.affine import FP8, levels
from tfmq_fx.quant.modules import QuantConv
from tfmq_fx.quant.quant_layer import QuantLayer

from .arithmetic import packed_half, quantize, stored_zero
from .choice import Choice
from .problem import Problem

Pads = tuple[int, int, int, int]  # left, right, top, bottom, as for torch.nn.functional.pad


class Epilogue(NamedTuple):
    """The tensors that a kernel adds to its sums, and the scale that it quantizes the result with.

    row: (B, O), added at every place of a sample.  residual: (B, OH, OW, O).  out_scale: (ranges,).
    """

    row: Tensor | None
    residual: Tensor | None
    out_scale: Tensor | None


def quantize_input(
    x: Tensor, scale: Tensor, zero: int, levels: int, dtype: torch.dtype, pads: Pads | None
) -> Tensor:
    """The codes of a layer's input, as its kernel reads them.

    x: (B, C, H, W) with `pads`, for convolutions, whose codes are (B, top + H + bottom,
    left + W + right, C) with borders of the zero's code; else (..., C), like its codes.  Codes are
    contiguous, wherever x lies.
    scale: (B,) or (1,) float32, or of as many dimensions as x.  zero, levels: of the grid.
    dtype: int8 (codes - 128), float8_e4m3fn, or for kernels on the CPU uint8.
    """
    if scale.dim() == 1:
        scale = scale.view(-1, *[1] * (x.dim() - 1))
    if pads is None:
        return quantize(x, scale, zero, levels, dtype).contiguous()  # tokens may be images' views
    pixels = x.permute(0, 2, 3, 1)
    if any(pads) and dtype == FP8:  # 0 is a value of fp8; its dtype cannot be padded
        pixels = F.pad(pixels, (0, 0, *pads))
    codes = quantize(pixels, scale.permute(0, 2, 3, 1), zero, levels, dtype)
    if any(pads) and dtype != FP8:
        codes = F.pad(codes, (0, 0, *pads), value=stored_zero(zero, dtype))
    return codes.contiguous()


quantize_input.stage = Stage.LOWERED  # type: ignore[attr-defined]


class CodesLayer(nn.Module):
    """A convolution or linear layer on codes; each engine has a subclass whose kernel runs it.

    Buffers: `weight` (O, R, S, C) int8 (codes less zero points), float8_e4m3fn, or as the engine
    stores it; `zero` (O,) uint8 zero points of packed weights; `weight_scale` (O,) float32;
    `offset` (O,) int32, added to each sum: it takes off the zero of the codes; `bias` (O,) or None;
    `act_scale` (1,) float32, the static range.
    problem: what is computed, at the sizes of capture; choice: what computes it.
    pads: borders that the input's codes must have, None for linear layers.  dtype: of the result.

    A subclass defines `run`, and where they differ `integer_dtype`, `stored_weight`,
    `takes_second_segment` and `with_own_engine`.
    """

    stage = Stage.LOWERED
    integer_dtype = torch.int8  # that integer codes are stored in: int8 (codes - 128) or uint8

    def __init__(
        self, layer: QuantLayer, dtype: torch.dtype, problem: Problem, choice: Choice
    ) -> None:
        super().__init__()
        assert layer.act_bits is not None
        for name in layer.settings:  # diffusers' pipelines read some
            setattr(self, name, getattr(layer, name))
        self.is_conv = isinstance(layer, QuantConv)
        self.pads = pads_of(layer)
        self.dtype, self.problem, self.choice = dtype, problem, self.with_own_engine(choice)
        self.codes_dtype = FP8 if layer.act_format == "fp8" else self.integer_dtype
        self.zero_point, self.levels = int(layer.act_zero), levels(layer.act_bits)
        self.out_zero, self.out_levels, self.out_dtype = 0, 0, dtype

        codes = layer.weight_codes()  # (O, C) or (O, C, R, S)
        codes = codes.permute(0, 2, 3, 1) if codes.dim() == 4 else codes[:, None, None, :]
        zero = torch.zeros(len(codes), dtype=torch.uint8, device=codes.device)
        if problem.half:
            zero = layer.weight_zero.clone()
        sums = codes.float().sum((1, 2, 3)) if self.codes_dtype == FP8 else codes.sum((1, 2, 3))
        self.register_buffer("weight", self.stored_weight(codes, zero).contiguous())
        self.register_buffer("zero", zero)
        self.register_buffer("weight_scale", layer.weight_scale.clone())
        offset = -int(stored_zero(self.zero_point, self.codes_dtype)) * sums
        self.register_buffer("offset", offset.to(torch.int32))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.clone())
        self.register_buffer("act_scale", layer.act_scale.clone().view(1))
        self.weight: Tensor
        self.zero: Tensor
        self.weight_scale: Tensor
        self.offset: Tensor
        self.bias: Tensor | None
        self.act_scale: Tensor

    def stored_weight(self, codes: Tensor, zero: Tensor) -> Tensor:
        """The weights as the engine keeps them, from codes (O, R, S, C) less zero points (O,)."""
        return codes

    @property
    def takes_second_segment(self) -> bool:
        """Whether its kernel adds the sum of another layer of equal geometry (`ConcatLayer`)."""
        return True

    @classmethod
    def with_own_engine(cls, choice: Choice) -> Choice:
        """The choice with its engine replaced by the one that runs layers of this class."""
        return choice

    def requantizes(self, zero: int, levels: int, dtype: torch.dtype) -> None:
        """Make the layer return codes on another layer's grid; calls then pass its scale."""
        self.out_zero, self.out_levels, self.out_dtype = zero, levels, dtype

    @classmethod
    def side_by_side(cls, layers: Sequence[CodesLayer], choice: Choice) -> CodesLayer:
        """Join layers that differ only in their weights into one; it returns their results one
        after the other along the channels."""
        first = layers[0]
        joint = copy.copy(first)
        joint.problem, joint.choice = joint_problem(layers), first.with_own_engine(choice)
        joint._buffers = dict(first._buffers)
        for name in ("weight", "zero", "weight_scale", "offset"):
            joint._buffers[name] = torch.cat([getattr(layer, name) for layer in layers])
        if any(layer.bias is not None for layer in layers):
            dtype = next(layer.bias.dtype for layer in layers if layer.bias is not None)
            biases = [
                layer.weight_scale.new_zeros(len(layer.weight), dtype=dtype)
                if layer.bias is None
                else layer.bias
                for layer in layers
            ]
            joint._buffers["bias"] = torch.cat(biases)
        return joint

    def forward(
        self,
        codes: Tensor,
        scale: Tensor,
        row: Tensor | None = None,
        residual: Tensor | None = None,
        out_scale: Tensor | None = None,
    ) -> Tensor:
        """The layer's output: (B, O, OH, OW), channels last in memory, or (..., O).

        codes: of `quantize_input`.  scale: the scale they were made with.
        row: (B, O), added at every place of a sample.  residual: like the output.
        out_scale: (ranges,), after `requantizes`: the output is codes, of convolutions channels
        last (B, OH, OW, O).
        """
        return _run([self], [codes], [scale], Epilogue(row, residual, out_scale))

    def run(
        self,
        layers: Sequence[CodesLayer],
        codes: list[Tensor],
        scales: list[Tensor],
        epilogue: Epilogue,
    ) -> Tensor:
        """The sum of the results of `layers`, this one first: (B, OH, OW, O).

        codes: (B, H, W, C), for linear layers (B, 1, T, C).  scales: (ranges,) each.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no kernel: give it a `run`")


class ConcatLayer(nn.Module):
    """Add two layers of equal geometry, on the parts of a concatenation, in one kernel; the first
    holds the bias."""

    stage = Stage.LOWERED

    def __init__(self, first: CodesLayer, second: CodesLayer) -> None:
        super().__init__()
        self.first, self.second, self.is_conv = first, second, first.is_conv

    def forward(
        self,
        codes: Tensor,
        scale: Tensor,
        more_codes: Tensor,
        more_scale: Tensor,
        row: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """As `CodesLayer.forward`, for the codes of both parts and their scales."""
        layers, scales = [self.first, self.second], [scale, more_scale]
        return _run(layers, [codes, more_codes], scales, Epilogue(row, residual, None))


def problem_of(layer: QuantLayer, shape: Sequence[int]) -> Problem:
    """The sizes of a layer's work on an input of `shape`, (B, C, H, W) or (B, ..., C)."""
    out, channels, *taps = layer.weight_shape
    if isinstance(layer, QuantConv):
        left, right, top, bottom = layer.pad_widths
        height, width = top + shape[2] + bottom, left + shape[3] + right
        stride, dilation = layer.stride, layer.dilation
    else:
        height, width = 1, math.prod(shape[1:-1])
        taps, stride, dilation = [1, 1], (1, 1), (1, 1)
    packs = layer.weight_format == "int" and layer.weight_bits <= 4
    half = packed_half(channels) if packs else 0
    return Problem(
        batch=shape[0],
        height=height,
        width=width,
        channels=channels,
        out_channels=out,
        taps=(taps[0], taps[1]),
        stride=(stride[0], stride[1]),
        dilation=(dilation[0], dilation[1]),
        format="fp8" if layer.act_format == "fp8" else "int4" if half else "int8",
        half=half,
    )


def problem_at(layer: QuantLayer, node: fx.Node) -> Problem:
    """The sizes of a layer's work where `node` calls it, at the sizes of capture."""
    return problem_of(layer, [size_hint(size) for size in layer_input(node).meta["val"].shape])


def joint_problem(layers: Sequence[CodesLayer]) -> Problem:
    """The sizes of the work of layers that read the same codes, side by side."""
    width = sum(layer.problem.out_channels for layer in layers)
    return dataclasses.replace(layers[0].problem, out_channels=width)


def pads_of(layer: QuantLayer) -> Pads | None:
    """The borders of the codes that a layer reads, None for linear layers; padding modes other than
    zeros are applied in floating point before."""
    if not isinstance(layer, QuantConv):
        return None
    if layer.padding_mode != "zeros":
        return (0, 0, 0, 0)
    left, right, top, bottom = layer.pad_widths
    return (left, right, top, bottom)


def _run(
    layers: list[CodesLayer], codes: list[Tensor], scales: list[Tensor], epilogue: Epilogue
) -> Tensor:
    """Run layers by the kernel of the first; returns the sum as `CodesLayer.forward` describes."""
    first, shape = layers[0], codes[0].shape
    row, residual, out_scale = epilogue
    if not first.is_conv:
        codes = [c.reshape(c.shape[0], 1, -1, c.shape[-1]) for c in codes]
    if residual is not None:
        if first.is_conv:
            residual = residual.permute(0, 2, 3, 1)
        else:
            residual = residual.reshape(shape[0], 1, -1, residual.shape[-1])
        residual = residual.contiguous()
    if row is not None:
        row = row.reshape(row.shape[0], row.shape[-1]).contiguous()
    scales = [scale.reshape(-1) for scale in scales]
    y = first.run(layers, codes, scales, Epilogue(row, residual, out_scale))
    if not first.is_conv:
        return y.view(*shape[:-1], y.shape[-1])
    return y if out_scale is not None else y.permute(0, 3, 1, 2)
