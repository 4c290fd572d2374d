"""Move weights that are needed once a request off the accelerator, or to disk, between requests."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tfmq_fx.core.config import Offload
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.temporary_files import folder_of

from .condition_snapshot import same_bits


def check_offload(kind: Offload, device: torch.device) -> None:
    """Raise ConfigError where weights on `device` cannot be offloaded by `kind`."""
    if _fits(kind, device):
        return
    if kind == "cpu":
        raise ConfigError(
            "offload='cpu': the model is on the CPU already. Use offload='disk' to free its "
            "memory, or move the model first."
        )
    raise ConfigError(
        f"offload='disk' is for models on the CPU, this one is on {device}. Use offload='cpu'."
    )


class Offloaded:
    """Tensors that move away and back in place, so that every module that has them sees it.

    tensors: by name, on one device.  kind: "cpu" moves them to the CPU; "disk" to a temporary file
    that is mapped into memory, so that values can be read at any time and pages need not stay.
    "cpu" is for tensors elsewhere and "disk" for those on the CPU: else the kind becomes "none".
    """

    def __init__(self, tensors: Mapping[str, Tensor], kind: Offload) -> None:
        self.tensors = dict(tensors)
        self.is_away = False
        devices = {tensor.device for tensor in self.tensors.values()}
        self._device = next(iter(devices), torch.device("cpu"))
        self.kind: Offload = kind if _fits(kind, self._device) else "none"
        self._folder: Path | None = None
        self._written = set[str]()

    def nbytes(self) -> int:
        """Bytes of the tensors that move."""
        return sum({t.data_ptr(): t.nbytes for t in self.tensors.values()}.values())

    def away(self) -> bool:
        """Move the tensors away; returns whether anything moved."""
        if self.kind == "none" or self.is_away:
            return False
        for i, (name, tensor) in enumerate(self.tensors.items()):
            tensor.data = tensor.data.cpu() if self.kind == "cpu" else self._mapped(i, name, tensor)
        self.is_away = True
        if self.kind == "disk":
            give_back()
        return True

    def back(self) -> None:
        """Move the tensors back to their device."""
        if not self.is_away:
            return
        self.is_away = False
        if self.kind == "cpu":
            for tensor in self.tensors.values():
                tensor.data = tensor.data.to(self._device)

    def restore(self) -> None:
        """Move all tensors back to their device and into memory of their own."""
        self.back()
        if self.kind == "disk" and self._written:
            for tensor in self.tensors.values():
                tensor.data = tensor.data.clone(memory_format=torch.preserve_format)
            self._written.clear()

    def _mapped(self, i: int, name: str, tensor: Tensor) -> Tensor:
        """The tensor as pages of a file, which is written unless it has these contents already."""
        if self._folder is None:
            self._folder, _ = folder_of(self, "offload")
        path = self._folder / f"{i}.bin"
        size = tensor.numel() * tensor.element_size()
        if not size:
            return tensor.data
        if name in self._written and same_bits(_pages(path, tensor), tensor.data):
            return _pages(path, tensor)  # pages that were read since are dropped
        contents = _bytes(tensor.data)
        path.unlink(missing_ok=True)  # pages of an earlier file stay mapped, and it must not shrink
        contents.numpy().tofile(path)
        self._written.add(name)
        return _pages(path, tensor)


def _fits(kind: Offload, device: torch.device) -> bool:
    return kind == "none" or (kind == "disk") == (device.type == "cpu")


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, in memory order where it has no gaps, else in index order."""
    if _is_dense(tensor):
        tensor = tensor.as_strided((tensor.numel(),), (1,))
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _pages(path: Path, like: Tensor) -> Tensor:
    """The contents of a file as a tensor like `like`, in pages that are read when they are used."""
    size = like.numel() * like.element_size()
    flat = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).view(like.dtype)
    if _is_dense(like):
        return flat.as_strided(like.shape, like.stride())
    return flat.view(like.shape)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps, in any order."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def give_back() -> None:
    """Return freed memory to the system, where the C library is able to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
