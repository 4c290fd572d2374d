"""How many learning steps fit into a given time: short runs, a line through them, solved."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import write_whole

PROBES = (4, 12)  # steps of the short runs; multiples of 4, as rounds of resampling take a quarter
_RISE = 1.1  # the longer must take so much longer, or the cost of a step drowns in noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Seconds of a run by its learning steps: fixed + per_step * steps.

    probes: steps and seconds of the runs measured; the line goes through the first and the last.
    """

    fixed: float
    per_step: float
    probes: list[tuple[int, float]]

    def steps(self, target: float, *, most: int) -> int:
        """Steps that take about `target` seconds, 1 to `most`: 1 where not even those fit."""
        if self.per_step <= 0:
            return most if self.fixed <= target else 1
        return max(1, min(int((target - self.fixed) / self.per_step), most))


def fit_line(seconds: Callable[[int], float], *, most: int) -> Line:
    """The line of a recipe.

    seconds: runs so many steps and answers how long that took. Called twice, and again with four
    times the steps as long as they make little difference.  most: steps that no run exceeds.
    """
    first, steps = (min(n, most) for n in PROBES)
    probes = [(first, seconds(first))]
    while steps > first:
        probes.append((steps, seconds(steps)))
        if steps == most or probes[-1][1] >= _RISE * probes[0][1]:
            break
        steps = min(4 * steps, most)
    (fewer, short), (more, long) = probes[0], probes[-1]
    per_step = max((long - short) / (more - fewer), 0.0) if more > fewer else 0.0
    return Line(fixed=short - fewer * per_step, per_step=per_step, probes=probes)


class Timings:
    """Seconds that were measured on a machine, kept in a directory by what they are of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def target(self, key: str) -> float | None:
        """The time kept as `key`."""
        found = self._read(key)
        return None if found is None else float(found["seconds"])

    def keep_target(self, key: str, seconds: float) -> None:
        """Keep a time that others are to take."""
        self._write(key, {"seconds": seconds})

    def line(self, key: str, measure: Callable[[], Line]) -> Line:
        """The line kept as `key`, or else the one that `measure` finds."""
        found = self._read(key)
        if found is not None:
            probes = [(int(n), float(s)) for n, s in found["probes"]]
            return Line(fixed=found["fixed"], per_step=found["per_step"], probes=probes)
        line = measure()
        kept = {"fixed": line.fixed, "per_step": line.per_step, "probes": line.probes}
        self._write(key, kept)
        return line

    def _read(self, key: str) -> dict[str, Any] | None:
        """None where there is nothing, or nothing that can be read: it is measured again."""
        try:
            found = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _write(self, key: str, found: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / f"{key}.json", json.dumps(found))
