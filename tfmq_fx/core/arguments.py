"""Check the arguments of public functions; every error names the argument."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import nn

from .errors import ConfigError, TfmqError


def path_of(value: Any, name: str, kind: type[TfmqError] = ConfigError) -> Path:
    """Convert a path or text to a Path; anything else raises `kind`."""
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise kind(f"{name} must be a path, not a {type(value).__name__}")
    if not text or "\0" in text:
        raise kind(f"{name} must be a path, which {text!r} is not")
    return Path(text)


def check_module(value: Any, name: str) -> None:
    """Raise ConfigError unless `value` is a torch module."""
    if not isinstance(value, nn.Module):
        raise ConfigError(f"{name} must be a torch.nn.Module, not a {type(value).__name__}")


def check_whole(value: Any, name: str, least: int) -> None:
    """Raise ConfigError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{name} must be a whole number, at least {least}, got {value!r}")


def check_number(value: Any, name: str) -> None:
    """Raise ConfigError unless `value` is a number or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
        raise ConfigError(f"{name} must be a number or None, got {value!r}")


def check_many(value: Any, name: str, of: str) -> None:
    """Raise ConfigError unless `value` is an iterable or None; `of` names its items."""
    if value is not None and not isinstance(value, Iterable):
        raise ConfigError(f"{name} must be a sequence of {of}, not a {type(value).__name__}")


def check_names(value: Any, name: str, of: str) -> None:
    """Raise ConfigError unless `value` is a mapping with text keys; `of` names its values."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        actual = (
            f"keys {list(value)}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
        )
        raise ConfigError(f"{name} must be a dict, names -> {of}, not {actual}")


def check_dynamic(value: Any) -> None:
    """Raise ConfigError unless `value` names free sizes, of all inputs or input by input."""
    if not isinstance(value, Mapping):
        return check_many(value, "dynamic", "names")
    check_names(value, "dynamic", "{dim: name of its size}")
    for name, sizes in value.items():
        pairs = sizes.items() if isinstance(sizes, Mapping) else [(None, sizes)]
        if not all(isinstance(dim, int) and isinstance(size, str) for dim, size in pairs):
            raise ConfigError(
                f"dynamic: {name!r} must have a dict, dim -> name of its size, got {sizes!r}"
            )
