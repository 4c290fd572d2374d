"""Find the layers and temporal features that are broken, or cost a quantized model most."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .feature_errors import FeatureError
from .layer_errors import SiteError

MOST = 10  # culprits reported


@dataclass(frozen=True, slots=True)
class Culprit:
    """A layer ("site") or temporal feature with a large error.

    sqnr: its worst signal to noise in dB, on the reference's inputs, at `timestep`.  broken:
    whether its error is beyond what its bits explain.  note: the fault in words.
    """

    name: str
    kind: Literal["site", "feature"]
    sqnr: float
    timestep: float
    broken: bool
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
    """At most ten culprits: what is broken first, then the worst.

    steps: the timestep of each sample that sites were measured on, (E,).  timesteps: (K,), the set
    that features were measured on.
    """
    ranked = list[tuple[float, Culprit]]()
    for site in sites:
        sqnr, t = worst(site.alone, steps)
        culprit = Culprit(site.name, "site", sqnr, t, site.broken, site.note)
        ranked.append((site.pooled, culprit))
    for each in features:
        if bool((each.errors != 0).any()):
            place, t = each.worst, float(timesteps[each.worst])
            note, sqnr = each.note(timesteps), _decibels(float(each.errors[place]))
            culprit = Culprit(each.name, "feature", sqnr, t, each.broken, note)
            root_mean_square = float(each.errors.norm()) / math.sqrt(len(timesteps))
            ranked.append((_decibels(root_mean_square), culprit))
    # NaN is noise without signal
    ranked.sort(
        key=lambda each: (not each[1].broken, -math.inf if math.isnan(each[0]) else each[0])
    )
    return [culprit for _, culprit in ranked[:MOST]]


def _decibels(error: float) -> float:
    """A relative error as signal to noise in dB."""
    return -20 * math.log10(error) if error != 0 else math.inf
