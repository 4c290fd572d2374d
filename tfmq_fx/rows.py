"""Rows of one value, one for each step of a request, at a chosen precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import Precision
from .tables import cache_rows, restore_rows


class Rows:
    """Values (*shape) of successive steps.

    precision: "exact", "float16", or "int8": 8-bit codes with a scale and zero point for each step
    and sample (rows of dim 0, or the whole value where `batched` is false). Values that are not
    real floats stay exact.  error: the largest relative L2 error of a row so far.
    """

    def __init__(self, precision: Precision, *, batched: bool) -> None:
        self.precision, self.batched = precision, batched
        self.error = 0.0
        self._rows: list[tuple[Tensor, ...]] = []  # of each step, as stored
        self._whole: tuple[Tensor, ...] | None = None  # the same in one piece
        self._dtype = torch.float32
        self._shape = torch.Size()

    def extend(self, values: Sequence[Tensor]) -> None:
        """Append the values (*shape) of further steps."""
        self._dtype, self._shape = values[0].dtype, values[0].shape
        self._whole = None
        if not self._dtype.is_floating_point:
            self.precision = "exact"
        if self.precision == "exact":  # their layout is kept too: kernels round by it
            self._rows += [(_own(value),) for value in values]
            return
        rows = torch.stack([*values])
        new = self._encode(rows)
        self._rows += zip(*(part.unbind() for part in new), strict=True)
        flat = rows.double().reshape(self._lines(len(rows)), -1)
        lost = (self._decode(new).double().reshape(flat.shape) - flat).norm(dim=1)
        norm = flat.norm(dim=1)
        relative = torch.where(norm > 0, lost / norm, lost)
        self.error = max(self.error, float(relative.max()))

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, k: int) -> Tensor:
        """The value of step k, (*shape); it may be the memory that is kept."""
        stored = self._rows[k]
        if self.precision == "exact":
            return stored[0]
        found: Tensor = self._decode(tuple(part[None] for part in stored))[0]
        return found

    def picked(self, steps: Tensor) -> Tensor:
        """(B, ...): of sample b the value at step steps[b]; steps: (B,) int64, below 0 is NaN.

        Of values that hold one sample, that one serves all. Only where `batched`.
        """
        if self._whole is None:
            self._whole = tuple(torch.stack(parts) for parts in zip(*self._rows, strict=True))
            self._rows = list(zip(*(part.unbind() for part in self._whole), strict=True))
        chosen = self._decode(tuple(part[steps.clamp(min=0)] for part in self._whole))
        samples = torch.arange(len(steps), device=steps.device)
        place = samples if self._shape[0] == len(steps) else samples * 0
        found: Tensor = chosen[samples, place]
        known = (steps >= 0).view(-1, *[1] * (found.dim() - 1))
        return torch.where(known, found, float("nan")) if found.is_floating_point() else found

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for stored in self._rows for part in stored)

    def _lines(self, n: int) -> int:
        """How many rows with a scale of their own n steps have."""
        return n * self._shape[0] if self.batched else n

    def _encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        if self.precision == "float16":
            return (rows.half(),)
        n = len(rows)
        codes, scale, zero = cache_rows(rows.reshape(self._lines(n), -1), 8)
        return codes.view(rows.shape), scale.view(n, -1), zero.view(n, -1)

    def _decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        if self.precision != "int8":
            return stored[0].to(self._dtype)
        codes, scale, zero = stored
        lines = scale.numel()
        flat = restore_rows(codes.reshape(lines, -1), scale.reshape(-1), zero.reshape(-1))
        return flat.view(codes.shape).to(self._dtype)


def _own(value: Tensor) -> Tensor:
    """The value in memory of its own size."""
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
