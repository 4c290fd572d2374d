"""Limits that a choice of bits must keep: bytes of the model, or time of its layers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tfmq_fx.core.errors import ConfigError

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_TIMES = {"us": 1.0, "ms": 1e3, "s": 1e6}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*(time)?\s*", re.IGNORECASE)
_HELP = (
    'a number of bytes (1500000), a string with a unit ("900KiB", "1.5MB"), a share of the '
    'floating-point model\'s bytes ("0.3x"), a time of all layers ("8ms"), a share of what they '
    'take in floating point ("0.5x time"), or several of these'
)


@dataclass(frozen=True, slots=True)
class Budget:
    """bytes: of all parameters and buffers, at most.  micros: of all planned layers in one call, at
    most, in microseconds.  inf is no limit."""

    bytes: float = math.inf
    micros: float = math.inf


def read_budget(given: object, *, float_bytes: int, float_micros: float) -> Budget:
    """The limits that `given` means, see the error's text for what may be given.

    float_bytes: of the model in floating point.  float_micros: of its layers there.
    Raises ConfigError for anything else, and for limits that are not positive.
    """
    if isinstance(given, Sequence) and not isinstance(given, str):
        parts = [
            read_budget(each, float_bytes=float_bytes, float_micros=float_micros) for each in given
        ]
        if not parts:
            raise ConfigError(f"budget is empty; give {_HELP}")
        return Budget(min(p.bytes for p in parts), min(p.micros for p in parts))
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return Budget(bytes=given)
    found = _NUMBER.fullmatch(given) if isinstance(given, str) else None
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"budget {given!r} is not understood; give {_HELP}")
    amount, unit, timed = float(found[1]), found[2].lower(), found[3] is not None
    if unit == "x":
        if timed:
            return Budget(micros=amount * float_micros)
        return Budget(bytes=math.floor(amount * float_bytes))
    if unit in _TIMES and not timed:
        return Budget(micros=amount * _TIMES[unit])
    if unit in _UNITS and not timed:
        return Budget(bytes=math.floor(amount * _UNITS[unit]))
    raise ConfigError(f"budget {given!r} is not understood; give {_HELP}")


def asks_for_time(given: object) -> bool:
    """Whether a budget limits time, so that layers must be timed."""
    if isinstance(given, Sequence) and not isinstance(given, str):
        return any(map(asks_for_time, given))
    return isinstance(given, str) and math.isfinite(
        read_budget(given, float_bytes=1, float_micros=1.0).micros
    )
