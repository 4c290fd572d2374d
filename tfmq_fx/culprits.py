"""The layers and temporal features that cost a quantized model most, and what would fix each.

Each change is made alone, in a copy of the graph, and its gain measured at the model's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx

from .feature_errors import FeatureError, with_rows
from .fixes import Fix, Unrounded, float_inputs, float_weights, more_bits, requantized
from .graph import fork
from .progress import progress_bar
from .site_errors import SiteError
from .tables import cache_rows, restore_rows

MOST = 10  # culprits reported
AGAIN = "requantized at the same bits"
_WORTH = 0.1  # dB; another seed changes a gain by about as much
_NEARLY = 0.8  # of the largest gain is as good as all of it, where it costs less

Change = Callable[[fx.GraphModule], object]  # in place
Measure = Callable[[fx.GraphModule], float]  # SQNR in dB of a graph's outputs


@dataclass(frozen=True, slots=True)
class Culprit:
    """A layer ("site") or temporal feature, and what changing it alone would gain.

    sqnr: its worst signal to noise in dB, on the reference's inputs, at `timestep`.  broken: is its
    error beyond what its bits explain.  suspect: does its input range stand out among the others.
    fixes: (what, gain of the model's output in dB) of every change that was tried, the cheapest
    first.  note: what else is known.
    """

    name: str
    kind: Literal["site", "feature"]
    sqnr: float
    timestep: float
    broken: bool
    suspect: bool = False
    fixes: tuple[tuple[str, float], ...] = ()
    note: str = ""

    @property
    def fix(self) -> tuple[str, float] | None:
        """The cheapest change that gains (nearly) most; None where none gains 0.1 dB.

        To quantize a sound layer again is none: its ranges would be those of the very inputs that
        it is measured on.
        """
        sound = not (self.broken or self.suspect)
        offered = [fix for fix in self.fixes if not (sound and fix[0] == AGAIN)]
        most = max((gain for _, gain in offered), default=0.0)
        if most < _WORTH:
            return None
        return next(fix for fix in offered if fix[1] >= _NEARLY * most)

    @property
    def gain(self) -> float:
        """What the proposed change gains, in dB; 0 where there is none."""
        return 0.0 if self.fix is None else self.fix[1]

    def __str__(self) -> str:
        if self.fix is not None:
            told = f"{self.fix[0]}: {self.fix[1]:+.1f} dB"
        else:
            told = f"no change of it alone gains {_WORTH:g} dB" if self.fixes else ""
        return "; ".join(filter(None, (told, self.note)))


@dataclass(slots=True)
class _Candidate:
    """A culprit before its fixes are measured.  off: how far its input range is from those of other
    layers, a logarithm.  pooled: SQNR in dB over all samples."""

    culprit: Culprit
    off: float
    pooled: float
    changes: Callable[[], list[tuple[str, Change]]]

    def order(self) -> tuple[float, ...]:
        """First what is broken, by what it costs at the output, then ranges that stand out, by how
        far, then what costs most."""
        broken = self.culprit.broken
        return (not broken, 0.0 if broken else -self.off, -self.culprit.gain, self.pooled)


def find_culprits(
    model: fx.GraphModule,
    sites: Iterable[SiteError],
    features: Iterable[FeatureError],
    *,
    steps: Tensor,
    timesteps: Tensor,
    measure_at: Callable[[Sequence[float]], Measure] | None,
    progress: bool = False,
) -> list[Culprit]:
    """At most ten: what is broken, then layers whose input ranges stand out, then the worst.

    sites, features: of `model` against its reference.  steps: the timestep of each sample that
    sites were measured on, (E,).  timesteps: (K,), the model's set.  measure_at: how outputs are
    measured, on samples of these timesteps among others; None leaves fixes out.
    """
    tables = dict(model.named_buffers())
    found = [_site(site, steps, tables) for site in sites]
    found += [_feature(f, timesteps) for f in features if bool((f.errors != 0).any())]
    found = sorted(found, key=_Candidate.order)[:MOST]
    if measure_at is None:
        return [each.culprit for each in found]
    measure = measure_at([each.culprit.timestep for each in found])
    before = measure(model)
    for each in progress_bar(found, "fixes", enabled=progress):
        gains = []
        for what, change in each.changes():
            changed = fork(model)
            change(changed)
            gains.append((what, _gain(before, measure(changed))))
        each.culprit = replace(each.culprit, fixes=tuple(gains))
    found.sort(key=_Candidate.order)
    return [each.culprit for each in found]


def _site(site: SiteError, steps: Tensor, tables: Mapping[str, Tensor]) -> _Candidate:
    culprit = Culprit(
        site.part.name,
        "site",
        float(site.found[site.worst]),
        float(steps[site.worst]),
        site.broken,
        site.suspect,
        note="; ".join(site.remarks),
    )

    def changes() -> list[tuple[str, Change]]:
        leaves = site.part.leaves
        fixes: list[tuple[str, Fix]] = []
        if site.rebuilt:
            fixes.append((AGAIN, requantized(leaves, site.ranges, tables)))
        if site.rebuilt and any(leaf.layer.weight_bits < 8 for leaf in leaves):
            fixes.append(("weights at 8 bits", more_bits(leaves, 8)))
        if any(leaf.layer.act_bits is not None for leaf in leaves):
            fixes.append(("input in float", float_inputs(leaves)))
        if site.part.products:
            products = Fix({path: Unrounded() for path in site.part.products})
            fixes.append(("operands in float", products))
        if site.rebuilt:
            fixes.append(("weights in float", float_weights(leaves)))
        return [(what, fix.apply_) for what, fix in fixes]

    off = abs(math.log(site.input_ratio)) if site.suspect and site.input_ratio > 0 else 0.0
    return _Candidate(culprit, off, _finite(site.pooled), changes)


def _feature(feature: FeatureError, timesteps: Tensor) -> _Candidate:
    wrong = feature.wrong
    errors = feature.errors.nan_to_num(nan=math.inf)
    worst = int(torch.where(wrong, errors, -1.0).argmax() if wrong.any() else errors.argmax())
    notes = []
    if feature.broken:
        if wrong.sum() > 1:
            notes.append(f"wrong at {int(wrong.sum())} of {len(wrong)} timesteps")
        if (twin := feature.twin(worst)) is not None:
            notes.append(
                f"at t={float(timesteps[worst]):g} it has the row of t={float(timesteps[twin]):g}"
            )

    def level(error: float) -> float:
        return -20 * math.log10(error) if error > 0 else math.inf

    def changes() -> list[tuple[str, Change]]:
        rows, found = feature.rows, list[tuple[str, Tensor]]()
        if feature.form == "table":
            found.append(("rows from the reference", rows))
        elif feature.form == "cache":
            if feature.broken:
                found.append((AGAIN, feature.stored))
            if feature.bits is not None and feature.bits < 8:
                cached = restore_rows(*cache_rows(rows.flatten(1), 8))
                found.append(("rows at 8 bits", cached.to(rows.dtype).view_as(rows)))
            found.append(("exact rows", rows))
        else:
            found.append(("exact rows", rows))
        return [(what, with_rows(feature.node, new, timesteps)) for what, new in found]

    mean = float(feature.errors.double().square().mean().sqrt())
    culprit = Culprit(
        feature.name,
        "feature",
        level(float(errors[worst])),
        float(timesteps[worst]),
        feature.broken,
        note="; ".join(notes),
    )
    return _Candidate(culprit, 0.0, _finite(level(mean)), changes)


def _gain(before: float, after: float) -> float:
    """The difference in dB."""
    before, after = _finite(before), _finite(after)
    return 0.0 if before == after else after - before


def _finite(value: float) -> float:
    """The value; NaN counts as noise without signal, -inf."""
    return -math.inf if math.isnan(value) else value
