"""Lower a graph to OpenVINO on the CPU, quantized layers to its int8 kernels.

lower -> torch.export -> openvino.Model (once), then compiled for each set of input shapes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import fx, nn

from tfmq_fx.backends.cpu.kernels import limited
from tfmq_fx.backends.float_layers import FloatLayer
from tfmq_fx.backends.saturation import openvino_is_exact, saturates
from tfmq_fx.backends.support import CPU
from tfmq_fx.core.errors import BackendError, ConfigError
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph import opaque_modules
from tfmq_fx.ir.graph_pass import Declined, Rewrite, graph_pass
from tfmq_fx.quant.modules import QuantLinear
from tfmq_fx.quant.quant_layer import QuantLayer

from .layers import ChannelsLastNorm, CompressedLinear, IntegerLayer, float_reason
from .model import OpenVINOCallable

Precision = Literal["auto", "f32", "bf16"]
OPTIONS = ("precision", "threads", "cache_dir")


def unavailable(device: torch.device = CPU) -> str | None:
    """Why this machine cannot compile for `device`, or None where it can."""
    if device.type != "cpu":
        return f"it runs on cpu, the model is on {device.type}"
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed (pip install 'tfmq-fx[openvino]')"
    return None


@graph_pass(takes=(Stage.CAPTURED, Stage.FOLDED, Stage.QUANTIZED), gives=Stage.LOWERED)
def lower(gm: fx.GraphModule, *, half: bool = False) -> Rewrite:
    """The graph with every quantized layer written for OpenVINO.

    Layers that compute in floating point are declined with the reason; linear ones among these keep
    int8 weights.

    half: whether what is not int8 will be computed in bf16; group norms are rewritten otherwise.
    """
    declined, integer, weight_only, norms = [], 0, [], 0
    for name, layer in list(gm.named_modules()):
        if type(layer) is nn.GroupNorm and not half:
            gm.set_submodule(name, ChannelsLastNorm(layer))
            norms += 1
        if not isinstance(layer, QuantLayer):
            continue
        reason = float_reason(layer) or saturates(layer, "OpenVINO", openvino_is_exact)
        lowered: nn.Module
        if reason is None:
            lowered = IntegerLayer(layer)
            integer += 1
        elif isinstance(layer, QuantLinear) and layer.weight_format == "int":
            lowered = CompressedLinear(layer)
            weight_only.append(name)
            if layer.act_bits is not None:
                declined.append(Declined(name, f"computes in floating point: {reason}"))
        else:
            lowered = FloatLayer(layer)
            declined.append(Declined(name, f"runs in floating point: {reason}"))
        gm.set_submodule(name, lowered)
    details = {"integer": integer, "weight_only": weight_only, "norms": norms}
    return Rewrite(gm, integer + len(weight_only) + norms, declined, details)


def compile_graph(
    gm: fx.GraphModule,
    *,
    precision: Precision = "auto",
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    **unknown: Any,
) -> tuple[OpenVINOCallable, Rewrite]:
    """Compile a quantized graph; returns a callable and how the graph was lowered.

    precision: of what is not int8; "auto" is bf16 where the CPU computes in it, but f32 for models
    with group norms, which are faster so (see `ChannelsLastNorm`); "bf16" is f32 where the CPU
    does not.  threads: left out, as many as
    torch uses.  cache_dir: where OpenVINO keeps compiled models for the next start; they are code,
    so a folder of your own.
    The first call raises BackendError naming the operations that OpenVINO does not have, if any.
    """
    if unknown:
        raise ConfigError(
            f"backend 'openvino' has no option {', '.join(unknown)}; it takes {', '.join(OPTIONS)}"
        )
    if opaque := [*opaque_modules(gm)]:
        raise BackendError(
            f"backend 'openvino': {opaque[0]} runs as the model's own code, which OpenVINO cannot "
            f"take. Use backend='inductor' or 'eager'."
        )
    if precision not in get_args(Precision):
        raise ConfigError(f"precision={precision!r}; choose from {', '.join(get_args(Precision))}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads={threads}; at least 1 is needed")
    if precision == "auto":
        norms = any(type(module) is nn.GroupNorm for module in gm.modules())
        precision = "f32" if norms else "bf16"
    if not _computes_bf16():
        precision = "f32"
    lowered = lower(gm, half=precision == "bf16")
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        # by itself it rounds the inputs of layers whose weights are int8 in floating point
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_PRECISION_HINT": precision,
    }
    if cache_dir is not None:
        settings["CACHE_DIR"] = str(cache_dir)
    lowered.gm.meta["precision"] = precision
    return OpenVINOCallable(lowered.gm, settings), lowered


def _computes_bf16() -> bool:
    import openvino

    if limited():  # OpenVINO takes no notice of the limit, and fails where its kernels do
        return False
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
