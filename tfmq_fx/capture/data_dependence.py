"""Say where a model's code reads the data of tensors, and what of it a capture may still keep.

A graph cannot follow code that depends on data. Two things can be kept in it all the same: a module
that is called as it is, opaque, and a value that depends on conditions alone, which is held at the
example's and compared at every call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.core.errors import CaptureError


class DataDependent(CaptureError):
    """Forward reads a tensor's data, and what runs next depends on it.

    paths: of the modules inside whose forward that is, outermost first, without the model itself.
    holdable: whether the data depends on conditions alone.  source: the line.
    """

    def __init__(
        self, message: str, *, paths: tuple[str, ...], holdable: bool, source: str
    ) -> None:
        super().__init__(message)
        self.paths, self.holdable, self.source = paths, holdable, source


class Unfit(CaptureError):
    """A module cannot be called as it is from a graph.

    path: of the module.  reason: why, as the end of a sentence.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} cannot be kept as it is: {reason}")
        self.path, self.reason = path, reason


@dataclass(frozen=True, slots=True)
class OpaqueCall:
    """One call of an opaque module, as it was observed at two sets of sizes.

    inputs, outputs: the shapes of its tensors, at the example's sizes and at others (or None).
    structure: of its result.  dtypes, strides: dtype and device, and the layout, of each tensor in
    it.  same: for each of them the position of the input that it is, or None.
    """

    inputs: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...] | None]
    outputs: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...] | None]
    structure: Any
    dtypes: tuple[tuple[torch.dtype, torch.device], ...]
    strides: tuple[tuple[int, ...], ...]
    same: tuple[int | None, ...]


@dataclass(frozen=True)
class Allowances:
    """What a capture may keep of code that depends on data.

    examples: the value of each placeholder.  conditions: the placeholders that a request fixes.
    opaque: modules that are called as they are, by path, and why.  unfit: modules that cannot be.
    held: modules inside which any value of conditions is held, not only single numbers; "" is the
    model itself.  calls: those of the opaque modules, in order.
    """

    examples: Mapping[str, Tensor]
    conditions: frozenset[str]
    opaque: Mapping[str, str] = field(default_factory=dict)
    unfit: Mapping[str, str] = field(default_factory=dict)
    held: frozenset[str] = frozenset([""])
    calls: Mapping[str, tuple[OpaqueCall, ...]] = field(default_factory=dict)

    def widened(self, model: nn.Module, error: DataDependent) -> Allowances | None:
        """The allowances with one more, with which the code at `error` can be kept; None without.

        That is the innermost module, and those like it, as opaque; or, where that cannot be, the
        values held there, or the next module outside.
        """
        inner = error.paths[-1] if error.paths else ""
        reason = f"{str(error).partition(': ')[2].partition('. ')[0]} ({error.source})"
        if inner in self.opaque:  # its forward was called without it
            return self.without(inner, "its forward is not called through the module")
        for path in reversed(error.paths):
            if path not in self.unfit:
                return dataclasses.replace(self, opaque=self._with_alike(model, path, reason))
            if path == inner and error.holdable and inner not in self.held:
                return dataclasses.replace(self, held=self.held | {inner})
        return None

    def without(self, path: str, reason: str) -> Allowances:
        """The allowances without an opaque module at `path`, which cannot be one."""
        opaque = {name: why for name, why in self.opaque.items() if name != path}
        return dataclasses.replace(self, opaque=opaque, unfit={**self.unfit, path: reason})

    def _with_alike(self, model: nn.Module, path: str, reason: str) -> dict[str, str]:
        """The opaque modules and those that look like the one at `path`, without their parts."""
        kind = _kind(model.get_submodule(path))
        alike = [
            name
            for name, module in model.named_modules()
            if name and name not in self.unfit and _kind(module) == kind
        ]
        opaque = {**self.opaque, **dict.fromkeys(alike, reason)}
        return {
            name: why
            for name, why in opaque.items()
            if not any(name.startswith(f"{outer}.") for outer in opaque)
        }


def _kind(module: nn.Module) -> Any:
    """A key that is equal for modules whose forward very likely runs the same code."""
    attributes = sorted(
        (name, type(value).__qualname__, value if isinstance(value, bool) else None)
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training"
    )
    return type(module), repr(attributes)
