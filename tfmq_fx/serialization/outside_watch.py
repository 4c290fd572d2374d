"""Notice that tensors of closures or globals changed after conversion."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tfmq_fx.capture.outside_tensors import memory_state
from tfmq_fx.core.errors import StaleError

from .fingerprints import Fingerprint, is_readable


class Outside:
    """What such tensors held when a model was converted.

    tensors: by name; the graph has copies of them.  Those that are gone since cannot change.
    """

    def __init__(self, tensors: Mapping[str, weakref.ref[Tensor]]) -> None:
        self._seen: dict[str, tuple[weakref.ref[Tensor], Fingerprint, Any]] = {}
        for name, reference in tensors.items():
            value = reference()
            if value is not None and is_readable(value):
                self._seen[name] = (reference, Fingerprint.of(value), memory_state(value))

    def changed(self, *, contents: bool = True) -> list[str]:
        """Names of those that hold something else by now; contents: whether all are read, or those
        that were moved or written to."""
        found = []
        for name, (reference, fingerprint, place) in self._seen.items():
            value = reference()
            if value is None or (not contents and memory_state(value) == place):
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
