"""Checks that configuration values make of themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, get_args

from .errors import ConfigError


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def one_of(name: str, value: Any, choices: Any) -> None:
    require(value in get_args(choices), f"{name} must be one of {get_args(choices)}, got {value!r}")


def check_kinds(config: Any) -> None:
    """Refuse a field that holds another kind of value than is declared."""
    for each in dataclasses.fields(config):
        kinds, value = str(each.type).split(" | "), getattr(config, each.name)
        if value is None and "None" in kinds:
            continue
        if kinds[0] == "int":
            fits = isinstance(value, Integral) and not isinstance(value, bool)
        elif kinds[0] == "float":
            fits = isinstance(value, Real) and not isinstance(value, bool)
        elif kinds[0] == "bool":
            fits = isinstance(value, bool)
        elif kinds[0].startswith("tuple"):
            fits = isinstance(value, Iterable) and not isinstance(value, str)
        else:
            fits = not isinstance(kind := globals().get(kinds[0]), type) or isinstance(value, kind)
        require(
            fits, f"{type(config).__name__}.{each.name} must be of type {each.type}, got {value!r}"
        )
