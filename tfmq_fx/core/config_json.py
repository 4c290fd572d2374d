"""Configuration values as plain dictionaries, and back."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any, Literal, get_args

from .config import NESTED, Config
from .errors import ConfigError


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration value as plain JSON-ready dicts."""
    return dataclasses.asdict(config)


def from_dict(data: Any, kind: type = Config) -> Any:
    """The configuration value saved by `to_dict`. Raises ConfigError on an unknown key and on a
    value of another type."""
    if not isinstance(data, dict):
        raise ConfigError(f"{kind.__name__}: expected a dict, got {data!r:.80}")
    hints = _hints(kind)
    if unknown := sorted(map(str, set(data) - set(hints))):
        raise ConfigError(f"{kind.__name__}: unknown keys {unknown}; known are {sorted(hints)}")
    values = {
        key: from_dict(value, NESTED[key]) if isinstance(value, dict) and key in NESTED else value
        for key, value in data.items()
    }
    for key, value in values.items():
        if not _is_a(value, hints[key]):
            raise ConfigError(f"{kind.__name__}.{key}: {value!r:.80} is no {hints[key]}")
    return kind(**values)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The fields of a configuration and their types."""
    return typing.get_type_hints(kind)


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as the fields here are declared; lists are tuples."""
    parts = get_args(hint)
    if typing.get_origin(hint) is Literal:
        return type(value) is str and value in parts
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (tuple, list)) and all(_is_a(each, parts[0]) for each in value)
    if parts:
        return any(_is_a(value, part) for part in parts)
    if hint in (int, float):
        whole = hint is float or type(value) is int or (type(value) is float and value % 1 == 0)
        return type(value) in (int, float) and whole
    return type(value) is hint
