"""Compute the values that depend on a request alone when it begins, and cache them for its steps.

A request has conditions (class label, text) and a schedule of timesteps. Values that depend on
nothing else are computed when either first appears, and read from then on.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.capture.call_spec import CallSpec
from tfmq_fx.conversion.unvisited_timesteps import UnvisitedTimesteps
from tfmq_fx.core.config import PrologueSpec
from tfmq_fx.core.errors import ConfigError, InputError
from tfmq_fx.ir.graph import timestep_node
from tfmq_fx.ir.request_cut import has_lookups, tensors_of
from tfmq_fx.passes.change_timesteps import change_timesteps
from tfmq_fx.passes.split_prologue import Split
from tfmq_fx.serialization.staleness import TensorSnapshot

from .timestep_schedule import Schedule
from .value_cache import CacheEntry, ValueCache
from .weight_offload import Offloaded

# Bounds on the rows cached for one set of conditions where timesteps never repeat. Between them
# the rows take as many bytes as the weights that they replace.
_FEW_ROWS, _MOST_ROWS = 64, 1024
_RESTLESS = 3  # after as many conditions in a row that served one step, rows are computed singly


class Prologue:
    """Computes and caches the inputs of the step graph that a request fixes.

    Safe to call from several threads. Values carry no gradient. Neither the whole graph nor the
    step is kept alive: a backend that has compiled the step does not need them.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        split: Split,
        spec: PrologueSpec,
        call: CallSpec,
        schedule: Schedule | None,
        unvisited: UnvisitedTimesteps,
    ) -> None:
        self._unvisited = unvisited
        self.spec, self.kept, self.declined = spec, split.kept, split.declined
        self._names, self._timestep = call.names, call.timestep
        self.parts = [ValueCache(part, spec) for part in split.parts]
        self._dtype = timestep_node(split.step).meta["val"].dtype
        self.schedule = Schedule(None, self._dtype) if schedule is None else schedule
        self.offloaded = Offloaded(split.freed, spec.offload)
        self._gm, self._step = weakref.ref(gm), weakref.ref(split.step)
        self._weights = _weights(gm, split)
        self._lock = threading.RLock()
        self._snapshot = self._take_snapshot()

    def step_inputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs of the step graph, from the inputs of the whole graph.

        Raises InputError for a timestep outside the schedule where that is an error, and for NaN.
        """
        named = dict(zip(self._names, inputs, strict=True))
        t = named[self._timestep]
        result = [named[name] for name in self.kept]
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._check_weights()
            steps, before = self._steps(t), self._computed()
            for cache in self.parts:
                values = self._values(cache, steps, t, [named[n] for n in cache.part.conditions])
                # the caller may write to outputs, which must not share memory with the cache
                pairs = zip(values, cache.part.returned, strict=True)
                result += [value.clone() if returned else value for value, returned in pairs]
            # Without a schedule, new steps need the weights one after the other.
            if self.schedule or self._computed() == before:
                self._move_weights_away()
        return result

    def set_timesteps(self, timesteps: Any) -> None:
        """Set the schedule of the requests to come.

        timesteps: the source of a `Schedule`.
        Rows of other timesteps are dropped; those of the conditions cached are computed at once.
        Raises InputError, and keeps the earlier schedule, where rows cannot be computed.
        """
        schedule = Schedule(timesteps, self._dtype)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._check_weights()
            self.schedule, before = schedule, self.schedule
            try:
                for cache in self.parts:
                    for entry in cache.entries if cache.part.stepped else ():
                        entry.clear()
                        if entry.is_reproducible:  # else at the next call
                            contents = entry.conditions.contents
                            with entry.autocast():
                                self._fill(cache, entry, schedule.values(), contents)
            except InputError:
                self.schedule = before
                raise
            self._move_weights_away()

    def forget(self) -> None:
        """Drop all values; they are computed again when they are needed."""
        with self._lock:
            for cache in self.parts:
                cache.entries.clear()
            self._snapshot = self._take_snapshot()

    def restore(self) -> None:
        """Move all weights back to the model's device and memory, and drop all values."""
        with self._lock:
            self.offloaded.restore()
            self.forget()

    def nbytes(self) -> int:
        """Bytes of the cached values and conditions."""
        return sum(entry.nbytes() for cache in self.parts for entry in cache.entries)

    def summary(self) -> dict[str, Any]:
        """JSON-ready facts for a report."""
        return {
            "parts": [
                {
                    "conditions": list(cache.part.conditions),
                    "stepped": cache.part.stepped,
                    "values": list(cache.part.names),
                    "bytes": cache.part.step_bytes,
                    "kept": len(cache.entries),
                    "kept_bytes": sum(entry.nbytes() for entry in cache.entries),
                    "interpolated": cache.interpolated,
                }
                for cache in self.parts
            ],
            "freed": list(self.offloaded.tensors),
            "freed_bytes": self.offloaded.nbytes(),
            "offload": self.offloaded.kind,
            "declined": [[d.site, d.reason] for d in self.declined],
        }

    def _values(
        self, cache: ValueCache, steps: list[float] | None, t: Tensor, conditions: list[Tensor]
    ) -> list[Tensor]:
        entry = cache.find(conditions, t)
        if not cache.part.stepped:
            if not len(entry.rows[0]):
                self.offloaded.back()
                entry.store([[value] for value in cache.graph(t, *conditions)])
                cache.computed += 1
            return [rows.row(0) for rows in entry.rows]
        if steps is None:
            self._fill(cache, entry, self.schedule.values(), conditions)
            if not self._mixes(cache, list(entry.index), t, conditions):
                return entry.picked(entry.places(t))
            steps = t.tolist()
        missing = list(dict.fromkeys(s for s in steps if s not in entry.index))
        if missing:
            steps_to_compute = self._steps_to_compute(cache, entry, missing)
            self._fill(cache, entry, [*steps, *steps_to_compute], conditions)
        entry.used.update(steps)
        if len(set(steps)) == 1:
            values = [rows.row(entry.index[steps[0]]) for rows in entry.rows]
            for k, batched in enumerate(cache.part.batched):
                if batched and len(values[k]) != len(t):  # one sample serves all
                    values[k] = values[k].expand(len(t), *values[k].shape[1:]).contiguous()
            return values
        if not self._mixes(cache, steps, t, conditions):
            return entry.picked(torch.tensor([entry.index[s] for s in steps], device=t.device))
        self.offloaded.back()
        return list(cache.graph(t, *conditions))

    def _mixes(
        self, cache: ValueCache, steps: Sequence[float], t: Tensor, conditions: Sequence[Tensor]
    ) -> bool:
        """Whether a batch at several timesteps must be computed; True until it is measured."""
        if cache.mixes is None and len(t) > 1 and len(set(steps)) > 1:
            self.offloaded.back()
            cache.mixes = cache.measure_mixing(min(steps), max(steps), conditions, t)
        return cache.mixes is not False

    def _steps_to_compute(
        self, cache: ValueCache, entry: CacheEntry, missing: list[float]
    ) -> list[float]:
        """The steps to compute now, with the `missing` ones: those of the schedule, too."""
        schedule = self.schedule.values(meeting=missing)
        outside = [step for step in missing if schedule and step not in schedule]
        if outside and self.spec.on_miss == "error":
            raise InputError(
                f"{self._timestep}: {outside[0]} is not among the {len(schedule)} timesteps of the "
                "schedule. Set it with set_timesteps(), or use on_miss='compute'."
            )
        if outside or cache.restless >= _RESTLESS:
            return missing
        if not schedule and not entry.index and len(cache.entries) > 1:
            schedule = sorted(cache.entries[1].used, reverse=True)  # of the request before this one
        return list(dict.fromkeys((*missing, *schedule)))

    def _fill(
        self,
        cache: ValueCache,
        entry: CacheEntry,
        steps: Iterable[float],
        conditions: Sequence[Tensor],
    ) -> None:
        """Compute the values at those of `steps` that the entry lacks."""
        every = list(dict.fromkeys(steps))
        missing = [step for step in every if step not in entry.index]
        if not missing:
            return
        if len(entry.index) + len(missing) > self._room(cache, entry):
            entry.clear()
            missing = every
        self._extend_tables(cache, missing)
        self.offloaded.back()
        values = cache.compute(missing, conditions, entry.like)
        if cache.shared:
            pairs = zip(values, cache.part.batched, strict=True)
            first = [tuple(v[:1] for v in rows) if batched else rows for rows, batched in pairs]
            rows = zip(itertools.chain(*first), itertools.chain(*values), strict=True)
            if all(torch.equal(one.expand_as(row), row) for one, row in rows):
                values = first
            else:  # rows of one batch differ after all, as kernels round
                cache.shared = False
                missing = [*entry.index, *missing]
                entry.clear()
                values = cache.compute(missing, conditions, entry.like)
        entry.store(values)
        for step in missing:
            entry.index[step] = len(entry.index)

    def _room(self, cache: ValueCache, entry: CacheEntry) -> int:
        """The number of rows that an entry may have, at least twice those of the schedule."""
        row = max(1, cache.part.step_bytes * len(entry.like))
        scheduled = 2 * len(self.schedule.values())
        return min(_MOST_ROWS, max(_FEW_ROWS, scheduled, self.offloaded.nbytes() // row))

    def _extend_tables(self, cache: ValueCache, steps: Sequence[float]) -> None:
        """Add rows for `steps` to the tables of the part, with interpolated scales."""
        known = cache.graph.meta.get("timesteps")
        if known is None or not has_lookups(cache.graph):
            return
        held = set(known.tolist())
        new = [step for step in steps if step not in held]
        if not new:
            return
        if self.spec.on_miss == "error" and not self.schedule:
            raise InputError(
                f"{self._timestep}: {new[0]} is not among the {len(known)} timesteps this model "
                "was made for. Set a schedule with set_timesteps(), or use on_miss='compute'."
            )
        if self._unvisited.serves():
            self._unvisited.add(new)
            cache.graph = self._unvisited.on(cache.part.graph)
            cache.interpolated = self._unvisited.interpolated_on(cache.part.graph)
            return
        every = torch.cat([known, known.new_tensor(new)])
        try:
            changed = change_timesteps(cache.part.graph, timesteps=every)
        except ConfigError as error:  # the weights of tabled rows are gone
            raise InputError(f"{self._timestep}: {new[0]}: {error}") from error
        cache.graph = changed.gm
        cache.interpolated = int(changed.details["interpolated"])

    def _steps(self, t: Tensor) -> list[float] | None:
        """The timesteps of a call; None where reading them would wait for a device needlessly."""
        if self.spec.on_miss == "error" and self.schedule and _is_remote(t):
            return None
        steps: list[float] = t.tolist()
        if any(math.isnan(step) for step in steps):
            raise InputError(f"{self._timestep}: NaN is no timestep")
        return steps

    def _take_snapshot(self) -> TensorSnapshot | None:
        """A snapshot of the weights of the whole graph; None where the graph is gone."""
        gm = self._gm()
        return None if gm is None else TensorSnapshot(gm, self._weights)

    def _check_weights(self) -> None:
        """Drop all values where weights were changed or replaced, and have all parts use them."""
        gm, step = self._gm(), self._step()
        if gm is None or (self._snapshot is not None and self._snapshot.compare(gm) == (True, [])):
            return
        self.offloaded.back()
        for graph in (step, *(cache.part.graph for cache in self.parts)):
            if graph is not None:
                _relink(graph, gm)
        self.offloaded.tensors = {n: attrgetter(n)(gm) for n in self.offloaded.tensors}
        self._unvisited.forget()
        for cache in self.parts:
            cache.graph = cache.part.graph
        self.forget()

    def _computed(self) -> int:
        return sum(cache.computed for cache in self.parts)

    def _move_weights_away(self) -> None:
        if self.offloaded.away():
            self._snapshot = self._take_snapshot()


def _weights(gm: fx.GraphModule, split: Split) -> list[str]:
    """The names of tensors that the parts use, or that each graph holds on its own."""
    held = tensors_of(split.step, split.step.graph.find_nodes(op="get_attr"))
    for part in split.parts:
        held |= tensors_of(part.graph, part.graph.graph.nodes)
    every = itertools.chain(
        gm.named_parameters(remove_duplicate=False), gm.named_buffers(remove_duplicate=False)
    )
    return [name for name, tensor in every if id(tensor) in held]


def _relink(graph: fx.GraphModule, gm: fx.GraphModule) -> None:
    """Replace the modules and tensors of `graph` by those that `gm` has now."""
    for node in graph.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            path, _, leaf = str(node.target).rpartition(".")
            setattr(graph.get_submodule(path), leaf, attrgetter(str(node.target))(gm))


def _is_remote(t: Tensor) -> bool:
    return t.device.type != "cpu"
