"""The result of comparing a model with its reference, as text and as plain data."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.files import write_whole
from tfmq_fx.serialization.json_values import without_infinities

from .culprits import Culprit

EXACT_ELSEWHERE = 1e-5  # relative difference that float reassociation leaves at batch sizes above 1


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of `verify`. `str()` is for reading, `to_dict()` for programs.

    exact: whether the model claims to be exact (nothing in it is quantized).  equal: whether every
    output was equal bit for bit, at batch 1 where it claims to be.  difference: the largest
    absolute difference there, and relative difference at a larger batch.
    steps: output SQNR in dB at each timestep.  pooled: that of all examples together.
    features: (name, mean, worst) relative error of each temporal feature over the set, and the
    timestep of the worst.
    sites: (name, worst SQNR in dB over steps, timestep), worst first, of each layer (and product of
    attention) alone, on the reference's own inputs.  running: the same of these layers' outputs as
    the model runs, errors from before each included; in execution order.
    culprits: at most ten layers and features, what is broken first, and why.
    changed: parameters in floating point that are not the reference's, at most ten.
    threshold: the pooled SQNR in dB that the model must reach.
    """

    exact: bool
    equal: bool
    difference: tuple[float, float]
    steps: dict[float, float]
    features: list[tuple[str, float, float, float]]
    sites: list[tuple[str, float, float]]
    pooled: float = math.inf
    culprits: list[Culprit] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    threshold: float | None = None
    running: list[tuple[str, float, float]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the model passes.

        An exact model is equal at batch 1 and within 1e-5 elsewhere.  A lossy one is finite, and
        reaches the threshold; without one, nothing in it is broken, and its parameters are the
        reference's.
        """
        if self.exact:
            return self.equal and self.difference[1] <= EXACT_ELSEWHERE
        if not all(value > -math.inf for value in self.steps.values()):  # NaN compares false
            return False
        if self.threshold is not None:
            return self.pooled >= self.threshold
        return not self.changed and not any(culprit.broken for culprit in self.culprits)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready data; numbers that are not finite are "inf", "-inf", "nan"."""

        def site(error: tuple[str, float, float]) -> dict[str, Any]:
            return dict(zip(("name", "sqnr", "timestep"), error, strict=True))

        data = {
            "ok": self.ok,
            "exact": self.exact,
            "equal": self.equal,
            "difference": {"absolute": self.difference[0], "relative": self.difference[1]},
            "pooled": self.pooled,
            "threshold": self.threshold,
            "steps": [{"timestep": t, "sqnr": value} for t, value in self.steps.items()],
            "features": [
                dict(zip(("name", "mean", "worst", "timestep"), feature, strict=True))
                for feature in self.features
            ],
            "sites": list(map(site, self.sites)),
            "running": list(map(site, self.running)),
            "culprits": [dataclasses.asdict(each) for each in self.culprits],
            "changed": list(self.changed),
        }
        plain: dict[str, Any] = without_infinities(data)
        return plain

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON. The file appears complete; raises ConfigError where it
        cannot be written."""
        path = Path(path)
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        try:
            write_whole(path, text)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error}") from error

    def __str__(self) -> str:
        kind = "exact" if self.exact else "lossy"
        threshold = "" if self.threshold is None else f", asked for {self.threshold:g}"
        count = f"{len(self.steps)} timestep{'' if len(self.steps) == 1 else 's'}"
        most, relative = (f"{value:.3g}" for value in self.difference)
        alone = "equal bit for bit" if self.equal else f"differs by {most}"
        outputs = f"batch 1 {alone}, larger batch within {relative} relative"
        if not self.exact:
            outputs = f"outputs within {most}, {relative} relative"
        lines = [f"{kind} model, {'ok' if self.ok else 'NOT OK'}: {outputs}, {count}"]
        if self.pooled != math.inf:
            worst = sorted(self.steps.items(), key=lambda item: item[1])[:5]
            steps = ", ".join(f"t={t:g} {v:.1f}" for t, v in worst)
            lines.append(f"output SQNR {self.pooled:.1f} dB{threshold}; worst steps: {steps}")
        if self.running:
            name, value, t = min(self.running, key=lambda site: (not math.isnan(site[1]), site[1]))
            lines.append(f"as the model runs, {name} is furthest off: {value:.1f} dB at t={t:g}")
        if self.changed:
            lines.append(f"parameters that are not the reference's: {', '.join(self.changed)}")
        if self.culprits:
            width = max(len(each.name) for each in self.culprits)
            lines.append(f"{'culprits':{width + 8}}       SQNR dB  at t  why")
        for each in self.culprits:
            kind = "layer" if each.kind == "site" else "feature"
            state = "BROKEN" if each.broken else ""
            figures = f"{each.sqnr:7.1f} {each.timestep:5g}"
            lines.append(f"{kind:7} {each.name:{width}} {state:6} {figures}  {each.note}")
        return "\n".join(line.rstrip() for line in lines)
