"""Tensors that a model's code reads and none of its modules holds: of a closure or a global."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import Tensor, nn

OUTSIDE = "outside"  # gm.meta of a captured graph: such tensors, weakly, by the graph's names
BAKED = "baked"  # gm.meta: names of the model's tensors that its code made constants of


def adopted(tensors: Mapping[str, weakref.ref[Tensor]]) -> list[str]:
    """Names of those that are parameters: weights of modules that are no parts of the model."""
    return [name for name, reference in tensors.items() if isinstance(reference(), nn.Parameter)]


def where(value: Tensor) -> tuple[int, int, int]:
    """What tells, without its elements, whether a tensor is as it was: where it lies, and how often
    it was written to, as far as torch counts."""
    version = 0 if value.is_inference() else value._version
    return value.untyped_storage()._cdata, value.data_ptr(), version
