"""Convert configuration values to plain dictionaries and back."""

from __future__ import annotations

import dataclasses
from typing import Any

from .config import Config
from .errors import ConfigError
from .spec_checks import field_types, spec_fields


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a configuration value to JSON-ready dicts."""
    return dataclasses.asdict(config)


def from_dict(data: Any, kind: type = Config) -> Any:
    """Restore the configuration value that `to_dict` converted.

    Raises ConfigError on an unknown key and on a value of another type.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{kind.__name__}: expected a dict, got {data!r:.80}")
    if unknown := sorted(map(str, set(data) - set(field_types(kind)))):
        known = sorted(field_types(kind))
        raise ConfigError(f"{kind.__name__}: unknown keys {unknown}; known are {known}")
    values = dict(data)
    for key, spec in spec_fields(kind).items():
        if isinstance(data.get(key), dict):
            values[key] = from_dict(data[key], spec)
    return kind(**values)
