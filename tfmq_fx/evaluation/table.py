"""Rows of an evaluation, each a recipe over its seeds, as Markdown and JSON; none is left out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tfmq_fx.serialization.json_values import without_infinities

from .result_store import DONE, FAILED, NOT_RUN

_LONGEST = 120  # characters of an error in a table


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure over the seeds that have it."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One recipe on one model.

    model, recipe, bits: as in `result_store.Cell`.  results: by seed, what `Cells.read` answers;
    None is not run.
    """

    model: str
    recipe: str
    bits: str
    results: Mapping[int, Mapping[str, Any] | None]

    @property
    def done(self) -> list[Mapping[str, Any]]:
        """Results with figures."""
        return [each for each in self.results.values() if each and each["status"] == DONE]

    @property
    def failed(self) -> dict[int, str]:
        """Errors by seed."""
        found = self.results.items()
        return {seed: str(r["error"]) for seed, r in found if r and r["status"] == FAILED}

    @property
    def status(self) -> str:
        """ "done", "failed" or "not run" where that holds for all seeds, else how many of each."""
        missing = sum(each is None for each in self.results.values())
        counts = {DONE: len(self.done), FAILED: len(self.failed), NOT_RUN: missing}
        present = {name: count for name, count in counts.items() if count}
        if len(present) == 1:
            return next(iter(present))
        return ", ".join(f"{count} {name}" for name, count in present.items())

    def values(self, name: str) -> list[float]:
        """A figure by seed; those that have none are left out."""
        flat = [_flat(each["figures"]) | {"steps": each.get("steps")} for each in self.done]
        return [float(each[name]) for each in flat if each.get(name) is not None]

    def spread(self, name: str) -> Spread | None:
        """Mean, lowest and highest of a figure over seeds; None where no seed has it."""
        found = self.values(name)
        if not found:
            return None
        return Spread(mean=statistics.fmean(found), low=min(found), high=max(found))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: names, status, each figure's spread, and the results by seed."""
        names = {name for each in self.done for name in _flat(each["figures"])}
        spreads = {name: self.spread(name) for name in sorted(names) if name not in _TEXTS}
        found: dict[str, Any] = without_infinities(
            {
                "model": self.model,
                "recipe": self.recipe,
                "bits": self.bits,
                "status": self.status,
                "figures": {
                    name: {"mean": s.mean, "low": s.low, "high": s.high}
                    for name, s in spreads.items()
                    if s is not None
                },
                "seeds": {str(seed): result for seed, result in self.results.items()},
            }
        )
        return found


_TEXTS = ("backend", "backend_note", "sqnr_by_step", "temporal_by_step")


def _flat(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of images and pairs beside the rest."""
    rest = {name: v for name, v in figures.items() if name not in ("images", "pairs")}
    return {**(figures["images"] or {}), **(figures["pairs"] or {}), **rest}


def markdown(rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """All rows, two tables a model, under what holds for all of them: `facts`, by name."""
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        lines += ["", f"## {model}", "", *_images(own), "", *_models(own)]
        if notes := _notes(own):
            lines += ["", *notes]
    return "\n".join(lines) + "\n"


def _images(rows: Sequence[Row]) -> list[str]:
    asked = any(row.spread("class_agreement") for row in rows)
    names = ["", "bits", "FID", "95 %", "sFID", "IS", *(["class asked for"] if asked else [])]
    names += ["confident", "precision", "recall", "PSNR dB", "SSIM", "feature distance", "seeds"]
    lines = _head(names)
    for row in rows:
        texts = [
            _spread(row, "fid", 2),
            _interval(row),
            _spread(row, "sfid", 2),
            _spread(row, "inception_score", 2),
            *([_share(row, "class_agreement")] if asked else []),
            _share(row, "confident"),
            _share(row, "precision"),
            _share(row, "recall"),
            _spread(row, "psnr", 1),
            _spread(row, "ssim", 4),
            _spread(row, "feature_distance", 3),
        ]
        lines.append(_line([row.recipe, row.bits, *texts, _state(row)]))
    return lines


def _models(rows: Sequence[Row]) -> list[str]:
    names = ["", "bits", "steps a block", "output SQNR dB", "pooled", "temporal error mean"]
    names += ["worst", "KiB", "weights", "inputs", "quantize s", "sample s", "sampled on"]
    lines = _head(names)
    for row in rows:
        size = row.spread("bytes")
        backends = dict.fromkeys(str(r["figures"]["backend"]) for r in row.done)
        texts = [
            _spread(row, "steps", 0),
            _spread(row, "sqnr", 1),
            _spread(row, "sqnr_pooled", 1),
            _spread(row, "temporal_mean", 4),
            _spread(row, "temporal_worst", 4),
            f"{size.mean / 1024:.0f}" if size else "",
            _share(row, "weights"),
            _share(row, "inputs"),
            _spread(row, "quantize_seconds", 0),
            _spread(row, "sample_seconds", 0),
            ", ".join(backends),
        ]
        lines.append(_line([row.recipe, row.bits, *texts]))
    return lines


def _notes(rows: Sequence[Row]) -> list[str]:
    """Why something did not sample on the backend asked for."""
    found: dict[str, None] = {}
    for row in rows:
        for each in row.done:
            if note := each["figures"]["backend_note"]:
                found[f"- {row.recipe} {row.bits}".rstrip() + f" sampled in eager mode: {note}"] = (
                    None
                )
    return list(found)


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), "|" + "---|" * len(names)]


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _spread(row: Row, name: str, digits: int, scale: float = 1.0, unit: str = "") -> str:
    """Mean and, over several seeds, lowest to highest."""
    found = row.spread(name)
    if found is None:
        return ""
    mean, low, high = (f"{scale * v:.{digits}f}" for v in (found.mean, found.low, found.high))
    several = len(row.values(name)) > 1 and low != high
    return f"{mean}{unit} ({low} to {high})" if several else f"{mean}{unit}"


def _share(row: Row, name: str) -> str:
    return _spread(row, name, 1, 100, " %")


def _interval(row: Row) -> str:
    """The bootstrap intervals of all seeds, from the lowest end to the highest."""
    low, high = row.values("fid_low"), row.values("fid_high")
    return f"{min(low):.2f} to {max(high):.2f}" if low else ""


def _state(row: Row) -> str:
    """How many seeds, or what became of them."""
    if row.status == DONE:
        return str(len(row.results))
    errors = list(dict.fromkeys(row.failed.values()))
    text = row.status
    if errors:
        shown = " ".join(errors[0].split()).replace("|", "/")
        text += f": {shown[:_LONGEST]}" + ("..." if len(shown) > _LONGEST else "")
    return f"**{text}**"
