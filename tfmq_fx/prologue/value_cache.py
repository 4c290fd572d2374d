"""The values of one part of a prologue, for each set of conditions that is kept."""

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
    """The values of one set of conditions: rows by timestep, or one value for all steps.

    key: what else the values depend on: device and dtype of the timestep, batch size, the layout of
    the conditions (kernels round by it), and the dtype of autocast or None.
    like: a timestep tensor (B,) as the model received it.
    """

    def __init__(self, part: Part, given: Sequence[Tensor], *, key: Any, like: Tensor) -> None:
        self.conditions, self.key, self.like = Snapshot(given), key, like.detach()
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
        """Whether the contents of the conditions were kept in the layout that they had."""
        *_, layout, _ = self.key
        return bool(layout == _layout(self.conditions.contents))

    def store(self, values: Sequence[Sequence[Tensor]]) -> None:
        """Append each value (*shape) at n more steps."""
        try:
            for rows, steps in zip(self.rows, values, strict=True):
                rows.extend(steps)
        except BaseException:  # part of a step would shift all that follow
            self.clear()
            raise

    def places(self, t: Tensor) -> Tensor:
        """The row of each timestep (B,), -1 where there is none, without waiting for the device."""
        if self._known is None or len(self._known) != len(self.index):
            self._known = torch.tensor(list(self.index), dtype=torch.float64, device=t.device)
        hit = t.double()[:, None] == self._known
        return torch.where(hit.any(1), hit.int().argmax(1), -1)

    def picked(self, places: Tensor) -> list[Tensor]:
        """Each value (B, ...), of every sample the row at its place (B,)."""
        return [rows.picked(places) for rows in self.rows]

    def autocast(self) -> torch.autocast:
        """The context in which the values are computed."""
        *_, dtype = self.key
        return torch.autocast(self.like.device.type, dtype, enabled=dtype is not None)

    def nbytes(self) -> int:
        """Bytes of the values and of the conditions kept to know them again."""
        return sum(rows.nbytes() for rows in self.rows) + self.conditions.nbytes()


class ValueCache:
    """The entries of one part, the most recently used first."""

    def __init__(self, part: Part, spec: PrologueSpec) -> None:
        self.part, self._capacity = part, spec.capacity
        self.graph = part.graph  # knows more timesteps as they come
        self.entries: list[CacheEntry] = []
        self.mixes: bool | None = None  # whether samples depend on each other; None: not known
        # where values depend on the timestep only, all samples have the same: one is kept
        self.shared = part.stepped and not part.conditions
        self.restless = 0
        self.interpolated = 0
        self.computed = 0  # how many steps' values were made so far

    def find(self, given: Sequence[Tensor], t: Tensor) -> CacheEntry:
        """The entry of these conditions at this batch size, made where there is none."""
        device = t.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (t.device, t.dtype, len(t), _layout(given), cast)
        for same in (Snapshot.is_seen, Snapshot.matches):
            for i, entry in enumerate(self.entries):
                if entry.key == key and same(entry.conditions, given):
                    self.entries.insert(0, self.entries.pop(i))
                    return entry
        if self.entries and self.part.stepped:
            self.restless = self.restless + 1 if len(self.entries[0].used) < 2 else 0
        self.entries.insert(0, CacheEntry(self.part, given, key=key, like=t))
        del self.entries[self._capacity :]
        return self.entries[0]

    def compute(
        self, steps: Sequence[float], given: Sequence[Tensor], t: Tensor
    ) -> list[tuple[Tensor, ...]]:
        """Each value at each of `steps`; t: (B,), for its dtype, device and size."""
        self.computed += len(steps)
        each = [self.graph(t.new_full((len(t),), step), *given) for step in steps]
        return list(zip(*each, strict=True))

    def mixing(self, one: float, other: float, given: Sequence[Tensor], t: Tensor) -> bool:
        """Whether values of samples depend on each other, or are not of one sample each; then rows
        of a batch at one timestep say nothing of a batch at several.

        Measured once, at two timesteps and a batch of 2 or more: any two samples meet at different
        ones, and the bits must be those of a batch that is all at one.
        """
        if self.mixes is None:
            self.mixes = not all(self.part.batched) or self._affects(one, other, given, t)
        return self.mixes

    def _affects(self, one: float, other: float, given: Sequence[Tensor], t: Tensor) -> bool:
        places = torch.arange(len(t), device=t.device)
        pure = [self.graph(t.new_full((len(t),), step), *given) for step in (one, other)]
        for digit in range((len(t) - 1).bit_length()):
            second = places >> digit & 1 == 1
            times = torch.where(second, t.new_tensor(other), t.new_tensor(one))
            for value, first, last in zip(self.graph(times, *given), *pure, strict=True):
                chosen = second.view(-1, *[1] * (value.dim() - 1))
                if not torch.equal(value, torch.where(chosen, last, first)):
                    return True
        return False


def _layout(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tensor.stride() for tensor in tensors)
