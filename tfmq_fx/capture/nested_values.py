"""Represent nested values and size expressions as plain data: take apart, rebuild, evaluate, save.

`call_json` reads the saved form.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.core.output_classes import class_name

OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "pow": operator.pow,
    "max": max,
    "min": min,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "not": operator.not_,
    "and": lambda *operands: all(operands),
    "or": lambda *operands: any(operands),
}

# A size expression: a number, the name of a size, or an operator and its operands, nested.
Expression = int | float | bool | str | tuple[Any, ...]


def evaluate(expression: Expression, sizes: dict[str, int]) -> Any:
    """The value of a size expression for `sizes`, by name."""
    if isinstance(expression, str):
        return sizes[expression]
    if not isinstance(expression, tuple):
        return expression
    return OPERATORS[expression[0]](*(evaluate(operand, sizes) for operand in expression[1:]))


@dataclass(frozen=True, slots=True)
class Leaf:
    """The place of a tensor in a structure."""

    index: int


@dataclass(frozen=True, slots=True)
class Const:
    """A constant value in a structure, which the captured graph depends on."""

    value: Any


@dataclass(frozen=True, slots=True)
class Branch:
    """A container in a structure.

    kind: dict, list, tuple, object (cls builds it from its fields) or samples: a list with an
    element for each sample, each equal to the only child.
    """

    kind: str
    keys: tuple[Any, ...]
    children: tuple[Leaf | Const | Branch, ...]
    cls: Any = None


Structure = Leaf | Const | Branch


def outline(value: Any, path: str = "") -> tuple[Structure, list[tuple[str, Any]]]:
    """The structure of a nested value, and its tensors in order, with their dotted paths."""
    leaves: list[tuple[str, Any]] = []
    return _outline(value, path, leaves), leaves


def _outline(value: Any, path: str, leaves: list[tuple[str, Any]]) -> Structure:
    if isinstance(value, Tensor):
        leaves.append((path, value))
        return Leaf(len(leaves) - 1)
    kind, cls = "object", type(value)
    items: list[tuple[Any, Any]]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, dict):
        kind, items = "dict", list(value.items())
    elif isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        items = [*enumerate(value)]
    else:
        return Const(value)
    children = tuple(
        _outline(item, f"{path}.{key}" if path else str(key), leaves) for key, item in items
    )
    keys = tuple(key for key, _ in items)
    return Branch(kind, keys, children, cls if kind == "object" else None)


def per_sample(structure: Structure, count: int) -> Structure:
    """The structure with a list of `count` equal constants as one constant for each sample."""
    if not isinstance(structure, Branch) or structure.kind != "list" or has_leaves(structure):
        return structure
    if len(structure.children) != count or len(set(map(repr, structure.children))) != 1:
        return structure
    return Branch("samples", (0,), structure.children[:1])


def rebuild(structure: Structure, leaves: Sequence[Any], samples: int = 1) -> Any:
    """The nested value with `leaves` as its tensors, for a batch of `samples`."""
    if isinstance(structure, Leaf):
        return leaves[structure.index]
    if isinstance(structure, Const):
        return structure.value
    values = [rebuild(child, leaves, samples) for child in structure.children]
    if structure.kind == "samples":
        return values * samples
    if structure.kind == "list":
        return values
    if structure.kind == "tuple":
        return tuple(values)
    fields = dict(zip(structure.keys, values, strict=True))
    return fields if structure.kind == "dict" else structure.cls(**fields)


def has_leaves(structure: Structure) -> bool:
    """Whether a structure holds any tensor."""
    if isinstance(structure, Branch):
        return any(has_leaves(child) for child in structure.children)
    return isinstance(structure, Leaf)


def dump_expression(expression: Expression) -> Any:
    """A size expression in JSON-ready form."""
    if isinstance(expression, tuple):
        return [dump_expression(item) for item in expression]
    return expression


def dump(structure: Structure) -> Any:
    """A structure in JSON-ready form; raises ArtifactError for constants that cannot be saved."""
    if isinstance(structure, Leaf):
        return {"leaf": structure.index}
    if isinstance(structure, Const):
        value = structure.value
        if isinstance(value, torch.dtype):
            return {"dtype": str(value)[6:]}
        if not isinstance(value, (type(None), bool, int, float, str)):
            raise ArtifactError(f"a constant argument {value!r} cannot be saved")
        return {"const": value}
    if not all(isinstance(key, (type(None), bool, int, float, str)) for key in structure.keys):
        raise ArtifactError(f"a dict with keys {structure.keys!r:.80} cannot be saved")
    cls = structure.cls
    return {
        "kind": structure.kind,
        "keys": list(structure.keys),
        "children": [dump(child) for child in structure.children],
        "class": class_name(cls) if cls else None,
    }
