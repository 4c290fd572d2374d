"""Tensors that a model's code reads and none of its modules holds: of a closure or a global."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .errors import StaleError
from .fingerprints import Fingerprint, is_readable

OUTSIDE = "outside"  # gm.meta of a captured graph: such tensors, weakly, by the graph's names

BAKED = "baked"  # gm.meta: names of the model's tensors that its code made constants of


class Outside:
    """What such tensors held when a model was converted.

    tensors: by name; the graph has copies of them.  Those that are gone since cannot change.
    """

    def __init__(self, tensors: Mapping[str, weakref.ref[Tensor]]) -> None:
        self._seen: dict[str, tuple[weakref.ref[Tensor], Fingerprint, Any]] = {}
        for name, reference in tensors.items():
            value = reference()
            if value is not None and is_readable(value):
                self._seen[name] = (reference, Fingerprint.of(value), where(value))

    def changed(self, *, contents: bool = True) -> list[str]:
        """Names of those that hold something else by now; contents: whether all are read, or those
        that were moved or written to."""
        found = []
        for name, (reference, fingerprint, place) in self._seen.items():
            value = reference()
            if value is None or (not contents and where(value) == place):
                continue
            if not fingerprint.matches(value):
                found.append(name)
        return found

    def check(self, *, contents: bool) -> None:
        """Raise StaleError where one changed; contents: as for `changed`."""
        if names := self.changed(contents=contents):
            raise StaleError(
                f"{', '.join(names)}: a tensor that the model's code reads from outside its "
                "modules (a closure, a global) has changed since. Prepare and convert it anew, or "
                "call model.forget_source() to go on with the values of before."
            )


def adopted(tensors: Mapping[str, weakref.ref[Tensor]]) -> list[str]:
    """Names of those that are parameters: weights of modules that are no parts of the model."""
    return [name for name, reference in tensors.items() if isinstance(reference(), nn.Parameter)]


def where(value: Tensor) -> tuple[int, int, int]:
    """What tells, without its elements, whether a tensor is as it was: where it lies, and how often
    it was written to, as far as torch counts."""
    version = 0 if value.is_inference() else value._version
    return value.untyped_storage()._cdata, value.data_ptr(), version
