"""Store values of which a bounded number of bytes stays in memory; the rest waits in files.

A tensor comes back with the bits, strides and place in its storage that it had, by which kernels
choose their path. But tensors that shared a storage come back from files with one each, so values
that a graph writes to in place must not be packed (`LayerwiseExecutor` keeps those in memory).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tfmq_fx.core.temporary_files import folder_of


@dataclass(frozen=True, eq=False, slots=True)
class _Packed:
    """A tensor in memory or in a file."""

    held: Tensor | Path


class ActivationStore:
    """Packs and unpacks values; its files are deleted when its context ends.

    limit: bytes in memory at most; None keeps everything there.  Files lie in a directory of
    their own where `tempfile` puts it (TMPDIR), which should not be memory itself.  What comes
    first stays: every value is needed in turn, so nothing is gained by moving them about.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.used, self.written = limit, 0, 0
        self._directory: Path | None = None
        self._cleanup: Callable[[], object] | None = None
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._cleanup is not None:
            self._cleanup()
            self._directory = self._cleanup = None

    def pack(self, value: Any, pinned: Collection[int] = ()) -> Any:
        """The packed form of tensors, and of tuples, lists and dicts of them.

        pinned: addresses of storages that stay in memory anyway (weights); tensors in them, and all
        that is no strided tensor, stay as they are.
        """
        if self.limit is None:
            return value
        return pytree.tree_map(lambda leaf: self._pack_leaf(leaf, pinned), value)

    def _pack_leaf(self, leaf: Any, pinned: Collection[int]) -> Any:
        if type(leaf) is not Tensor or leaf.layout is not torch.strided or leaf.is_meta:
            return leaf
        storage = leaf.untyped_storage()
        size = storage.nbytes()
        if not size or storage.data_ptr() in pinned:
            return leaf
        assert self.limit is not None
        if self.used + size <= self.limit:
            self.used += size
            return _Packed(leaf)
        if self._directory is None:
            self._directory, self._cleanup = folder_of(self, "spill")
        self._count += 1
        path = self._directory / str(self._count)
        torch.save(leaf, path)
        self.written += size
        return _Packed(path)

    def unpack(self, packed: Any) -> Any:
        """The value that was packed; tensors in files are read."""
        return pytree.tree_map_only(_Packed, _unpack_leaf, packed)

    def drop(self, packed: Any) -> None:
        """Free the memory and the files of a packed value."""
        for leaf in pytree.tree_leaves(packed):
            held = leaf.held if isinstance(leaf, _Packed) else None
            if isinstance(held, Path):
                held.unlink(missing_ok=True)
            elif held is not None:
                self.used -= held.untyped_storage().nbytes()


def _unpack_leaf(leaf: _Packed) -> Tensor:
    return torch.load(leaf.held, weights_only=True) if isinstance(leaf.held, Path) else leaf.held
