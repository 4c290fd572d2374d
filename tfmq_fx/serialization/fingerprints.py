"""Fingerprints of tensors, which show later whether a tensor holds other values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tfmq_fx.capture.model_checks import is_plain
from tfmq_fx.core.errors import ArtifactError

from .json_values import dtype_name, dtype_named, fields

_ELEMENTS = 8
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_RUN = 2**16  # words of a tensor that are mixed at once
# The constants of splitmix64, as signed integers.
_PLACE = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Shape and dtype of a tensor, some of its elements, and a checksum of all its bits.

    sample: (n,) on the CPU, n <= 8, elements along a diagonal: where they lie does not depend on
    the memory layout.  checksum: of the bytes as 64-bit integers, in order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    sample: Tensor
    checksum: int

    @classmethod
    def of(cls, value: Tensor) -> Self:
        """Compute the fingerprint of `value`, reading all of it once."""
        return cls(tuple(value.shape), value.dtype, _sample(value).cpu().clone(), _checksum(value))

    def matches(self, value: Tensor) -> bool:
        """Whether `value` holds the values that this fingerprint was computed from.

        In the same dtype every element counts; in another one the elements of the sample, cast
        to it.  A tensor on the meta device holds nothing that could differ.
        """
        if tuple(value.shape) != self.shape:
            return False
        if not is_readable(value):
            return value.is_meta
        same = torch.equal(bits(self.sample.to(value.dtype)), bits(_sample(value).cpu()))
        return same and (value.dtype != self.dtype or _checksum(value) == self.checksum)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data for `from_dict`."""
        return {
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "sample": bits(self.sample).flatten().tolist(),
            "digest": self.checksum,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> Self:
        """Return the fingerprint that `to_dict` wrote. Raises ArtifactError where it is damaged."""
        fields(data, where, shape=list, dtype=object, sample=list, digest=int)
        if not all(type(n) is int for n in (*data["shape"], *data["sample"])):
            raise ArtifactError(f"{where}: its shape or sample holds other than whole numbers")
        dtype = dtype_named(data["dtype"], where)
        real = dtype.to_real()
        sample = torch.tensor(data["sample"], dtype=_BITS[real.itemsize]).view(real)
        if dtype.is_complex:
            sample = torch.view_as_complex(sample.view(-1, 2))
        return cls(tuple(data["shape"]), dtype, sample, data["digest"])


def is_readable(value: Tensor) -> bool:
    """Whether a tensor's memory holds its elements as they are; that of packed ones does not."""
    plain = is_plain(value) and value.layout is torch.strided
    return plain and not (value.is_meta or value.is_quantized or isinstance(value, FakeTensor))


def bits(value: Tensor) -> Tensor:
    """View a tensor's elements as integers of the same bits, so that NaN equals NaN.

    Complex numbers get one more dimension.
    """
    plain = value.detach().resolve_conj().resolve_neg()
    real = torch.view_as_real(plain) if plain.is_complex() else plain
    return real.view(_BITS[real.element_size()])


def _sample(value: Tensor) -> Tensor:
    """View up to 8 elements, the k-th at index k * (size // 8) of every dimension."""
    count = min(_ELEMENTS, max(value.shape, default=1)) if value.numel() else 0
    steps = [size // max(count, 1) for size in value.shape]
    stride = sum(step * own for step, own in zip(steps, value.stride(), strict=True))
    return torch.as_strided(value.detach(), (count,), (stride,), value.storage_offset())


def _checksum(value: Tensor) -> int:
    """Compute a checksum of a tensor's elements in their order, whatever its layout.

    Each 64-bit word is mixed with its place by steps that lose nothing (those of splitmix64), so
    that words which change places, or change by as much up as down, count; the sum wraps around.
    """
    data = bits(value).flatten().view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    whole, rest = data[: len(data) // 8 * 8].view(torch.int64), data[len(data) // 8 * 8 :]
    run = _RUN if value.device.type == "cpu" else len(whole)  # what stays in a processor's cache
    places = torch.arange(1, min(run, len(whole)) + 1, device=value.device) * _PLACE
    total = len(rest)
    for start in range(0, len(whole), max(run, 1)):
        words = whole[start : start + run]
        total += int(_mixed(words ^ (places[: len(words)] + _wrapped(start * _PLACE))).sum())
    last = int.from_bytes(bytes(rest.tolist()), "little")
    return _wrapped(total + (last + 1) * _MIX[0])


def _mixed(words: Tensor) -> Tensor:
    """Spread every bit of each 64-bit word over the whole word, in place."""
    for shift, factor in zip((30, 27), _MIX, strict=True):
        words ^= (words >> shift) & (2 ** (64 - shift) - 1)
        words *= factor
    words ^= (words >> 31) & (2**33 - 1)
    return words


def _wrapped(number: int) -> int:
    """Return `number` as a signed 64-bit integer, higher bits dropped."""
    return (number + 2**63) % 2**64 - 2**63
