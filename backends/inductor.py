"""Lower quantized layers to what torch.compile turns into integer kernels: here for the CPU, in
`cuda` for NVIDIA GPUs.

On CPU, quantize / dequantize written round a convolution or linear becomes one oneDNN int8 kernel
(`qconv_pointwise`, `qlinear_pointwise`) when Inductor freezes constants. The scale that the pattern
sees must be a constant, so a scale per timestep multiplies before and after: x / s[t] is quantized
with scale 1, and the integer product is multiplied by s[t].
"""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from tfmq_fx.affine import levels
from tfmq_fx.backends import CPU
from tfmq_fx.backends.attention import pad_attention
from tfmq_fx.backends.float_layer import FloatLayer
from tfmq_fx.backends.torchao import to_torchao
from tfmq_fx.dialect import Stage
from tfmq_fx.graph import Declined, Rewrite, device_of, graph_pass
from tfmq_fx.kernels import keeps_integer_weights, obstacle
from tfmq_fx.nn import QuantConv, QuantLayer, QuantLinear


def unavailable(device: torch.device = CPU) -> str | None:
    """Why this machine cannot compile for `device`, or None where it can."""
    if device.type not in ("cpu", "cuda"):
        return f"it compiles for cpu and cuda, the model is on {device.type}"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "CUDA kernels need Triton, which is not installed (pip install 'tfmq-fx[cuda]')"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        compiler = get_cpp_compiler()
    except Exception as error:  # Inductor raises its own InvalidCxxCompiler, a private type
        return f"torch.compile needs a C++ compiler and found none ({type(error).__name__})"
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler and {compiler!r} is not installed"
    return None


class LoweredLayer(nn.Module):
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


@graph_pass(takes=(Stage.CAPTURED, Stage.FOLDED, Stage.QUANTIZED), gives=Stage.LOWERED)
def lower(gm: fx.GraphModule) -> Rewrite:
    """The graph with every quantized layer written for Inductor; declined are those that run in
    floating point, with the reason. Weight-only linear layers keep int8 weights through torchao."""
    declined, changed, weight_only = [], 0, []
    for name, layer in list(gm.named_modules()):
        if not isinstance(layer, QuantLayer):
            continue
        reason = obstacle(layer)
        lowered: nn.Module
        if reason is None:
            lowered = LoweredLayer(layer)
            changed += 1
        elif keeps_integer_weights(layer):
            assert isinstance(layer, QuantLinear)
            lowered = to_torchao(layer)
            weight_only.append(name)
        else:
            declined.append(Declined(name, f"runs in floating point: {reason}"))
            lowered = FloatLayer(layer)
        gm.set_submodule(name, lowered)
    padded = pad_attention(gm)
    details = {"integer": changed, "weight_only": weight_only, "padded_attention": padded}
    return Rewrite(gm, changed + len(weight_only) + padded, declined, details)


class FrozenCallable:
    """A graph compiled for the CPU that freezes constants whenever it is called or compiled again.

    Freezing has to be on while Dynamo traces, which a later call with other sizes does too; the
    setting is entered for the call alone (about 20 us) and nothing global stays changed.
    """

    def __init__(self, gm: fx.GraphModule, options: dict[str, Any]) -> None:
        self.compiled = torch.compile(gm, fullgraph=True, **options)

    def __call__(self, *inputs: Tensor) -> Any:
        from torch._inductor import config

        with torch.no_grad(), config.patch(freezing=True):
            return self.compiled(*inputs)


class CudaCallable:
    """A graph compiled for CUDA. Where the mode records CUDA graphs, results are copied out of
    their memory, which the next call overwrites."""

    def __init__(self, gm: fx.GraphModule, options: dict[str, Any]) -> None:
        self.compiled = torch.compile(gm, fullgraph=True, **options)
        flags = options.get("options") or {}
        recorded = options.get("mode") in ("max-autotune", "reduce-overhead")
        self.copies = recorded or bool(flags.get("triton.cudagraphs"))

    def __call__(self, *inputs: Tensor) -> Any:
        with torch.no_grad():
            found = self.compiled(*inputs)
            return tree_map_only(Tensor, Tensor.clone, found) if self.copies else found


def compile_graph(
    gm: fx.GraphModule, **options: Any
) -> tuple[FrozenCallable | CudaCallable, Rewrite]:
    """The compiled form of a quantized graph, and what was not lowered to integers.

    options: passed on to torch.compile.
    """
    device = device_of(gm)  # `unavailable` has passed it
    if device.type == "cpu":
        lowered = lower(gm)
        return FrozenCallable(lowered.gm, options), lowered
    from tfmq_fx.backends.cuda.lower import lower as lower_for_cuda
    from tfmq_fx.backends.cuda.trial import by_trial

    capability = torch.cuda.get_device_capability(device)
    lowered = lower_for_cuda(gm, choose=by_trial(device), capability=capability)
    return CudaCallable(lowered.gm, options), lowered
