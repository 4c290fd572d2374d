"""Measure or estimate the time of one layer on integers and in floating point, before lowering."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from tfmq_fx.backends.codes.choice import Chooser
from tfmq_fx.backends.codes.layers import problem_at
from tfmq_fx.ir.layer_edits import groups_of
from tfmq_fx.ir.node_info import size_hint
from tfmq_fx.quant.modules import QuantConvTranspose
from tfmq_fx.quant.quant_layer import QuantLayer

from .support import obstacle

_RATE = 2e5  # multiply-adds a microsecond in floating point, where nothing can be timed
_SPEEDUP = 2.0  # of integers, likewise


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Microseconds of all calls of a layer in one call of the model.

    integer: of the quantized layer, in floating point where no integer kernel runs it.
    measured: whether both were timed; else they are estimated from multiply-adds.
    """

    integer: float
    floating: float
    measured: bool


def chooser(device: torch.device) -> Chooser | None:
    """The chooser that times kernels on a device; None where nothing can be timed."""
    if device.type == "cpu":
        from .cpu.autotune import timed_chooser

        return timed_chooser()
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from .cuda.autotune import timed_chooser as by_trial_on_cuda

        return by_trial_on_cuda(device)
    return None


def layer_time(layer: QuantLayer, nodes: Sequence[fx.Node], choose: Chooser | None) -> LayerTime:
    """The time of a layer called by `nodes`, at the sizes of the example it was captured with."""
    calls = [_call_time(layer, node, choose) for node in nodes]
    return LayerTime(
        sum(call.integer for call in calls),
        sum(call.floating for call in calls),
        all(call.measured for call in calls),
    )


def _call_time(layer: QuantLayer, node: fx.Node, choose: Chooser | None) -> LayerTime:
    lacking = obstacle(layer) is not None
    micros: dict[str, float] = {}
    known = (
        not isinstance(layer, QuantConvTranspose)
        and len(layer.weight_shape) in (2, 4)
        and groups_of(layer) == 1
    )
    if choose is not None and known:
        micros = dict(choose(problem_at(layer, node), node.meta["val"].dtype).micros)
    kernels = [taken for name, taken in micros.items() if name != "float"]
    if "float" in micros and (kernels or lacking):
        floating = micros["float"]
        return LayerTime(floating if lacking else min(kernels), floating, True)
    out = torch.Size([size_hint(size) for size in node.meta["val"].shape]).numel()
    floating = out * torch.Size(layer.weight_shape[1:]).numel() / _RATE
    return LayerTime(floating if lacking else floating / _SPEEDUP, floating, False)
