"""Merge calibration statistics from all processes, with the result of a single-process run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from tfmq_fx.calibration.observers import SampleCache, row_bytes, sample_row
from tfmq_fx.calibration.sampling_pass import SamplingPass
from tfmq_fx.core.config_json import to_dict
from tfmq_fx.core.distributed import exchange, rank, world
from tfmq_fx.serialization.checkpoint import digest

from .models import Prepared


def run_calibration(prepared: Prepared, sampling: SamplingPass) -> None:
    """Calibrate `prepared` by `sampling`.

    With many processes each runs its own batches, and all of them end with the ranges and samples
    of a single-process run, bit for bit.
    """
    if world() == 1:
        sampling.run(prepared)
        return
    merge = _Merge(prepared)
    try:
        sampling.run(prepared, merge)
    finally:
        merge.restore()


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the model. steps: the timestep of each sample.  size: bytes of one sample."""

    steps: list[float]
    size: int
    inputs: tuple[Tensor, ...]
    batched: Sequence[bool]


@dataclass(frozen=True, slots=True)
class _Awaited:
    """A placeholder for sample i of a call in another process, until that process sends it."""

    process: int
    call: int
    i: int


class _CallRecorder(SampleCache):
    """A sample cache that records every call of a round, in order."""

    def __init__(self) -> None:
        super().__init__(capacity=0, seed=0)
        self.calls: list[_Call] = []

    def add(self, inputs: Sequence[Tensor], batched: Sequence[bool], timestep: int) -> None:
        # copies: the caller may overwrite its tensors
        copies = tuple(x.detach().clone() for x in inputs)
        steps = inputs[timestep].tolist()
        self.calls.append(_Call(steps, row_bytes(inputs, batched), copies, batched))


class _Merge:
    """Merges the ranges and samples of all processes; called after each round of batches.

    Every process adds what each of them saw, in the order of the batches; only samples that the
    cache keeps are sent.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared, self._cache, self._recorder = prepared, prepared.cache, _CallRecorder()
        self._observers = prepared.observers()
        self._seen = [observer.seen for observer in self._observers]
        prepared.cache = self._recorder
        self._start_round()

    def _start_round(self) -> None:
        for observer in self._observers:
            observer.seen = {}
        self._recorder.calls = []

    def __call__(self) -> None:
        ranges = [observer.seen for observer in self._observers]
        calls = [(call.steps, call.size) for call in self._recorder.calls]
        rounds = exchange((ranges, calls), "a round of calibration")
        self._restore_ranges()
        for process, (seen, others) in enumerate(rounds):
            for observer, own in zip(self._observers, seen, strict=True):
                observer.merge(own)
            for n, (steps, size) in enumerate(others):
                self._cache.offer(steps, size, partial(_Awaited, process, n))
        self._send_samples()
        self._start_round()

    def _send_samples(self) -> None:
        """Replace the placeholders in the cache by the samples of all processes."""
        columns: Collection[list[Any]] = self._cache.rows.values()
        own = {}
        for row in (row for rows in columns for row in rows):
            if isinstance(row, _Awaited) and row.process == rank():
                call = self._recorder.calls[row.call]
                own[row] = sample_row(call.inputs, call.batched, row.i)
        samples: dict[Any, tuple[Tensor, ...]] = {}
        for part in exchange(own, "samples of calibration"):
            samples |= part
        for rows in columns:
            rows[:] = [samples[row] if isinstance(row, _Awaited) else row for row in rows]

    def _restore_ranges(self) -> None:
        for observer, seen in zip(self._observers, self._seen, strict=True):
            observer.seen = seen

    def restore(self) -> None:
        """Put the model's own cache back, and the ranges merged so far."""
        self._restore_ranges()
        self._prepared.cache = self._cache


def run_settings(prepared: Prepared, **arguments: Any) -> dict[str, Any]:
    """The facts that decide calibration, as plain values that processes can compare by name."""
    tensors = [list(prepared.gm.named_parameters()), list(prepared.gm.named_buffers())]
    return {
        "recipe": to_dict(prepared.recipe),
        "overrides": {name: to_dict(layer) for name, layer in prepared.overrides.items()},
        "model": digest(tensors),
        **{name: _plain(value) for name, value in arguments.items()},
    }


def _plain(value: Any) -> Any:
    """A plain value as it is, the digest of a tensor, the name of any other class."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return digest(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, nn.Module) or not hasattr(value, "config"):
        return type(value).__name__
    config = {k: v for k, v in dict(value.config).items() if not k.startswith("_")}
    return {"kind": type(value).__name__, **_plain(config)}
