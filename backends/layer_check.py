"""Compare each kernel of this package with its layer, on the inputs of that layer in a run of the
model; the same for the CPU and for CUDA.

A wrong kernel changes all outputs of a layer, which the noise of rounding in the layers around it
may hide in the model's output. Alone, on the same codes, the kernel has to give the
same integers: what differs is the order of sums and the rounding of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tfmq_fx.backends.codes.layers import CodesLayer, quantize_input
from tfmq_fx.quant.affine import levels
from tfmq_fx.quant.modules import QuantConv
from tfmq_fx.quant.quant_layer import QuantLayer

# The least signal to difference in dB: sums of float32 differ by 1e-6, TF32 of the reference by
# 2**-11 and results in half precision by 2**-9, of each value; products of fp8 may be summed in
# less than float32. One step more in each code, the least of faults, is at about 35 dB.
_LEAST = {torch.float32: 55.0, torch.float16: 50.0, torch.bfloat16: 44.0}
_LEAST_FP8 = 30.0
Alone = Callable[[QuantLayer, fx.Node], CodesLayer | None]


class LayerByLayer(fx.Interpreter):
    """Run a quantized graph, and each layer that has a kernel on that kernel as well.

    alone: makes the kernel of a layer called by a node, ready to run, or None; None checks no
    kernels.
    wrong: layer -> how far off its kernel is.  shares: of values beyond their range, by call.
    """

    def __init__(self, gm: fx.GraphModule, alone: Alone | None) -> None:
        super().__init__(gm)
        self.alone, self.wrong = alone, dict[str, str]()
        self.node: fx.Node | None = None
        self.shares: list[float] = []

    def clipped(self) -> float:
        """The share of values beyond their range, over layers whose ranges are fixed."""
        return sum(self.shares) / max(1, len(self.shares))

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        layer = self.fetch_attr(target)
        expected = layer(*args, **kwargs)
        if isinstance(layer, QuantLayer) and layer.act_bits is not None:
            assert self.node is not None
            x, scale = _given(*args, **kwargs)
            if not layer.dynamic and layer.act_format == "int":
                codes = torch.round(x.float() / layer.broadcast_scale(x, scale)) + layer.act_zero
                beyond = (codes < 0) | (codes > levels(layer.act_bits))
                self.shares.append(float(beyond.float().mean()))
            kernel = None
            if self.alone is not None and target not in self.wrong:
                kernel = self.alone(layer, self.node)
            if kernel is not None and (reason := _fault(layer, kernel, x, scale, expected)):
                self.wrong[str(target)] = reason
        return expected


def _fault(
    layer: QuantLayer, kernel: CodesLayer, x: Tensor, scale: Tensor | None, expected: Tensor
) -> str | None:
    """The error of a kernel as text, or None where it agrees with its layer."""
    try:
        answer = run_alone(layer, kernel, x, scale)
    except Exception as error:  # whatever a compiler or a driver raises
        first = str(error).strip().partition("\n")[0]
        return f"its kernel fails here: {type(error).__name__}: {first}"
    bias = 0 if layer.bias is None else layer.bias.float().view(layer.bias_shape)
    target, sums = expected.float() - bias, answer.float() - bias
    known = target.isfinite()  # codes have no NaN: `cpu.nans` reports where it arises
    if not sums[known].isfinite().all():
        return "its kernel answers NaN or Inf where the layer does not"
    off, whole = power((target - sums)[known]), power(target[known])
    if expected.dtype != torch.float32:  # which is rounded with the bias
        whole = max(whole, power(expected[known]))
    least = _LEAST_FP8 if layer.act_format == "fp8" else _LEAST[expected.dtype]
    if off <= whole * 10 ** (-least / 10):
        return None
    sqnr = decibels(whole, off)
    return f"its kernel is {sqnr:.1f} dB from the layer, at least {least:.0f} are needed"


def run_alone(layer: QuantLayer, kernel: CodesLayer, x: Tensor, scale: Tensor | None) -> Tensor:
    """The output of a kernel for the input x (B, ...) of its layer; scale: (B,) where ranges come
    per timestep."""
    if isinstance(layer, QuantConv) and layer.padding_mode != "zeros":
        x = F.pad(x, layer.pad_widths, mode=layer.padding_mode)
    if layer.dynamic:
        used = layer.measured_scale(x)
    else:
        used = scale if scale is not None and layer.per_timestep else kernel.act_scale
    settings = (kernel.zero_point, kernel.levels, kernel.codes_dtype, kernel.pads)
    codes = quantize_input(x, used, *settings)
    y: Tensor = kernel(codes, used)
    return y


def power(y: Tensor) -> float:
    """The sum of squares."""
    return float(y.double().square().sum())


def decibels(signal: float, noise: float) -> float:
    """The ratio of two powers in dB; infinite without noise."""
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and noise < math.inf else -math.inf


def _given(input: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    return input, scale
