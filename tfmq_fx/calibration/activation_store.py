"""Values of which a bounded number of bytes stays in memory; the rest waits in files.

A tensor comes back as it was packed: its bits, its strides and its place in its storage, by which
kernels choose their path. But tensors that shared a storage come back from files with one each, so
values that a graph writes to in place must not be packed (`Walk` holds those in memory).
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
    """A tensor in memory or in a file.  bytes: of its storage."""

    bytes: int
    held: Tensor | Path


class ActivationStore:
    """Packs values; leave its context and the files are gone.

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
        """What `unpack` makes `value` of again: tensors, and tuples, lists and dicts of them.

        pinned: addresses of storages that stay in memory anyway (weights); tensors in them, and all
        that is no strided tensor, are kept as they are.
        """
        limit = self.limit
        if limit is None:
            return value

        def packed(leaf: Any) -> Any:
            if type(leaf) is not Tensor or leaf.layout is not torch.strided or leaf.is_meta:
                return leaf
            storage = leaf.untyped_storage()
            size = storage.nbytes()
            if not size or storage.data_ptr() in pinned:
                return leaf
            if self.used + size > limit:
                return _Packed(size, self._write(leaf, size))
            self.used += size
            return _Packed(size, leaf)

        return pytree.tree_map(packed, value)

    def unpack(self, packed: Any) -> Any:
        """The value that was packed, what is in files read from there."""

        def unpacked(leaf: _Packed) -> Tensor:
            found = leaf.held
            return torch.load(found, weights_only=True) if isinstance(found, Path) else found

        return pytree.tree_map_only(_Packed, unpacked, packed)

    def drop(self, packed: Any) -> None:
        """Forget a packed value, its room in memory and its files."""
        for leaf in pytree.tree_leaves(packed):
            if isinstance(leaf, _Packed) and isinstance(leaf.held, Path):
                leaf.held.unlink(missing_ok=True)
            elif isinstance(leaf, _Packed):
                self.used -= leaf.bytes

    def _write(self, tensor: Tensor, size: int) -> Path:
        if self._directory is None:
            self._directory, self._cleanup = folder_of(self, "spill")
        self._count += 1
        path = self._directory / str(self._count)
        torch.save(tensor, path)
        self.written += size
        return path
