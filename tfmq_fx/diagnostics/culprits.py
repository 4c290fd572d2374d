"""The layers and temporal features that are broken, or cost a quantized model most."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from .feature_errors import FeatureError
from .layer_errors import SiteError

MOST = 10  # culprits reported


@dataclass(frozen=True, slots=True)
class Culprit:
    """A layer ("site") or temporal feature, and what is known of its error.

    sqnr: its worst signal to noise in dB, on the reference's inputs, at `timestep`.  broken: is its
    error beyond what its bits explain.  suspect: does its input range stand out among the others.
    note: why, in words.
    """

    name: str
    kind: Literal["site", "feature"]
    sqnr: float
    timestep: float
    broken: bool
    suspect: bool = False
    note: str = ""


def worst(values: Tensor, steps: Tensor) -> tuple[float, float]:
    """The worst SQNR of some samples, NaN before all, and its timestep."""
    place = int(values.nan_to_num(nan=-math.inf).argmin())
    return float(values[place]), float(steps[place])


def find_culprits(
    sites: Iterable[SiteError],
    features: Iterable[FeatureError],
    *,
    steps: Tensor,
    timesteps: Tensor,
) -> list[Culprit]:
    """At most ten: what is broken, then layers whose input ranges stand out, then the worst.

    steps: the timestep of each sample that sites were measured on, (E,).  timesteps: (K,), the set
    that features were measured on.
    """
    found = list[tuple[tuple[float, ...], Culprit]]()
    for site in sites:
        off = abs(math.log(site.input_ratio)) if site.suspect and site.input_ratio > 0 else 0.0
        order = (not site.broken, 0.0 if site.broken else -off, _finite(site.pooled))
        sqnr, t = worst(site.alone, steps)
        flags = site.broken, site.suspect
        found.append((order, Culprit(site.name, "site", sqnr, t, *flags, site.note)))
    for each in features:
        if bool((each.errors != 0).any()):
            place = each.worst
            mean, most = (_level(float(e)) for e in (each.errors.norm(), each.errors[place]))
            mean += 10 * math.log10(len(timesteps))
            culprit = Culprit(each.name, "feature", most, float(timesteps[place]), each.broken)
            culprit = replace(culprit, note=each.note(timesteps))
            found.append(((not each.broken, 0.0, _finite(mean)), culprit))
    return [culprit for _, culprit in sorted(found, key=lambda each: each[0])[:MOST]]


def _level(error: float) -> float:
    """A relative error as signal to noise in dB."""
    return -20 * math.log10(error) if error != 0 else math.inf


def _finite(value: float) -> float:
    """The value; NaN counts as noise without signal, -inf."""
    return -math.inf if math.isnan(value) else value
