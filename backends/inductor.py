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
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from tfmq_fx.backends import CPU
from tfmq_fx.graph import Rewrite, device_of


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
        from tfmq_fx.backends.cpu import kernels
        from tfmq_fx.backends.cpu.lower import lower, untried

        if kernels.unavailable() is None:
            kernels.load()
        lowered = lower(gm, choose=untried)
        return FrozenCallable(lowered.gm, options), lowered
    from tfmq_fx.backends.cuda.lower import lower as lower_for_cuda
    from tfmq_fx.backends.cuda.trial import by_trial

    capability = torch.cuda.get_device_capability(device)
    lowered = lower_for_cuda(gm, choose=by_trial(device), capability=capability)
    return CudaCallable(lowered.gm, options), lowered
