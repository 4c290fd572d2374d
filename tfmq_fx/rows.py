"""Rows of one value, one for each step of a request, at a chosen precision."""

from __future__ import annotations

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
        self._stored: tuple[Tensor, ...] = ()
        self._dtype = torch.float32
        self._shape = torch.Size()

    def extend(self, rows: Tensor) -> None:
        """Append rows (n, *shape)."""
        self._dtype, self._shape = rows.dtype, rows.shape[1:]
        if not rows.is_floating_point():
            self.precision = "exact"
        new = self._encode(rows)
        self._stored = (
            tuple(torch.cat(pair) for pair in zip(self._stored, new, strict=True))
            if self._stored
            else new
        )
        if self.precision != "exact":
            flat = rows.double().reshape(self._lines(len(rows)), -1)
            lost = (self._decode(new).double().reshape(flat.shape) - flat).norm(dim=1)
            norm = flat.norm(dim=1)
            relative = torch.where(norm > 0, lost / norm, lost)
            self.error = max(self.error, float(relative.max()))

    def __len__(self) -> int:
        return len(self._stored[0]) if self._stored else 0

    def row(self, k: int) -> Tensor:
        """The value of step k, (*shape)."""
        found: Tensor = self._decode(tuple(part[k : k + 1] for part in self._stored))[0]
        return found

    def picked(self, steps: Tensor) -> Tensor:
        """(B, ...): of sample b the value at step steps[b]; steps: (B,) int64, below 0 is NaN.

        Of values that hold one sample, that one serves all. Only where `batched`.
        """
        chosen = self._decode(tuple(part[steps.clamp(min=0)] for part in self._stored))
        samples = torch.arange(len(steps), device=steps.device)
        place = samples if self._shape[0] == len(steps) else samples * 0
        found: Tensor = chosen[samples, place]
        known = (steps >= 0).view(-1, *[1] * (found.dim() - 1))
        return torch.where(known, found, float("nan")) if found.is_floating_point() else found

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in self._stored)

    def _lines(self, n: int) -> int:
        """How many rows with a scale of their own n steps have."""
        return n * self._shape[0] if self.batched else n

    def _encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        if self.precision == "exact":
            return (rows,)
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
