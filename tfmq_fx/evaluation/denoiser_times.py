"""Time a quantized denoiser against its original, compiled in bfloat16 and in float32."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tfmq_fx import api
from tfmq_fx.calibration.scheduler_steps import prediction
from tfmq_fx.conversion.models import Converted
from tfmq_fx.core.errors import BackendError
from tfmq_fx.core.progress import progress_bar
from tfmq_fx.quant.sqnr import sqnr

_WARMUPS = 2
BASELINES = {"torch.compile bf16": torch.bfloat16, "torch.compile fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of one way to run a denoiser: the median, and the middle half of the calls.

    failed: why it does not run here; the numbers are then nan.
    """

    name: str
    median: float
    low: float
    high: float
    failed: str | None = None


def denoiser_times(
    model: Converted,
    reference: nn.Module,
    inputs: Mapping[str, Any],
    *,
    rounds: int,
    backend: str = "auto",
    progress: bool = True,
) -> tuple[list[Times], Tensor]:
    """The times of one call, ours first, then the baselines; and the output of ours.

    reference: the original, of which copies are compiled, frozen and channels last on the CPU.
    inputs: arguments of a call by name.  rounds: calls of each that are timed, in turn, so that all
    see the same machine; two of each before them are not.
    """
    compiled = api.compile(model, backend)
    calls: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    calls[f"tfmq_fx {model.recipe.name}, {compiled.backend}"] = lambda: compiled(**inputs)
    for name, dtype in BASELINES.items():
        try:
            calls[name] = _baseline(reference, inputs, dtype)
        except Exception as error:  # torch.compile fails in many ways
            failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if len(failed) == len(BASELINES):
        raise BackendError(f"no baseline can be compiled here: {next(iter(failed.values()))}")
    spans: dict[str, list[float]] = {name: [] for name in calls}
    for i in progress_bar(range(rounds + _WARMUPS), "calls", enabled=progress):
        for name, call in calls.items():
            begun = time.perf_counter()
            with torch.no_grad():
                call()
            _wait(reference)
            if i >= _WARMUPS:
                spans[name].append(1000 * (time.perf_counter() - begun))
    rows = [_row(name, found) for name, found in spans.items()]
    nan = float("nan")
    with torch.no_grad():
        output = prediction(compiled(**inputs))
    return rows + [Times(name, nan, nan, nan, why) for name, why in failed.items()], output


def output_sqnr(reference: nn.Module, inputs: Mapping[str, Any], output: Tensor) -> float:
    """The SQNR in dB of `output` to the reference's at the same inputs."""
    with torch.no_grad():
        return sqnr(prediction(reference(**inputs)), output)


def _baseline(
    reference: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype
) -> Callable[[], Any]:
    """A call of a compiled copy of the original in `dtype`, compiled already."""
    cpu = next(reference.parameters()).device.type == "cpu"
    own = copy.deepcopy(reference).to(dtype=dtype)
    if any(parameter.dim() == 4 for parameter in own.parameters()):  # convolutions gain from it
        own = own.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    given = tree_map_only(Tensor, cast, dict(inputs))
    run = torch.compile(own)
    frozen: Any = contextlib.nullcontext()
    if cpu:
        frozen = torch._inductor.config.patch(freezing=True)
    with frozen, torch.no_grad():
        run(**given)
    return lambda: run(**given)


def _wait(reference: nn.Module) -> None:
    if next(reference.parameters()).device.type == "cuda":
        torch.cuda.synchronize()


def _row(name: str, spans: list[float]) -> Times:
    low, median, high = statistics.quantiles(spans, n=4) if len(spans) > 1 else 3 * spans
    return Times(name, median, low, high)
