"""What tells the content of one tensor from that of another without keeping it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from .errors import ArtifactError
from .plain_json import dtype_name, dtype_named, keys, typed

_ELEMENTS = 8
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Shape and dtype of a tensor, some of its elements, and the sum of all its bits.

    sample: (n,) on the CPU, n <= 8, elements along a diagonal: where they lie does not depend on
    the memory layout.  checksum: the bytes as 64-bit integers, added up.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    sample: Tensor
    checksum: int

    @classmethod
    def of(cls, value: Tensor) -> Self:
        """The fingerprint of `value`, all of which is read once."""
        sample = _sample(value).cpu().clone()
        return cls(tuple(value.shape), value.dtype, sample, _checksum(value))

    def matches(self, value: Tensor) -> bool:
        """Whether `value` holds what this one held, as far as can be told.

        In the same dtype every element counts; in another one the few elements of the sample, cast
        to it.  A tensor on the meta device holds nothing that could differ.
        """
        if tuple(value.shape) != self.shape or not (value.is_meta or is_readable(value)):
            return False
        if value.is_meta:
            return True
        same = torch.equal(bits(self.sample.to(value.dtype)), bits(_sample(value).cpu()))
        return same and (value.dtype != self.dtype or _checksum(value) == self.checksum)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "sample": bits(self.sample).flatten().tolist(),
            "checksum": self.checksum,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> Self:
        """The fingerprint that `to_dict` wrote. Raises ArtifactError."""
        keys(data, where, "shape dtype sample checksum")
        typed(data, where, shape=list, sample=list, checksum=int)
        if not all(type(n) is int for n in (*data["shape"], *data["sample"])):
            raise ArtifactError(f"{where}: its shape or sample holds other than whole numbers")
        dtype = dtype_named(data["dtype"], where)
        real = dtype.to_real()
        words = torch.tensor(data["sample"], dtype=_BITS[real.itemsize])
        sample = words.view(real)
        if dtype.is_complex:
            sample = torch.view_as_complex(sample.view(-1, 2))
        return cls(tuple(data["shape"]), dtype, sample, int(data["checksum"]))


def is_readable(value: Tensor) -> bool:
    """Whether the elements of a tensor are what its memory holds: not so for packed ones."""
    plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
    return plain and not value.is_meta and not value.is_quantized


def bits(value: Tensor) -> Tensor:
    """The bits of a tensor's elements as integers, which compare NaN with NaN; complex numbers get
    one more dimension."""
    plain = value.detach().resolve_conj().resolve_neg()
    real = torch.view_as_real(plain) if plain.is_complex() else plain
    return real.view(_BITS[real.element_size()])


def _sample(value: Tensor) -> Tensor:
    """Up to 8 elements, the k-th at index k * (size // 8) of every dimension: a view."""
    count = min(_ELEMENTS, max(value.shape, default=1)) if value.numel() else 0
    steps = [size // max(count, 1) for size in value.shape]
    stride = sum(step * own for step, own in zip(steps, value.stride(), strict=True))
    return torch.as_strided(value.detach(), (count,), (stride,), value.storage_offset())


def _checksum(value: Tensor) -> int:
    """The sum of a tensor's bytes, eight at a time, whatever its layout; it wraps around."""
    words = bits(value).flatten().view(torch.uint8)
    whole = len(words) // 8 * 8
    if words.storage_offset() % 8:
        words = words.clone()
    total = words[:whole].view(torch.int64).sum()
    return int(total + words[whole:].sum())
