"""One model in all its variants, built one after the other and measured side by side."""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tfmq_fx
from tests.bench.cuda_models import (
    CASES,
    Case,
    Inputs,
    Request,
    build,
    calibrated,
    recipe,
    tensor_bytes,
    timesteps,
    tiny,
    torchao_quantized,
)
from tests.bench.cuda_timing import allocated, full_precision, graph_count, milliseconds
from tfmq_fx.capture.nested_values import outline
from tfmq_fx.quant.sqnr import sqnr

BASE = "bf16 compiled"
MAIN = (BASE, "w8a8", "fp8", "w4a8", "w8a8 prologue", "fp8 prologue", "w4a8 prologue")
REST = (
    "bf16 no graphs",
    "bf16 eager",
    "torchao fp8",
    "torchao int8",
    "w8a8 no tables",
    "fp8 no tables",
    "w4a8 no tables",
)
COMPARED = (3, 16)  # steps at which outputs are compared


@dataclass
class Ready:
    """A variant that can be called.

    call: inputs -> first output.  saved: bytes on disk.  shared: bytes on the device that other
    variants use, too.  bound: whether what the conditions fix is computed once.  declined: layers
    that run in floating point, with the reason.
    """

    call: Callable[[Inputs], Tensor]
    saved: int
    shared: int = 0
    note: str = ""
    bound: bool = False
    declined: list[list[str]] = field(default_factory=list)


class Bench:
    """The variants of one case, built one after the other and measured side by side."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        case = CASES[name]
        self.name, self.args = name, args
        self.case: Case = tiny(case) if args.tiny else case
        self.model = build(self.case, args.device, full=not args.tiny)
        self.request = Request(self.case, self.model)
        self.compared = [self.request.inputs(step) for step in COMPARED]
        exact = copy.deepcopy(self.model).float()
        with full_precision():
            self.expected = [_first(exact(**_float(given))).cpu() for given in self.compared]
        self.ready: dict[str, Ready] = {}
        self.rows: dict[str, dict[str, Any]] = {}

    def make(self, variant: str) -> Ready:
        """The variant, compiled at its first call."""
        kind, _, form = variant.partition(" ")
        if kind == "bf16":
            mode = "max-autotune-no-cudagraphs" if form.endswith("no graphs") else self.args.mode
            call = self.model if form == "eager" else self._compiled(self.model, mode)
            size = tensor_bytes(self.model)
            return Ready(_caller(call, self.args.device), size, shared=size)
        if kind == "torchao":
            made, count = torchao_quantized(self.model, form, self.request)
            call = self._compiled(made, self.args.mode)
            return Ready(_caller(call, self.args.device), 0, note=f"{count} linear layers")
        return self._ours(kind, form)

    @functools.cached_property
    def prepared(self) -> tfmq_fx.Prepared:
        """The model calibrated, for all recipes."""
        return calibrated(self.case, self.model, self.request)

    def _ours(self, preset: str, form: str) -> Ready:
        start = time.perf_counter()
        self.prepared.recipe = recipe(preset, tables=form != "no tables")
        made = tfmq_fx.convert(self.prepared, progress=False)
        if form == "prologue":
            away: Any = "none" if self.args.device == "cpu" else "cpu"
            made = tfmq_fx.bind_request(made, offload=away, on_miss="error")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model")
            tfmq_fx.save(made, path)
            saved = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            del made
            loaded = tfmq_fx.load(path).to(self.args.device)
        seconds = time.perf_counter() - start
        if isinstance(loaded, tfmq_fx.Bound):
            loaded.set_timesteps(timesteps(self.case))
        backend = "eager" if self.args.tiny else "inductor"
        options = {} if self.args.tiny else {"mode": self.args.mode}
        compiled = tfmq_fx.compile(loaded, backend, **options)
        note = f"quantized in {seconds:.0f} s, {compiled.lowered} on kernels"
        if compiled.declined:
            note += f", {len(compiled.declined)} not"
        bound = form == "prologue"
        call = _caller(compiled, self.args.device)
        return Ready(call, saved, note=note, bound=bound, declined=compiled.declined)

    def _compiled(self, model: nn.Module, mode: str) -> Any:
        if self.args.tiny:
            return torch.compile(model, backend="eager", fullgraph=True)
        return torch.compile(model, mode=mode, fullgraph=True)

    def add(self, variant: str) -> None:
        """Build a variant, call it, and note what it takes and how near it comes."""
        device = self.args.device
        before = allocated(device)
        start = time.perf_counter()
        made = self.make(variant)
        made.call(self.compared[0])
        if device == "cuda":  # what the second call records as a graph counts, compiling does not
            allocated(device)
            torch.cuda.reset_peak_memory_stats()
        found = [made.call(given).float().cpu() for given in self.compared]
        row: dict[str, Any] = {
            "case": self.name,
            "variant": variant,
            "build_seconds": round(time.perf_counter() - start, 1),
            "saved_bytes": made.saved,
            "note": made.note,
            "declined": made.declined,
            "sqnr": round(sqnr(torch.stack(self.expected), torch.stack(found)), 1),
        }
        if device == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - before + made.shared
            row["resident_bytes"] = allocated(device) - before + made.shared
        if made.bound:
            self.request.new_conditions()
            call = functools.partial(made.call, self.request.inputs(0))
            row["request_ms"] = milliseconds(call, device)
            row["note"] += f", a request begins in {row['request_ms']:.0f} ms"
        self.ready[variant], self.rows[variant] = made, row

    def drop(self, variant: str) -> None:
        """Forget a variant."""
        self.ready.pop(variant, None)
        self.rows.pop(variant, None)

    def measure(self, repeats: int) -> None:
        """Time all variants in turn on the same inputs, fresh for each turn, and set their rows."""
        times: dict[str, list[float]] = {name: [] for name in self.ready}
        graphs = graph_count()
        names = list(self.ready)
        for i in range(-1, repeats):  # the first turn meets the new request
            given = self.request.inputs()
            for name in names[i % len(names) :] + names[: i % len(names)]:
                call = functools.partial(self.ready[name].call, given)
                taken = milliseconds(call, self.args.device)
                if i >= 0:
                    times[name].append(taken)
        for name, values in times.items():
            low, _, high = statistics.quantiles(values, n=4)
            self.rows[name] |= {
                "ms": round(statistics.median(values), 3),
                "middle_half": [round(low, 3), round(high, 3)],
                "base_ms": round(statistics.median(times[BASE]), 3) if BASE in times else None,
                "repeats": repeats,
                "recompiled": graph_count() - graphs,
            }


def _caller(model: Callable[..., Any], device: str) -> Callable[[Inputs], Tensor]:
    def call(given: Inputs) -> Tensor:
        if device == "cuda":  # or graphs would be recorded for every order of the variants
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return _first(model(**given))

    return call


def _first(output: Any) -> Tensor:
    found: Tensor = outline(output)[1][0][1]
    return found


def _float(value: Any) -> Any:
    """The same inputs in float32."""
    if isinstance(value, dict):
        return {key: _float(inner) for key, inner in value.items()}
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
