"""What runs a denoiser on the CPU: torch.compile, PT2E, torchao, and this package's backends."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import operator
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tfmq_fx
from tests.bench import cpu_openvino
from tests.bench.cpu_models import Job, Made, exported, first, nearest
from tests.bench.cpu_timing import memory_peak
from tests.bench.cuda_models import Inputs, tensor_bytes


def floating(job: Job, *, compiled: bool, frozen: bool = False, half: str = "") -> Made:
    """The model itself. half: "model" has it in bfloat16, "autocast" the operations alone."""
    since = time.perf_counter()
    torch._inductor.config.freezing = frozen
    dtype = torch.bfloat16 if half == "model" else torch.float32
    model = job.model.to(dtype=dtype, memory_format=torch.channels_last)  # the faster for all
    run: Any = torch.compile(model) if compiled else model
    autocast: Any = contextlib.nullcontext
    if half == "autocast":
        autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)

    def call(given: Inputs) -> Tensor:
        with torch.no_grad(), autocast():
            return first(run(**_cast(given, dtype), return_dict=False))

    return Made(call=call, saved=tensor_bytes(model), since=since)


def _cast(given: Inputs, dtype: torch.dtype) -> Inputs:
    if dtype == torch.float32:
        return given
    # times of flow models are floats below 1: bfloat16 keeps 8 bits of them, in the model too
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}


def pt2e(job: Job) -> Made:
    """PyTorch's own static quantization for x86: convolutions and linear layers in int8."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    start = time.perf_counter()
    spec = x86.get_default_x86_inductor_quantization_config()
    quantizer = x86.X86InductorQuantizer()
    for kind in (nn.Conv2d, nn.Linear):  # observers of all else choke on integer timesteps
        quantizer.set_module_type_qconfig(kind, spec)
    prepared = prepare_pt2e(exported(job).module(check_guards=False), quantizer)
    with torch.no_grad():
        for given in job.calibration:
            prepared(*given.values())
    converted = move_exported_model_to_eval(convert_pt2e(prepared))
    seconds = time.perf_counter() - start
    # its state, which torch.export.save writes, has the float weights, too
    read = {node.target for node in converted.graph.find_nodes(op="get_attr")}
    saved = sum(operator.attrgetter(name)(converted).nbytes for name in read)
    since = time.perf_counter()
    torch._inductor.config.freezing = True
    compiled = torch.compile(converted)

    def call(given: Inputs) -> Tensor:
        with torch.no_grad():
            return first(compiled(*given.values()))

    return Made(call=call, saved=saved, seconds=seconds, since=since)


def torchao_dynamic(job: Job, *, frozen: bool = False) -> Made:
    """torchao's int8 linear layers whose input ranges are measured at run time."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    start = time.perf_counter()
    quantize_(job.model, Int8DynamicActivationInt8WeightConfig())
    seconds = time.perf_counter() - start
    saved = stored_bytes(job, job.model)
    linear = sum(isinstance(m, nn.Linear) for m in job.model.modules())
    made = floating(job, compiled=True, frozen=frozen)
    note = f"{linear} linear layers, no convolution"
    return dataclasses.replace(made, saved=saved, seconds=seconds, note=note)


def stored_bytes(job: Job, model: nn.Module) -> int:
    """Bytes of the file that torch.save makes of the state of `model`."""
    path = job.folder / "state.pt"
    torch.save(model.state_dict(), path)
    size = path.stat().st_size
    path.unlink()
    return size


def folder_bytes(path: Path) -> int:
    """Bytes of all files in a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def ours(job: Job, *, bits: str, backend: str) -> Made:
    """This package: quantized, saved, loaded and compiled; the saved model serves all backends."""
    path = job.folder / f"tfmq_fx-{bits}"
    record = job.folder / f"tfmq_fx-{bits}.json"
    if not record.exists():
        start = time.perf_counter()
        config = tfmq_fx.PRESETS[bits]
        prepared = tfmq_fx.prepare(
            job.model,
            job.calibration[0],
            timesteps=job.timesteps,
            config=config if job.recipe == "full" else nearest(config),
        )
        tfmq_fx.calibrate(prepared, job.calibration, progress=False)
        converted = tfmq_fx.convert(prepared, progress=False)
        report = tfmq_fx.report(converted)
        tfmq_fx.save(converted, path)
        found = {
            "seconds": time.perf_counter() - start,
            "peak": memory_peak(),
            "coverage": [report.weight_coverage, report.activation_coverage],
        }
        record.write_text(json.dumps(found))
    known = json.loads(record.read_text())
    since = time.perf_counter()
    loaded = tfmq_fx.load(path)
    compiled = tfmq_fx.compile(loaded, backend)
    note = f"{compiled.lowered} layers on kernels, {len(compiled.declined)} not"
    if backend == "auto":
        note = f"{compiled.backend}; {note}"

    def call(given: Inputs) -> Tensor:
        with torch.no_grad():
            return first(compiled(**given))

    count = None
    if compiled.backend == "openvino":
        count = functools.partial(_kernels_of, compiled)
    saved = folder_bytes(path)
    return Made(call=call, saved=saved, note=note, since=since, kernels=count, **known)


def _kernels_of(compiled: tfmq_fx.Compiled) -> dict[str, int]:
    ((request, _),) = compiled.runner.compiled.values()  # for one set of shapes
    return cpu_openvino.integer_kernels(request.get_compiled_model())


_COMPILED = functools.partial(floating, compiled=True)
VARIANTS: dict[str, Callable[[Job], Made]] = {
    "eager fp32": functools.partial(floating, compiled=False),
    "compile fp32": _COMPILED,
    "compile fp32 frozen": functools.partial(_COMPILED, frozen=True),
    "compile bf16": functools.partial(_COMPILED, half="model"),
    "compile bf16 frozen": functools.partial(_COMPILED, half="model", frozen=True),
    "autocast bf16": functools.partial(_COMPILED, half="autocast"),
    "autocast bf16 frozen": functools.partial(_COMPILED, half="autocast", frozen=True),
    "pt2e int8": pt2e,
    "torchao int8": torchao_dynamic,
    "torchao int8 frozen": functools.partial(torchao_dynamic, frozen=True),
    **{
        name: functools.partial(cpu_openvino.make, **options)
        for name, options in cpu_openvino.VARIANTS.items()
    },
    **{
        f"tfmq_fx {bits} {backend}": functools.partial(ours, bits=bits, backend=backend)
        for bits in ("w8a8", "w4a8")
        for backend in ("inductor", "openvino", "auto")
    },
}
REFERENCE = "eager fp32"
FP32 = [name for name in VARIANTS if name.startswith("compile fp32")]
BF16 = [name for name in VARIANTS if name.startswith(("compile bf16", "autocast bf16"))]
