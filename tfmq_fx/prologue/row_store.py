"""Rows of one value, one for each step of a request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RowStore:
    """Values (*shape) of successive steps, with their bits and layout (kernels round by it)."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._whole: Tensor | None = None  # the same in one piece

    def extend(self, values: Sequence[Tensor]) -> None:
        """Append the values (*shape) of further steps."""
        self._whole = None
        self._rows += map(_own, values)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, k: int) -> Tensor:
        """The value of step k, (*shape): the memory that is kept."""
        return self._rows[k]

    def picked(self, steps: Tensor) -> Tensor:
        """(B, ...): of sample b the value at step steps[b]; steps: (B,) int64, below 0 is NaN.

        Of values that hold one sample, that one serves all. Only where dimension 0 is the batch.
        """
        if self._whole is None:
            self._whole = torch.stack(self._rows)
            self._rows = [*self._whole.unbind()]
        samples = torch.arange(len(steps), device=steps.device)
        place = samples if self._whole.shape[1] == len(steps) else samples * 0
        found: Tensor = self._whole[steps.clamp(min=0), place]
        known = (steps >= 0).view(-1, *[1] * (found.dim() - 1))
        return torch.where(known, found, float("nan")) if found.is_floating_point() else found

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(row.nbytes for row in self._rows)


def _own(value: Tensor) -> Tensor:
    """The value in memory of its own size."""
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
