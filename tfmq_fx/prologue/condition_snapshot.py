"""Detect whether the conditions of a request are still those that its values were computed for."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from tfmq_fx.serialization.fingerprints import bits


class Snapshot:
    """Copies of some tensors, and references to the objects that last had these contents.

    A tensor matches when it is the same object at the same version, or equal bit for bit.
    Versions miss writes through `.data`, numpy and the like, so tensors on the CPU are always
    compared, at 0.1 ms for a MiB, and so are inference tensors, which have no version.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.contents = tuple(tensor.detach().clone() for tensor in tensors)
        self._seen: list[tuple[weakref.ref[Tensor], tuple[int, int] | None]] = []
        self._remember(tensors)

    def is_seen(self, tensors: Sequence[Tensor]) -> bool:
        """Whether `tensors` are the objects last seen, unchanged since."""
        return all(
            seen() is tensor
            and state is not None
            and _state(tensor) == state
            and (tensor.device.type != "cpu" or same_bits(tensor, held))
            for tensor, (seen, state), held in zip(tensors, self._seen, self.contents, strict=True)
        )

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        """Whether `tensors` have the same bits; if so they become the objects last seen."""
        if not all(same_bits(a, b) for a, b in zip(tensors, self.contents, strict=True)):
            return False
        self._remember(tensors)
        return True

    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(tensor.nbytes for tensor in self.contents)

    def _remember(self, tensors: Sequence[Tensor]) -> None:
        self._seen = [(weakref.ref(tensor), _state(tensor)) for tensor in tensors]


def _state(tensor: Tensor) -> tuple[int, int] | None:
    """The version and address of a tensor; None where it has no version."""
    return None if tensor.is_inference() else (tensor._version, tensor.data_ptr())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype, device and bits (NaN equals itself)."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    words = [bits(tensor).contiguous().flatten() for tensor in (a, b)]
    if all(w.nbytes % 8 == 0 and w.storage_offset() * w.itemsize % 8 == 0 for w in words):
        words = [w.view(torch.int64) for w in words]  # several times as fast as in bytes
    return torch.equal(*words)
