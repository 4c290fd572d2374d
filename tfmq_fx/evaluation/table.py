"""Print the rows of an evaluation, each one recipe over its seeds, as Markdown and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tfmq_fx.serialization.json_values import without_infinities

from .result_store import DONE, FAILED, NOT_RUN

_LONGEST = 120  # characters of an error in a table
_TEXTS = ("backend", "backend_note", "sqnr_by_step", "temporal_by_step")


class Spread(NamedTuple):
    """The mean, lowest and highest value of a figure over the seeds that have it."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The results of one recipe on one model.

    model, recipe, bits: as in `result_store.Cell`.  results: by seed, as `Cells.read` returns them;
    None is not run.
    """

    model: str
    recipe: str
    bits: str
    results: Mapping[int, Mapping[str, Any] | None]

    @property
    def done(self) -> list[Mapping[str, Any]]:
        """The results with figures."""
        return [each for each in self.results.values() if each and each["status"] == DONE]

    @property
    def failed(self) -> dict[int, str]:
        """The errors by seed."""
        results = self.results.items()
        return {seed: str(r["error"]) for seed, r in results if r and r["status"] == FAILED}

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
        """The values of one figure, of each seed that has it."""
        figures = [_flat(each["figures"]) | {"steps": each.get("steps")} for each in self.done]
        return [float(each[name]) for each in figures if each.get(name) is not None]

    def spread(self, name: str) -> Spread | None:
        """The spread of a figure over the seeds; None where no seed has it."""
        values = self.values(name)
        return Spread(statistics.fmean(values), min(values), max(values)) if values else None

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON-ready data: names, status, each figure's spread, and results by seed."""
        names = {name for each in self.done for name in _flat(each["figures"])}
        spreads = {name: self.spread(name) for name in sorted(names.difference(_TEXTS))}
        data: dict[str, Any] = without_infinities(
            {
                "model": self.model,
                "recipe": self.recipe,
                "bits": self.bits,
                "status": self.status,
                "figures": {name: s._asdict() for name, s in spreads.items() if s is not None},
                "seeds": {str(seed): result for seed, result in self.results.items()},
            }
        )
        return data


def _flat(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures as one flat dict, those of images and pairs included."""
    rest = {name: v for name, v in figures.items() if name not in ("images", "pairs")}
    return {**(figures["images"] or {}), **(figures["pairs"] or {}), **rest}


def markdown(rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """The rows as two tables a model. facts: lines for the head, by name."""
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        lines += ["", f"## {model}", "", *_table(own, _IMAGES), "", *_table(own, _MODELS)]
        notes = dict.fromkeys(  # why something did not sample on the chosen backend
            f"- {f'{row.recipe} {row.bits}'.rstrip()} sampled in eager mode: {note}"
            for row in own
            for result in row.done
            if (note := result["figures"]["backend_note"])
        )
        if notes:
            lines += ["", *notes]
    return "\n".join(lines) + "\n"


Column = Callable[[Row], str]


def _table(rows: Sequence[Row], columns: Mapping[str, Column]) -> list[str]:
    """The lines of one table; a figure that no row has gets no column."""
    texts = {name: [column(row) for row in rows] for name, column in columns.items()}
    shown = {name: column for name, column in texts.items() if any(column)}
    lines = [["", "bits", *shown]]
    for row, *values in zip(rows, *shown.values(), strict=True):
        lines.append([row.recipe, row.bits, *values])
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return [head, "|" + "---|" * (len(shown) + 2), *body]


def _figure(name: str, digits: int, scale: float = 1.0, unit: str = "") -> Column:
    """A column with the mean of a figure and, over several seeds, the lowest and the highest."""

    def text(row: Row) -> str:
        spread = row.spread(name)
        if spread is None:
            return ""
        mean, low, high = (f"{scale * value:.{digits}f}" for value in spread)
        return f"{mean}{unit} ({low} to {high})" if low != high else f"{mean}{unit}"

    return text


def _share(name: str) -> Column:
    return _figure(name, 1, 100, " %")


def _interval(row: Row) -> str:
    """The bootstrap intervals of all seeds, from the lowest end to the highest."""
    low, high = row.values("fid_low"), row.values("fid_high")
    return f"{min(low):.2f} to {max(high):.2f}" if low else ""


def _kib(row: Row) -> str:
    size = row.spread("bytes")
    return f"{size.mean / 1024:.0f}" if size else ""


def _backends(row: Row) -> str:
    return ", ".join(dict.fromkeys(str(each["figures"]["backend"]) for each in row.done))


def _seeds(row: Row) -> str:
    """The number of seeds where all are done, else how many are not, and the first error."""
    if row.status == DONE:
        return str(len(row.results))
    text = row.status
    for error in list(row.failed.values())[:1]:
        shown = " ".join(error.split()).replace("|", "/")
        text += f": {shown[:_LONGEST]}" + ("..." if len(shown) > _LONGEST else "")
    return f"**{text}**"


_IMAGES: dict[str, Column] = {
    "FID": _figure("fid", 2),
    "95 %": _interval,
    "sFID": _figure("sfid", 2),
    "IS": _figure("inception_score", 2),
    "class asked for": _share("class_agreement"),
    "confident": _share("confident"),
    "precision": _share("precision"),
    "recall": _share("recall"),
    "PSNR dB": _figure("psnr", 1),
    "SSIM": _figure("ssim", 4),
    "feature distance": _figure("feature_distance", 3),
    "seeds": _seeds,
}
_MODELS: dict[str, Column] = {
    "steps a block": _figure("steps", 0),
    "output SQNR dB": _figure("sqnr", 1),
    "pooled": _figure("sqnr_pooled", 1),
    "temporal error mean": _figure("temporal_mean", 4),
    "worst": _figure("temporal_worst", 4),
    "KiB": _kib,
    "weights": _share("weights"),
    "inputs": _share("inputs"),
    "quantize s": _figure("quantize_seconds", 0),
    "sample s": _figure("sample_seconds", 0),
    "sampled on": _backends,
}
