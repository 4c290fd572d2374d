"""Whether the conditions of a request are still those that its values were computed for."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

_SMALL = 1 << 16  # bytes up to which a tensor on the CPU is always compared: a few microseconds


class Snapshot:
    """The contents of some tensors, and the objects that were last seen to hold them.

    A tensor is known again when it is the same object at the same version, or equal bit for bit.
    Versions miss writes through `.data`, numpy and the like, so that tensors on the CPU of up to
    64 KiB, and inference tensors, which have no version, are always compared.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.contents = tuple(tensor.detach().clone() for tensor in tensors)
        self._seen: list[tuple[weakref.ref[Tensor], int | None]] = []
        self._remember(tensors)

    def is_seen(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the objects last seen, unchanged since."""
        return all(
            seen() is tensor
            and version is not None
            and _version(tensor) == version
            and (not _is_small(tensor) or _equal(tensor, held))
            for tensor, (seen, version), held in zip(
                tensors, self._seen, self.contents, strict=True
            )
        )

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these hold the same bits; they are then the objects last seen."""
        if not all(_equal(a, b) for a, b in zip(tensors, self.contents, strict=True)):
            return False
        self._remember(tensors)
        return True

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.contents)

    def _remember(self, tensors: Sequence[Tensor]) -> None:
        self._seen = [(weakref.ref(tensor), _version(tensor)) for tensor in tensors]


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _is_small(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.nbytes <= _SMALL


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are of one kind and hold the same bits (NaN equals itself)."""
    same = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return same and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return flat.reshape(-1).view(torch.uint8)
