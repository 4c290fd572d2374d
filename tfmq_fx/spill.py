"""Values of which a bounded number of bytes stays in memory; the rest waits in files.

What comes back is what was put in, bit for bit and stride for stride: values that share a storage
share it again, and storages start where they started (kernels choose their path by alignment).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .leftovers import folder_of

_ALIGNMENT = 64  # bytes; torch's own on the CPU


@dataclass(eq=False, slots=True)
class _Slot:
    """One storage: in memory, or in a file of its own.  refs: how many tensors look into it."""

    bytes: int
    device: torch.device
    memory: torch.UntypedStorage | None
    path: Path | None
    refs: int = 0


@dataclass(frozen=True, slots=True)
class _Ref:
    """A tensor as a view of a slot."""

    slot: _Slot
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(slots=True)
class Opened:
    """Storages that have files and are in memory for now: values unpacked or packed with the same
    one share them, and writes in place to what was unpacked are seen."""

    bases: dict[_Slot, tuple[Tensor, int]] = field(default_factory=dict)  # and their version
    slots: dict[int, _Slot] = field(default_factory=dict)  # by address


class Spill:
    """Packs values; leave its context and the files are gone.

    limit: bytes in memory at most; None keeps everything there.  Files lie in a directory of
    their own where `tempfile` puts it (TMPDIR), which should not be memory itself.  What comes
    first stays: every value is needed in turn, so nothing is gained by moving them about.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.used, self.written = limit, 0, 0
        self._memory: dict[int, _Slot] = {}  # by address
        self._directory: Path | None = None
        self._cleanup: Callable[[], object] | None = None
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._cleanup is not None:
            self._cleanup()
            self._directory = self._cleanup = None

    def pack(self, value: Any, opened: Opened, pinned: Collection[int] = ()) -> Any:
        """What `unpack` makes `value` of again: tensors, and tuples, lists and dicts of them.

        opened: what has been unpacked beside it.  pinned: addresses of storages that stay in memory
        anyway (weights); tensors in them, and all that is no strided tensor, are kept as they are.
        """
        if self.limit is None:
            return value

        def packed(leaf: Any) -> Any:
            if type(leaf) is not Tensor or leaf.layout is not torch.strided or leaf.is_meta:
                return leaf
            storage = leaf.untyped_storage()
            address = storage.data_ptr()
            if leaf.is_conj() or leaf.is_neg() or not storage.nbytes() or address in pinned:
                return leaf
            slot = self._memory.get(address) or opened.slots.get(address)
            if slot is None:
                slot = self._put(storage, opened)
            slot.refs += 1
            return _Ref(slot, leaf.dtype, leaf.shape, leaf.stride(), int(leaf.storage_offset()))

        return pytree.tree_map(packed, value)

    def unpack(self, packed: Any, opened: Opened) -> Any:
        """The value that was packed, its storages read from files or shared with `opened`."""

        def unpacked(leaf: Any) -> Any:
            if not isinstance(leaf, _Ref):
                return leaf
            if leaf.slot.memory is not None:
                empty = torch.empty(0, dtype=leaf.dtype, device=leaf.slot.device)
                return empty.set_(leaf.slot.memory, leaf.offset, leaf.shape, leaf.stride)
            if leaf.slot not in opened.bases:
                base = _read(leaf.slot)
                opened.bases[leaf.slot] = base, base._version
                opened.slots[base.untyped_storage().data_ptr()] = leaf.slot
            base, _ = opened.bases[leaf.slot]
            return base.view(leaf.dtype).as_strided(leaf.shape, leaf.stride, leaf.offset)

        return pytree.tree_map(unpacked, packed, is_leaf=lambda leaf: isinstance(leaf, _Ref))

    def close(self, opened: Opened) -> None:
        """Give `opened` back: what was written to in place goes to its file again."""
        for slot, (base, version) in opened.bases.items():
            if base._version != version and slot.refs:
                self._write(slot, base[: slot.bytes])

    def drop(self, packed: Any) -> None:
        """Forget a packed value; storages that no other one looks into are freed."""
        for leaf in pytree.tree_leaves(packed, is_leaf=lambda leaf: isinstance(leaf, _Ref)):
            if not isinstance(leaf, _Ref):
                continue
            slot = leaf.slot
            slot.refs -= 1
            if slot.refs == 0 and slot.memory is not None:
                del self._memory[slot.memory.data_ptr()]
                self.used -= slot.bytes
                slot.memory = None
            elif slot.refs == 0 and slot.path is not None:
                slot.path.unlink(missing_ok=True)

    def _put(self, storage: torch.UntypedStorage, opened: Opened) -> _Slot:
        size = storage.nbytes()
        assert self.limit is not None
        if self.used + size <= self.limit:
            slot = _Slot(size, storage.device, storage, None)
            self._memory[storage.data_ptr()] = slot
            self.used += size
            return slot
        if self._directory is None:
            self._directory, self._cleanup = folder_of(self, "spill")
        self._count += 1
        slot = _Slot(size, storage.device, None, self._directory / str(self._count))
        base = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self._write(slot, base)
        opened.bases[slot] = base, base._version  # which keeps the address its own
        opened.slots[storage.data_ptr()] = slot
        return slot

    def _write(self, slot: _Slot, content: Tensor) -> None:
        assert slot.path is not None
        content.cpu().numpy().tofile(slot.path)
        self.written += slot.bytes


def _read(slot: _Slot) -> Tensor:
    """The bytes of a slot, and what is missing to whole elements of any dtype."""
    assert slot.path is not None
    base = torch.empty(-(-slot.bytes // _ALIGNMENT) * _ALIGNMENT, dtype=torch.uint8)
    with slot.path.open("rb") as file:
        file.readinto(base.numpy().data[: slot.bytes])
    return base.to(slot.device)
