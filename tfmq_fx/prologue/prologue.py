"""What is computed when a request begins, kept for its steps, and never stale.

A request brings conditions (class label, text) and a schedule of timesteps. The values that depend
on them alone are computed when either first appears, and read from then on.
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

# Rows kept for one condition where timesteps never repeat: so many that they take no more bytes
# than the weights that they stand for, within these bounds.
_FEW_ROWS, _MOST_ROWS = 64, 1024
_RESTLESS = 3  # conditions in a row that served one step each: then rows are made one by one


class Prologue:
    """The values that a request fixes, for the step of a split graph.

    Safe to call from several threads. Values carry no gradient.
    Neither the whole graph nor the step is kept alive: a backend that has written the step in its
    own form does without.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        split: Split,
        spec: PrologueSpec,
        *,
        names: Sequence[str],
        timestep: str,
        schedule: Schedule | None = None,
    ) -> None:
        self.spec, self.kept, self.declined = spec, split.kept, split.declined
        self._names, self._timestep = tuple(names), timestep
        self.parts = [ValueCache(part, spec) for part in split.parts]
        self._dtype = timestep_node(split.step).meta["val"].dtype
        self.schedule = Schedule(None, self._dtype) if schedule is None else schedule
        self.offloaded = Offloaded(split.freed, spec.offload)
        self._gm, self._step = weakref.ref(gm), weakref.ref(split.step)
        self._weights = _weights(gm, split)
        self._lock = threading.RLock()
        self._sighting = self._look()

    def step_inputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What the step takes, from what the whole graph takes.

        Raises InputError for a timestep outside the schedule where that is an error, and for NaN.
        """
        given = dict(zip(self._names, inputs, strict=True))
        t = given[self._timestep]
        found = [given[name] for name in self.kept]
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._check_weights()
            steps, before = self._steps(t), self._computed()
            for kept in self.parts:
                values = self._values(kept, steps, t, [given[n] for n in kept.part.conditions])
                # what the caller gets to hold must not be what is kept
                pairs = zip(values, kept.part.returned, strict=True)
                found += [value.clone() if returned else value for value, returned in pairs]
            # Without a schedule, steps that are new ask for the weights one after the other.
            if self.schedule or self._computed() == before:
                self._settle()
        return found

    def set_timesteps(self, timesteps: Any) -> None:
        """The schedule of the requests to come.

        timesteps: an int N (0 to N - 1), a tensor (K,) or sequence of values as the model receives
        them, a scheduler, which is followed when it is set anew, or None for whatever comes.
        Rows of other timesteps are dropped; those of the conditions kept are computed at once.
        Raises InputError, and stays with the schedule of before, where rows cannot be computed.
        """
        schedule = Schedule(timesteps, self._dtype)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._check_weights()
            self.schedule, before = schedule, self.schedule
            try:
                for kept in self.parts:
                    for entry in kept.entries if kept.part.stepped else ():
                        entry.clear()
                        if entry.is_reproducible:  # else at the next call
                            given = entry.conditions.contents
                            with entry.autocast():
                                self._fill(kept, entry, schedule.values(), given)
            except InputError:
                self.schedule = before
                raise
            self._settle()

    def forget(self) -> None:
        """Drop all values; they are computed again when they are needed."""
        with self._lock:
            for kept in self.parts:
                kept.entries.clear()
            self._sighting = self._look()

    def restore(self) -> None:
        """Have all weights on the model's device and in memory, and drop all values."""
        with self._lock:
            self.offloaded.restore()
            self.forget()

    def nbytes(self) -> int:
        """Bytes of the values kept, of all conditions, and of the conditions."""
        return sum(entry.nbytes() for kept in self.parts for entry in kept.entries)

    def summary(self) -> dict[str, Any]:
        """JSON-ready facts for a report."""
        return {
            "parts": [
                {
                    "conditions": list(kept.part.conditions),
                    "stepped": kept.part.stepped,
                    "values": list(kept.part.names),
                    "bytes": kept.part.step_bytes,
                    "kept": len(kept.entries),
                    "kept_bytes": sum(entry.nbytes() for entry in kept.entries),
                    "interpolated": kept.interpolated,
                }
                for kept in self.parts
            ],
            "freed": list(self.offloaded.tensors),
            "freed_bytes": self.offloaded.nbytes(),
            "offload": self.offloaded.kind,
            "declined": [[d.site, d.reason] for d in self.declined],
        }

    def _values(
        self, kept: ValueCache, steps: list[float] | None, t: Tensor, given: list[Tensor]
    ) -> list[Tensor]:
        entry = kept.find(given, t)
        if not kept.part.stepped:
            if not len(entry.rows[0]):
                self.offloaded.back()
                entry.store([[value] for value in kept.graph(t, *given)])
                kept.computed += 1
            return [rows.row(0) for rows in entry.rows]
        if steps is None:
            self._fill(kept, entry, self.schedule.values(), given)
            if not self._mixes(kept, list(entry.index), t, given):
                return entry.picked(entry.places(t))
            steps = t.tolist()
        missing = list(dict.fromkeys(s for s in steps if s not in entry.index))
        if missing:
            self._fill(kept, entry, [*steps, *self._wanted(kept, entry, missing)], given)
        entry.used.update(steps)
        if len(set(steps)) == 1:
            return [
                value.expand(len(t), *value.shape[1:]).contiguous()
                if batched and len(value) != len(t)
                else value
                for rows, batched in zip(entry.rows, kept.part.batched, strict=True)
                for value in [rows.row(entry.index[steps[0]])]
            ]
        if not self._mixes(kept, steps, t, given):
            return entry.picked(torch.tensor([entry.index[s] for s in steps], device=t.device))
        self.offloaded.back()
        return list(kept.graph(t, *given))

    def _mixes(
        self, kept: ValueCache, steps: Sequence[float], t: Tensor, given: Sequence[Tensor]
    ) -> bool:
        """Whether a batch at several timesteps must be computed; yes as long as it is not known."""
        if kept.mixes is None and len(t) > 1 and len(set(steps)) > 1:
            self.offloaded.back()
            kept.mixing(min(steps), max(steps), given, t)
        return kept.mixes is not False

    def _wanted(self, kept: ValueCache, entry: CacheEntry, missing: list[float]) -> list[float]:
        """The steps to compute now that `missing` ones are asked for."""
        schedule = self.schedule.values(meeting=missing)
        outside = [step for step in missing if schedule and step not in schedule]
        if outside and self.spec.on_miss == "error":
            raise InputError(
                f"{self._timestep}: {outside[0]} is not among the {len(schedule)} timesteps of the "
                "schedule. Set it with set_timesteps(), or use on_miss='compute'."
            )
        if outside or kept.restless >= _RESTLESS:
            return missing
        if not schedule and not entry.index and len(kept.entries) > 1:
            schedule = sorted(kept.entries[1].used, reverse=True)  # of the request before this one
        return list(dict.fromkeys((*missing, *schedule)))

    def _fill(
        self, kept: ValueCache, entry: CacheEntry, steps: Iterable[float], given: Sequence[Tensor]
    ) -> None:
        """Compute what is lacking of `steps`."""
        every = list(dict.fromkeys(steps))
        wanted = [step for step in every if step not in entry.index]
        if not wanted:
            return
        if len(entry.index) + len(wanted) > self._room(kept, entry):
            entry.clear()
            wanted = every
        self._know(kept, wanted)
        self.offloaded.back()
        values = kept.compute(wanted, given, entry.like)
        if kept.shared:
            one = [
                tuple(row[:1] for row in rows) if batched else rows
                for rows, batched in zip(values, kept.part.batched, strict=True)
            ]
            pairs = zip(itertools.chain(*one), itertools.chain(*values), strict=True)
            if all(torch.equal(a.expand_as(b), b) for a, b in pairs):
                values = one
            else:  # rows of one batch differ after all, as kernels round
                kept.shared = False
                wanted = [*entry.index, *wanted]
                entry.clear()
                values = kept.compute(wanted, given, entry.like)
        entry.store(values)
        for step in wanted:
            entry.index[step] = len(entry.index)

    def _room(self, kept: ValueCache, entry: CacheEntry) -> int:
        """How many rows an entry may grow to; those of a schedule, and as many others, always."""
        row = max(1, kept.part.step_bytes * len(entry.like))
        scheduled = 2 * len(self.schedule.values())
        return min(_MOST_ROWS, max(_FEW_ROWS, scheduled, self.offloaded.nbytes() // row))

    def _know(self, kept: ValueCache, steps: Sequence[float]) -> None:
        """Have the part's own look-ups know these timesteps, their scales interpolated."""
        known = kept.graph.meta.get("timesteps")
        if known is None or not has_lookups(kept.graph):
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
        every = torch.cat([known, known.new_tensor(new)])
        try:
            changed = change_timesteps(kept.part.graph, timesteps=every)
        except ConfigError as error:  # rows whose weights are gone
            raise InputError(f"{self._timestep}: {new[0]}: {error}") from error
        kept.graph = changed.gm
        kept.interpolated = int(changed.details["interpolated"])

    def _steps(self, t: Tensor) -> list[float] | None:
        """The timesteps of a call, on the host; None where the device need not be waited for."""
        if self.spec.on_miss == "error" and self.schedule and _is_remote(t):
            return None
        steps: list[float] = t.tolist()
        if any(math.isnan(step) for step in steps):
            raise InputError(f"{self._timestep}: NaN is no timestep")
        return steps

    def _look(self) -> TensorSnapshot | None:
        """The state of the weights, as the whole graph has them; None where it is gone."""
        gm = self._gm()
        if gm is None:
            return None
        return TensorSnapshot(gm, self._weights)

    def _check_weights(self) -> None:
        """Where weights were changed or replaced, have all parts see it and forget values."""
        gm, step = self._gm(), self._step()
        if gm is None or (self._sighting is not None and self._sighting.compare(gm) == (True, [])):
            return
        self.offloaded.back()
        for graph in (step, *(kept.part.graph for kept in self.parts)):
            if graph is not None:
                _relink(graph, gm)
        self.offloaded.retarget({n: attrgetter(n)(gm) for n in self.offloaded.tensors})
        for kept in self.parts:
            kept.graph = kept.part.graph
        self.forget()

    def _computed(self) -> int:
        return sum(kept.computed for kept in self.parts)

    def _settle(self) -> None:
        """Move weights away again, and take their state as the one that values belong to."""
        if self.offloaded.away():
            self._sighting = self._look()


def _weights(gm: fx.GraphModule, split: Split) -> list[str]:
    """The names of tensors that the parts compute with, or that each graph holds on its own."""
    held = tensors_of(split.step, split.step.graph.find_nodes(op="get_attr"))
    for part in split.parts:
        held |= tensors_of(part.graph, part.graph.graph.nodes)
    every = itertools.chain(
        gm.named_parameters(remove_duplicate=False), gm.named_buffers(remove_duplicate=False)
    )
    return [name for name, tensor in every if id(tensor) in held]


def _relink(graph: fx.GraphModule, gm: fx.GraphModule) -> None:
    """Have `graph` use the modules and tensors that `gm` has by now."""
    for node in graph.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            path, _, leaf = str(node.target).rpartition(".")
            setattr(graph.get_submodule(path), leaf, attrgetter(str(node.target))(gm))


def _is_remote(t: Tensor) -> bool:
    return t.device.type != "cpu"
