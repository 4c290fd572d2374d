"""OpenVINO as it comes: in float32, in bfloat16, and in int8 by NNCF."""

from __future__ import annotations

import functools
import re
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from tests.bench.cpu_models import Job, Made, exported
from tests.bench.cuda_models import Inputs

VARIANTS: dict[str, dict[str, str]] = {
    "openvino fp32": {},
    "openvino bf16": {"precision": "bf16"},
    "nncf int8": {"preset": "performance"},
    "nncf int8 bf16": {"preset": "performance", "precision": "bf16"},
    "nncf int8 transformer": {"preset": "transformer"},
    "nncf int8 transformer bf16": {"preset": "transformer", "precision": "bf16"},
}
"""precision: of what is not int8; OpenVINO's own choice on CPUs with bf16 instructions is bf16."""
_COUNTED = re.compile("Convolution|FullyConnected|MatMul")


def make(job: Job, *, precision: str = "f32", preset: str | None = None) -> Made:
    """The model converted, quantized if there is a preset, saved, and compiled from its file."""
    import openvino

    start = time.perf_counter()
    model = openvino.convert_model(exported(job))
    if preset is not None:
        model = _quantized(model, job, preset)
    path = job.folder / f"{preset}-{precision}.xml"
    # halves of weights are what is saved by default
    openvino.save_model(model, path, compress_to_fp16=precision == "bf16")
    del model
    since = time.perf_counter()
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": job.threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(path, "CPU", options)
    request = compiled.create_infer_request()

    def call(given: Inputs) -> Tensor:
        inputs = [value.numpy() for value in given.values()]
        found = request.infer(inputs, share_inputs=True, share_outputs=True)
        return torch.from_numpy(found[0])

    saved = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    count = functools.partial(integer_kernels, compiled)
    return Made(call=call, saved=saved, seconds=since - start, since=since, kernels=count)


def _quantized(model: Any, job: Job, preset: str) -> Any:
    import nncf

    batches = [[value.numpy() for value in given.values()] for given in job.calibration]
    options: dict[str, Any] = {"preset": nncf.QuantizationPreset.PERFORMANCE}
    if preset == "transformer":
        options = {"model_type": nncf.ModelType.TRANSFORMER}
    return nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches), **options)


def integer_kernels(compiled: Any) -> dict[str, int]:
    """Convolutions and products by the precision that they run in."""
    found: Counter[str] = Counter()
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        kind, precision = (_text(info, key) for key in ("layerType", "runtimePrecision"))
        if _COUNTED.search(kind) and precision in ("i8", "u8"):
            found[f"{kind} {precision}"] += 1
    return dict(found)


def _text(info: Any, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""
