"""One variant in a process of its own: made on start, called when asked.

Requests and answers are JSON, one a line, on standard input and output; all that is printed
otherwise goes to standard error.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.bench.cpu_models import job
from tests.bench.cpu_timing import forget_peak, kernels, memory_peak, resident
from tests.bench.cpu_variants import REFERENCE, VARIANTS
from tests.bench.cuda_results import reason_of
from tfmq_fx.quant.sqnr import output_sqnr

SETTLING = 0.015  # seconds: what ends a parallel region spins for some of them
_STEADY = 3  # calls in which the peak of memory is taken


def work(variant: str, case: str, **settings: Any) -> Iterator[dict[str, Any]]:
    """Answers: what is known of the variant once it is made, then one for each request sent."""
    imports = resident()
    given = job(case, **settings)
    inputs, folder, make = given.evaluation, given.folder, VARIANTS[variant]
    parameters = sum(p.numel() for p in given.model.parameters())
    made = make(given)
    del given  # the model with it, unless the variant keeps it
    made.call(inputs[0])
    start_seconds = time.perf_counter() - made.since
    outputs = torch.stack([made.call(each).float().clone() for each in inputs])
    if variant == REFERENCE:
        torch.save(outputs, folder / "reference.pt")
    expected = torch.load(folder / "reference.pt")
    quality = output_sqnr(expected, outputs)
    del outputs, expected
    before = max(memory_peak(), made.peak)
    forget_peak()
    for i in range(_STEADY):
        made.call(inputs[i % len(inputs)])
    row = {
        "parameters": parameters,
        "sqnr": _decibels(quality.mean),
        "sqnr_worst_step": _decibels(min(quality.per_step)),
        "imports_bytes": imports,
        "preparing_bytes": before,
        "steady_bytes": memory_peak(),
        "saved_bytes": made.saved,
        "preparing_seconds": round(made.seconds, 1),
        "start_seconds": round(start_seconds, 1),
        "coverage": [round(share, 4) for share in made.coverage],
        "note": made.note,
    }
    asked = yield row
    while asked is not None:
        if "step" in asked:
            asked = yield {"ms": _timed(made.call, inputs, **asked)}
        else:
            count = made.kernels or functools.partial(kernels, lambda: made.call(inputs[0]))
            asked = yield {"kernels": count()}


def _settled() -> float:
    """Processor time once threads have slept off a parallel region, while nobody computes."""
    time.sleep(SETTLING)
    return time.process_time()


def _decibels(value: float) -> float | None:
    """None for the reference itself."""
    return round(value, 2) if math.isfinite(value) else None


def _timed(call: Any, inputs: list[Any], *, step: int, warm: int) -> float:
    """Milliseconds of the call at `step`, after those of the steps before it."""
    for i in range(step - warm, step):
        call(inputs[i % len(inputs)])
    start = time.perf_counter()
    call(inputs[step % len(inputs)])
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    """Serve until standard input ends."""
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    threads = settings["threads"]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # for every library
    torch.set_num_threads(threads)
    settings["folder"] = Path(settings["folder"])
    try:
        serving = work(**settings)
        answer(**next(serving))
        idle = _settled()
        for line in sys.stdin:
            waited = 1000 * (time.process_time() - idle)
            answer(**serving.send(json.loads(line)), idle_ms=round(waited, 2))
            idle = _settled()
    except Exception as error:
        traceback.print_exc()
        answer(failed=reason_of(error))


if __name__ == "__main__":
    main()
