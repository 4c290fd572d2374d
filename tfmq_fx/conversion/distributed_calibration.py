"""What several processes saw of a model, put together as one of them would have seen it alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from tfmq_fx.calibration.observers import RangeObserver, SampleCache, row_bytes, sample_row
from tfmq_fx.calibration.sampling_pass import SamplingPass
from tfmq_fx.core.config_json import to_dict
from tfmq_fx.core.distributed import exchange, rank, world
from tfmq_fx.serialization.checkpoint import digest

from .models import Prepared


def run_calibration(prepared: Prepared, sampling: SamplingPass) -> None:
    """Have `prepared` see what `sampling` shows it; where there are many processes, each runs its
    own batches, and all of them end with the ranges and samples of one process, bit for bit."""
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
    """Stands for sample i of a call that a process made, until that process hands it over."""

    process: int
    call: int
    i: int


class _Calls(SampleCache):
    """In the place of a sample cache: every call, in order."""

    def __init__(self) -> None:
        super().__init__(capacity=0, seed=0)
        self.made: list[_Call] = []

    def add(self, inputs: Sequence[Tensor], batched: Sequence[bool], timestep: int) -> None:
        # copies: the caller may overwrite what it gave
        kept = tuple(x.detach().clone() for x in inputs)
        steps = inputs[timestep].tolist()
        self.made.append(_Call(steps, row_bytes(inputs, batched), kept, batched))


class _Merge:
    """Called after each round of batches. Every process then counts in what each of them saw, in
    the order of the batches; only samples that the cache keeps are handed round."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared, self._cache, self._calls = prepared, prepared.cache, _Calls()
        found = prepared.observed.modules()
        self._observers = [m for m in found if isinstance(m, RangeObserver)]
        self._seen = [observer.seen for observer in self._observers]
        prepared.cache = self._calls
        self._look_anew()

    def _look_anew(self) -> None:
        for observer in self._observers:
            observer.seen = {}
        self._calls.made = []

    def __call__(self) -> None:
        ranges = [observer.seen for observer in self._observers]
        calls = [(call.steps, call.size) for call in self._calls.made]
        found = exchange((ranges, calls), "a round of calibration")
        self._restore_ranges()
        for process, (seen, made) in enumerate(found):
            for observer, own in zip(self._observers, seen, strict=True):
                observer.merge(own)
            for n, (steps, size) in enumerate(made):
                self._cache.offer(steps, size, partial(_Awaited, process, n))
        self._hand_over()
        self._look_anew()

    def _hand_over(self) -> None:
        kept: Collection[list[Any]] = self._cache.rows.values()
        made = {}
        for row in (row for rows in kept for row in rows):
            if isinstance(row, _Awaited) and row.process == rank():
                call = self._calls.made[row.call]
                made[row] = sample_row(call.inputs, call.batched, row.i)
        found: dict[Any, tuple[Tensor, ...]] = {}
        for part in exchange(made, "samples of calibration"):
            found |= part
        for rows in kept:
            rows[:] = [found[row] if isinstance(row, _Awaited) else row for row in rows]

    def _restore_ranges(self) -> None:
        for observer, seen in zip(self._observers, self._seen, strict=True):
            observer.seen = seen

    def restore(self) -> None:
        """Put the model's own cache back, and the ranges merged so far."""
        self._restore_ranges()
        self._prepared.cache = self._cache


def run_settings(prepared: Prepared, **arguments: Any) -> dict[str, Any]:
    """What decides about calibration, as plain values that processes can compare by name."""
    tensors = [list(prepared.gm.named_parameters()), list(prepared.gm.named_buffers())]
    overrides = {name: to_dict(layer) for name, layer in prepared.overrides.items()}
    return {
        "recipe": to_dict(prepared.recipe),
        "overrides": overrides,
        "model": digest(tensors),
        **{name: _plain(value) for name, value in arguments.items()},
    }


def _plain(value: Any) -> Any:
    """A value where it is plain, the digest of a tensor, else what kind of thing it is."""
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
