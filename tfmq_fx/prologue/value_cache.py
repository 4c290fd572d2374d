"""Cache the values of one part of a prologue for the sets of conditions used last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.core.config import PrologueSpec
from tfmq_fx.passes.split_prologue import Part

from .condition_snapshot import Snapshot
from .row_store import RowStore


class CacheEntry:
    """The values for one set of conditions: rows by timestep, or one value for all steps.

    key: what else the values depend on: device and dtype of the timestep, batch size, the layout of
    the conditions (kernels round by it), and the dtype of autocast or None.
    like: a timestep tensor (B,) as the model received it.
    """

    def __init__(self, part: Part, conditions: Sequence[Tensor], *, key: Any, like: Tensor) -> None:
        self.conditions, self.key, self.like = Snapshot(conditions), key, like.detach()
        self._part = part
        self.clear()

    def clear(self) -> None:
        """Drop the values."""
        self.index: dict[float, int] = {}
        self._known: Tensor | None = None  # the same on the device
        self.used = set[float]()
        self.rows = [RowStore() for _ in self._part.names]

    @property
    def is_reproducible(self) -> bool:
        """Whether the copies of the conditions have the layout that the conditions had."""
        *_, layout, _ = self.key
        return bool(layout == _layout(self.conditions.contents))

    def store(self, values: Sequence[Sequence[Tensor]]) -> None:
        """Append n more steps of each value (*shape)."""
        try:
            for rows, steps in zip(self.rows, values, strict=True):
                rows.extend(steps)
        except BaseException:  # part of a step would shift all that follow
            self.clear()
            raise

    def places(self, t: Tensor) -> Tensor:
        """The row of each timestep (B,), -1 where it has none, without waiting for the device."""
        if self._known is None or len(self._known) != len(self.index):
            self._known = torch.tensor(list(self.index), dtype=torch.float64, device=t.device)
        hit = t.double()[:, None] == self._known
        return torch.where(hit.any(1), hit.int().argmax(1), -1)

    def picked(self, places: Tensor) -> list[Tensor]:
        """Each value (B, ...), with the row at `places` (B,) for each sample."""
        return [rows.picked(places) for rows in self.rows]

    def autocast(self) -> torch.autocast:
        """The context in which the values are computed."""
        *_, dtype = self.key
        return torch.autocast(self.like.device.type, dtype, enabled=dtype is not None)

    def nbytes(self) -> int:
        """Bytes of the values and of the copies of the conditions."""
        return sum(rows.nbytes() for rows in self.rows) + self.conditions.nbytes()


class ValueCache:
    """The cache entries of one part, the most recently used first."""

    def __init__(self, part: Part, spec: PrologueSpec) -> None:
        self.part, self._capacity = part, spec.capacity
        self.graph = part.graph  # its tables get more timesteps as they come
        self.entries: list[CacheEntry] = []
        self.mixes: bool | None = None  # whether samples depend on each other; None: not known
        # where values depend on the timestep only, one row serves all samples
        self.shared = part.stepped and not part.conditions
        self.restless = 0  # entries in a row that served one step each
        self.interpolated = 0
        self.computed = 0  # the number of steps computed so far

    def find(self, conditions: Sequence[Tensor], t: Tensor) -> CacheEntry:
        """The entry of `conditions` at the batch size of `t`, a new one where there is none."""
        device = t.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (t.device, t.dtype, len(t), _layout(conditions), cast)
        for same in (Snapshot.is_seen, Snapshot.matches):
            for i, entry in enumerate(self.entries):
                if entry.key == key and same(entry.conditions, conditions):
                    self.entries.insert(0, self.entries.pop(i))
                    return entry
        if self.entries and self.part.stepped:
            self.restless = self.restless + 1 if len(self.entries[0].used) < 2 else 0
        self.entries.insert(0, CacheEntry(self.part, conditions, key=key, like=t))
        del self.entries[self._capacity :]
        return self.entries[0]

    def compute(
        self, steps: Sequence[float], conditions: Sequence[Tensor], t: Tensor
    ) -> list[tuple[Tensor, ...]]:
        """Each value at each of `steps`; t: (B,), for its dtype, device and size."""
        self.computed += len(steps)
        each = [self.graph(t.new_full((len(t),), step), *conditions) for step in steps]
        return list(zip(*each, strict=True))

    def measure_mixing(
        self, one: float, other: float, conditions: Sequence[Tensor], t: Tensor
    ) -> bool:
        """Whether values of samples depend on each other, or do not have one row for each sample:
        then a batch at several timesteps cannot be put together from batches at one.

        Measured with two timesteps and a batch (B,) of 2 or more: any two samples get different
        timesteps in one of the runs, and must have the bits of a batch that has one timestep.
        """
        if not all(self.part.batched):
            return True
        places = torch.arange(len(t), device=t.device)
        pure = [self.graph(t.new_full((len(t),), step), *conditions) for step in (one, other)]
        for digit in range((len(t) - 1).bit_length()):
            second = places >> digit & 1 == 1
            times = torch.where(second, t.new_tensor(other), t.new_tensor(one))
            for value, first, last in zip(self.graph(times, *conditions), *pure, strict=True):
                chosen = second.view(-1, *[1] * (value.dim() - 1))
                if not torch.equal(value, torch.where(chosen, last, first)):
                    return True
        return False


def _layout(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tensor.stride() for tensor in tensors)
