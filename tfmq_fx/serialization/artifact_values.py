"""What a saved model keeps for the caller, as JSON and back."""

from __future__ import annotations

import math
from typing import Any

from tfmq_fx.core.errors import ArtifactError

# ---------------------------------------------------------------- JSON


def json_of(value: Any, where: str) -> Any:
    """`value` in JSON's own types, with a tag for the floats that JSON lacks."""
    if type(value) is int and abs(value) >= 1 << 64:
        raise ArtifactError(f"{where}: {value!r:.40} does not fit into 64 bits")
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, list | tuple):
        return [json_of(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, dict):
        if set(value) == {"$float"}:
            raise ArtifactError(f"{where}: the key '$float' stands for numbers that JSON lacks")
        for key in value:
            if type(key) is not str:
                raise ArtifactError(f"{where}: key {key!r} is not a string")
        return {k: json_of(v, f"{where}[{k!r}]") for k, v in value.items()}
    raise ArtifactError(f"{where}: a {type(value).__name__} cannot be written as JSON")


def from_json_value(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [from_json_value(v, where) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"$float"}:
        if value["$float"] not in ("inf", "-inf", "nan"):
            raise ArtifactError(f"{where}: {value!r:.80} is no number")
        return float(value["$float"])
    return {k: from_json_value(v, where) for k, v in value.items()}
