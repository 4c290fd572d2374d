"""A value as one tensor of bytes, and back: pickled, but for tensors, whose bytes follow.

Only for what one process of a program hands to another: unpickling runs what the bytes say.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor

_HEAD = 8  # bytes that say how long the pickled part is


def pack(value: Any, device: torch.device) -> Tensor:
    """(n,) uint8 on `device` of anything that can be pickled; (0,) of None."""
    if value is None:
        return torch.empty(0, dtype=torch.uint8, device=device)
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    head = file.getvalue()
    text = torch.frombuffer(
        bytearray(len(head).to_bytes(_HEAD, "little") + head), dtype=torch.uint8
    )
    return torch.cat([part.to(device) for part in (text, *pickler.parts)])


def unpack(packed: Tensor) -> Any:
    """The value that was packed: tensors with the same bits and strides, on a device of the same
    kind, each with memory of its own."""
    if not len(packed):
        return None
    stop = _HEAD + int.from_bytes(bytes(packed[:_HEAD].tolist()), "little")
    file = io.BytesIO(packed[_HEAD:stop].cpu().numpy().tobytes())
    return _Unpickler(file, packed[stop:]).load()


class _Pickler(pickle.Pickler):
    """Writes down of tensors what they are, and where in `parts`, joined, their bytes are."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.parts: list[Tensor] = []
        self._size = 0
        self._known: dict[int, tuple[Tensor, tuple[Any, ...]]] = {}

    def persistent_id(self, value: Any) -> Any:
        if type(value) is not Tensor or value.layout is not torch.strided or value.is_quantized:
            return None
        if id(value) not in self._known:
            plain = value.detach().resolve_conj().resolve_neg().contiguous()
            plain = torch.view_as_real(plain) if plain.is_complex() else plain
            self.parts.append(plain.flatten().view(torch.uint8))
            start, self._size = self._size, self._size + len(self.parts[-1])
            stride = torch.empty_like(value, device="meta").stride()
            place = (start, self._size, value.dtype, value.shape, stride, value.device.type)
            self._known[id(value)] = value, place  # the value, so that its id stays its own
        return self._known[id(value)][1]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, content: Tensor) -> None:
        super().__init__(file)
        self._content = content

    def persistent_load(self, place: Any) -> Tensor:
        start, stop, dtype, shape, stride, device = place
        # a copy, because kernels choose their path by alignment
        found = self._content[start:stop].clone().view(dtype).view(shape).to(device)
        if found.stride() != stride:
            found = torch.empty_strided(shape, stride, dtype=dtype, device=device).copy_(found)
        return found
