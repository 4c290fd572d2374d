"""Compile the quantized model in floating point, in bfloat16 where the processor has it: the speed
that integers have to beat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.backends.cpu.attention import pad_attention
from tfmq_fx.backends.cpu.kernels import fast_dtype
from tfmq_fx.backends.inductor import TORCH_OPTIONS, CpuCallable, check_options
from tfmq_fx.backends.inductor import unavailable as no_compiler
from tfmq_fx.backends.support import CPU
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph_pass import Declined, Rewrite, graph_pass
from tfmq_fx.quant.quant_layer import QuantLayer

from .float_layers import DequantizedLayer

OPTIONS = ("artifact", *TORCH_OPTIONS)


def unavailable(device: torch.device = CPU) -> str | None:
    """Why this backend cannot run on `device`, or None where it can."""
    if device.type != "cpu":
        return f"it compiles for cpu, the model is on {device.type}"
    return no_compiler(device)


@graph_pass(takes=(Stage.CAPTURED, Stage.FOLDED, Stage.QUANTIZED), gives=Stage.LOWERED)
def dequantize(gm: fx.GraphModule, *, dtype: torch.dtype) -> Rewrite:
    """The graph whose quantized layers compute in `dtype`, on dequantized weights.

    conv_q(x, s)    ->    conv(x)

    Inputs are not rounded. Every quantized layer is declined.
    """
    name_of = str(dtype).removeprefix("torch.")
    declined = []
    for name, layer in list(gm.named_modules()):
        if isinstance(layer, QuantLayer):
            gm.set_submodule(name, DequantizedLayer(layer, dtype))
            declined.append(Declined(name, f"backend 'float' computes in {name_of}"))
    return Rewrite(gm, len(declined), declined)


def compile_graph(
    gm: fx.GraphModule, *, artifact: str | Path | None = None, **options: Any
) -> tuple[Any, Rewrite]:
    """Compile the graph with products in `fast_dtype()` under autocast; results keep their dtypes.

    artifact: as of inductor; packed weights keep torch from writing much of it.
    options: passed on to torch.compile.
    """
    check_options("float", options, OPTIONS)
    dtype = fast_dtype()
    lowered = dequantize(gm, dtype=dtype)
    path = None if artifact is None else Path(artifact)
    lowered.gm.meta["precision"] = "bf16" if dtype == torch.bfloat16 else "f32"
    pad_attention(lowered.gm)
    compiled = CpuCallable(lowered.gm, options, freezes=True, artifact=path)
    (output,) = gm.graph.find_nodes(op="output")
    outputs: Any = output.args[0]
    dtypes = [node.meta["val"].dtype for node in outputs]

    def run(*inputs: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            results = compiled(*inputs)
        return tuple(y.to(wide) for y, wide in zip(results, dtypes, strict=True))

    return run, lowered
