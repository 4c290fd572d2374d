"""Check the fields of configuration values against their declared types and ranges."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin

from .errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def check_types(spec: Any) -> None:
    """Refuse a field whose value is not of its declared type; iterables become tuples."""
    kind: type = type(spec)
    hints = field_types(kind)
    for each in dataclasses.fields(spec):
        value, hint = getattr(spec, each.name), hints[each.name]
        wants_tuple = str(each.type).startswith("tuple")
        if wants_tuple and isinstance(value, Iterable) and not isinstance(value, str):
            value = tuple(value)
            object.__setattr__(spec, each.name, value)
        is_literal = get_origin(hint) is Literal
        text = f"one of {get_args(hint)}" if is_literal else f"of type {each.type}"
        require(
            _is_a(value, hint), f"{kind.__name__}.{each.name} must be {text}, got {value!r:.80}"
        )


def check_range(spec: Any, low: float, high: float, *names: str) -> None:
    """Refuse a field below `low` or above `high`; None passes, and `high` may be infinite."""
    for name in names:
        value = getattr(spec, name)
        text = f"at least {low}" if math.isinf(high) else f"{low} to {high}"
        require(
            value is None or low <= value <= high,
            f"{type(spec).__name__}.{name} must be {text}, got {value!r}",
        )


@functools.cache
def spec_fields(kind: type) -> dict[str, type]:
    """The class of each field of `kind` that holds a configuration value of its own."""
    return {
        name: part
        for name, hint in field_types(kind).items()
        for part in (hint, *get_args(hint))
        if dataclasses.is_dataclass(part) and isinstance(part, type)
    }


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """The declared type of each field of a configuration class."""
    return typing.get_type_hints(kind)


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of a declared type: a class, Literal, union, or tuple[item, ...]."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in parts
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_a(each, parts[0]) for each in value)
    if parts:
        return any(_is_a(value, part) for part in parts)
    kind = {int: Integral, float: Real}.get(hint, hint)
    return isinstance(value, kind) and (hint is bool or not isinstance(value, bool))
