"""Parse the budget of a bit plan: bytes of the model, or time of its layers."""

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
    """The limits of a bit plan; inf is no limit.

    bytes: of all parameters and buffers.  micros: microseconds of one call of all planned layers.
    """

    bytes: float = math.inf
    micros: float = math.inf


def read_budget(budget: object, *, float_bytes: int, float_micros: float) -> Budget:
    """Parse a budget; `_HELP` lists the accepted forms.

    float_bytes, float_micros: size of the model and time of its layers in floating point.
    Raises ConfigError for anything else, and for limits that are not positive.
    """
    if isinstance(budget, Sequence) and not isinstance(budget, str):
        parts = [
            read_budget(each, float_bytes=float_bytes, float_micros=float_micros) for each in budget
        ]
        if not parts:
            raise ConfigError(f"budget is empty; give {_HELP}")
        return Budget(min(p.bytes for p in parts), min(p.micros for p in parts))
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return Budget(bytes=budget)
    match = _NUMBER.fullmatch(budget) if isinstance(budget, str) else None
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"budget {budget!r} is not understood; give {_HELP}")
    amount, unit, timed = float(match[1]), match[2].lower(), match[3] is not None
    if unit == "x":
        if timed:
            return Budget(micros=amount * float_micros)
        return Budget(bytes=math.floor(amount * float_bytes))
    if unit in _TIMES and not timed:
        return Budget(micros=amount * _TIMES[unit])
    if unit in _UNITS and not timed:
        return Budget(bytes=math.floor(amount * _UNITS[unit]))
    raise ConfigError(f"budget {budget!r} is not understood; give {_HELP}")


def asks_for_time(budget: object) -> bool:
    """Whether a budget limits time, so that layers must be timed."""
    if isinstance(budget, Sequence) and not isinstance(budget, str):
        return any(map(asks_for_time, budget))
    return isinstance(budget, str) and math.isfinite(
        read_budget(budget, float_bytes=1, float_micros=1.0).micros
    )
