"""Store the rows of one value, one for each step of a request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RowStore:
    """Stores values (*shape) of successive steps with their bits and layout."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._whole: Tensor | None = None  # the rows as one tensor, once `picked` needs it

    def extend(self, values: Sequence[Tensor]) -> None:
        """Append the values (*shape) of further steps."""
        self._whole = None
        # a part of a larger tensor would keep all of its memory
        self._rows += [
            value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
            for value in values
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, k: int) -> Tensor:
        """The value of step k, (*shape); it shares memory with the store."""
        return self._rows[k]

    def picked(self, steps: Tensor) -> Tensor:
        """The values (B, ...) with sample b at step steps[b]; steps: (B,) int64, below 0 gives NaN.

        Dimension 0 of the stored values is the batch, or 1 where one sample serves all.
        """
        if self._whole is None:
            self._whole = torch.stack(self._rows)
            self._rows = [*self._whole.unbind()]
        samples = torch.arange(len(steps), device=steps.device)
        place = samples if self._whole.shape[1] == len(steps) else samples * 0
        picked: Tensor = self._whole[steps.clamp(min=0), place]
        if not picked.is_floating_point():
            return picked
        known = (steps >= 0).view(-1, *[1] * (picked.dim() - 1))
        return torch.where(known, picked, float("nan"))

    def nbytes(self) -> int:
        """Bytes of the rows."""
        return sum(row.nbytes for row in self._rows)
