"""Identify tensors that a model's code reads from closures or globals, not from its modules."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import Tensor, nn

# Keys of a captured graph's meta: weak references to such tensors, by their names in the graph;
# names of the model's tensors from which its code computed constants.
OUTSIDE, BAKED = "outside", "baked"


def outside_parameters(tensors: Mapping[str, weakref.ref[Tensor]]) -> list[str]:
    """The names of the tensors that are parameters of modules outside the model."""
    return [name for name, reference in tensors.items() if isinstance(reference(), nn.Parameter)]


def memory_state(value: Tensor) -> tuple[int, int, int]:
    """A tensor's storage, address and version, by which most changes show without reading it."""
    version = 0 if value.is_inference() else value._version
    return value.untyped_storage()._cdata, value.data_ptr(), version
