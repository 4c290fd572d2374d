"""The bits of each layer as one value: what was measured and chosen; printed, edited, kept."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from tfmq_fx.core.errors import ArtifactError, ConfigError
from tfmq_fx.core.files import write_whole
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.reading import read_json

from .bit_allocation import Array, allocate
from .budget import asks_for_time, read_budget


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that a layer may be.

    bits: of its weights; None is floating point, inputs too.  bytes: what its weights take.
    micros: of one call, microseconds; 0 where layers were not timed.
    noise: what it alone adds at the model's output at each timestep, error energy over signal
    energy; NaN where no sample was seen.
    """

    bits: int | None
    bytes: int
    micros: float
    noise: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SiteBits:
    """A layer: how many weights it has, what it may be, and which of these it is.

    weights: their number.  chosen: the bits of one of the options.
    """

    weights: int
    options: tuple[Option, ...]
    chosen: int | None

    @property
    def option(self) -> Option:
        """What it is."""
        return next(each for each in self.options if each.bits == self.chosen)


@dataclass(frozen=True, slots=True)
class BitPlan:
    """Weight bits of every planned layer, with all that the choice was made from.

    timesteps: the model's set.  sites: by module path.  rest: noise at each timestep that the plan
    does not change, as in `Option`.  fixed_bytes: of all that the plan does not change.
    float_bytes: of the model in floating point.  budget: what it was made for, in words.

    `str()` is a table for reading.  A plan is a value: `with_bits` and `within` give new ones, and
    `convert(prepared, bits=plan)` replays any of them.
    """

    timesteps: tuple[float, ...]
    sites: Mapping[str, SiteBits]
    rest: tuple[float, ...]
    fixed_bytes: int
    float_bytes: int
    budget: str

    # ------------------------------------------------------------------ what it comes to

    @property
    def bytes(self) -> int:
        """Of the whole model under this plan."""
        return self.fixed_bytes + sum(site.option.bytes for site in self.sites.values())

    @property
    def micros(self) -> float:
        """Of one call of all planned layers, microseconds; 0 where layers were not timed."""
        return sum(site.option.micros for site in self.sites.values())

    @property
    def sqnr_by_step(self) -> tuple[float, ...]:
        """The output SQNR in dB that the measured noises add up to, at each timestep."""
        total = np.sum([self.rest, *(s.option.noise for s in self.sites.values())], axis=0)
        return tuple(math.inf if x == 0 else -10 * math.log10(x) for x in total.tolist())

    @property
    def sqnr(self) -> float:
        """Its mean over the timesteps that were seen."""
        seen = [x for x in self.sqnr_by_step if not math.isnan(x)]
        return sum(seen) / len(seen) if seen else math.nan

    def layers(self, plan: Mapping[str, LayerConfig]) -> dict[str, LayerConfig]:
        """`plan` with the bits of this one. Raises ConfigError where a site is not in it."""
        if missing := [name for name in self.sites if name not in plan]:
            raise ConfigError(
                f"the bit plan is of another model or recipe: it has a layer {missing[0]!r} that "
                f"this one lacks ({len(missing)} such layers); its layers are "
                f"{', '.join(list(plan)[:8])}, ..."
            )
        changed = dict(plan)
        for name, site in self.sites.items():
            weights = plan[name].weights
            if site.chosen is None:
                changed[name] = LayerConfig()
            elif weights is None:
                raise ConfigError(f"the bit plan quantizes {name!r}, which this recipe does not")
            else:
                weights = dataclasses.replace(weights, bits=site.chosen)
                changed[name] = dataclasses.replace(plan[name], weights=weights)
        return changed

    # ------------------------------------------------------------------ other plans

    def with_bits(self, bits: Mapping[str, int | None]) -> BitPlan:
        """The plan with other bits for the layers whose paths match patterns (fnmatch), later ones
        winning; None is floating point. Raises ConfigError for a pattern that matches nothing and
        for bits that were not measured."""
        sites = dict(self.sites)
        for pattern, wanted in bits.items():
            matched = fnmatch.filter(sites, pattern)
            if not matched:
                raise ConfigError(
                    f"{pattern!r} matches no planned layer; they are {', '.join(list(sites)[:8])}"
                    f"{', ...' if len(sites) > 8 else ''}"
                )
            for name in matched:
                measured = [option.bits for option in sites[name].options]
                if wanted not in measured:
                    raise ConfigError(
                        f"{name}: {_bits(wanted)} was not measured; choose among "
                        f"{', '.join(map(_bits, measured))}"
                    )
                sites[name] = dataclasses.replace(sites[name], chosen=wanted)
        return dataclasses.replace(self, sites=sites, budget="edited")

    def within(self, budget: object) -> BitPlan:
        """The best plan for another budget, from the same measurements.

        budget: as for `convert`. Raises ConfigError naming the least that can be met, where the
        budget cannot.
        """
        options = [site.options for site in self.sites.values()]
        if asks_for_time(budget) and not any(o.micros for each in options for o in each):
            raise ConfigError(
                f"budget {budget!r} limits time, but the layers of this plan were not timed; "
                "convert with a budget of time to time them"
            )
        slowest = sum(max(o.micros for o in each) for each in options)
        floating = [next((o.micros for o in each if o.bits is None), None) for each in options]
        in_float = slowest if None in floating else sum(filter(None, floating))
        limit = read_budget(budget, float_bytes=self.float_bytes, float_micros=in_float)
        sizes = [np.array([o.bytes for o in each], float) for each in options]
        times = [np.array([o.micros for o in each], float) for each in options]
        found = allocate(
            [np.array([o.noise for o in each]) for each in options],
            [sizes, times],
            limits=[limit.bytes - self.fixed_bytes, limit.micros],
            rest=np.array(self.rest),
        )
        if found is None:
            raise ConfigError(self._least(budget, sizes, times, in_float))
        sites = {
            name: dataclasses.replace(site, chosen=site.options[i].bits)
            for (name, site), i in zip(self.sites.items(), found, strict=True)
        }
        return dataclasses.replace(self, sites=sites, budget=str(budget))

    def _least(
        self, budget: object, sizes: list[Array], times: list[Array], in_float: float
    ) -> str:
        """Why a budget cannot be met."""
        least = self.fixed_bytes + int(sum(each.min() for each in sizes))
        words = [
            f"the least is {least} bytes ({least / max(self.float_bytes, 1):.3f}x), of which "
            f"{self.fixed_bytes} are no weights of planned layers (tables, biases, scales, norms, "
            "layers whose bits are given)"
        ]
        if asks_for_time(budget):
            fastest = sum(float(each.min()) for each in times)
            words.append(
                f"the least time is {fastest / 1e3:.3f} ms "
                f"({fastest / max(in_float, 1e-300):.3f}x time)"
            )
        return f"budget {budget!r} cannot be met: {'; '.join(words)}"

    # ------------------------------------------------------------------ on paper and on disk

    def shares(self) -> str:
        """Which share of the weights has which bits, in words."""
        counts: dict[int | None, int] = {}
        for site in self.sites.values():
            counts[site.chosen] = counts.get(site.chosen, 0) + site.weights
        total = max(sum(counts.values()), 1)
        order = sorted(counts, key=lambda bits: (bits is None, bits or 0))
        return ", ".join(f"{100 * counts[bits] / total:.1f} % {_bits(bits)}" for bits in order)

    def __str__(self) -> str:
        lines = [
            f"bit plan for {self.budget}: {self.bytes} bytes "
            f"({self.bytes / max(self.float_bytes, 1):.3f}x of floating point), output SQNR of "
            f"{self.sqnr:.1f} dB by the measured noises",
            f"weights: {self.shares()}",
        ]
        if self.micros:
            lines.append(f"planned layers: {self.micros / 1e3:.3f} ms a call")
        lines.append("layer: weights, bits (noise of each option in dB below the signal)")
        for name, site in self.sites.items():
            tried = ", ".join(
                f"{_bits(o.bits, short=True)} {_decibels(o.noise)}" for o in site.options
            )
            lines.append(f"  {name}: {site.weights}, {_bits(site.chosen)} ({tried})")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` takes it. Noise of options is in hundredths of a dB below the
        signal, None where there is none, of timesteps that were seen."""
        data = dataclasses.asdict(self)
        data["rest"] = [None if math.isnan(x) else float(f"{x:.4g}") for x in self.rest]
        seen = [not math.isnan(x) for x in self.rest]
        for site in data["sites"].values():
            for option in site["options"]:
                option["noise"] = [_centibels(x) for x in itertools.compress(option["noise"], seen)]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The plan that `to_dict` wrote. Raises ConfigError where it is not one."""
        try:
            rest = tuple(math.nan if x is None else float(x) for x in data["rest"])

            def noise(kept: list[int | None]) -> tuple[float, ...]:
                values = iter(kept)
                found = [x if math.isnan(x) else _ratio(next(values)) for x in rest]
                return tuple(found)

            sites = {
                name: SiteBits(
                    site["weights"],
                    tuple(Option(**{**o, "noise": noise(o["noise"])}) for o in site["options"]),
                    site["chosen"],
                )
                for name, site in data["sites"].items()
            }
            for site in sites.values():
                if site.option is None or not _are_numbers(site.weights, *_numbers_of(site)):
                    raise ValueError("a site holds other than numbers")
            if not _are_numbers(data["fixed_bytes"], data["float_bytes"], *data["timesteps"]):
                raise ValueError("sizes and timesteps are numbers")
            return cls(
                tuple(data["timesteps"]),
                sites,
                rest,
                data["fixed_bytes"],
                data["float_bytes"],
                str(data["budget"]),
            )
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,  # of a generator that meets StopIteration
            StopIteration,
            TypeError,
            ValueError,
        ) as error:
            raise ConfigError(f"this is no bit plan: {type(error).__name__} {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, to be edited by hand ("chosen" of a site) or read by `load`."""
        write_whole(Path(path), json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The plan in a file. Raises ConfigError where it cannot be read or is none."""
        try:
            data = read_json(Path(path), nan=True)
        except (ArtifactError, OSError) as error:
            raise ConfigError(f"{path} is no bit plan that can be read: {error}") from error
        return cls.from_dict(data)


def _numbers_of(site: SiteBits) -> list[Any]:
    chosen = [] if site.chosen is None else [site.chosen]
    given = [n for o in site.options for n in (o.bytes, o.micros, *([o.bits] if o.bits else []))]
    return chosen + given


def _are_numbers(*values: Any) -> bool:
    return all(type(value) in (int, float) for value in values)


def _bits(bits: int | None, *, short: bool = False) -> str:
    if bits is None:
        return "float"
    return str(bits) if short else f"{bits} bits"


def _decibels(noise: tuple[float, ...]) -> str:
    """The mean over timesteps that were seen, in dB below the signal."""
    seen = [x for x in noise if not math.isnan(x)]
    mean = sum(seen) / len(seen) if seen else math.nan
    return "exact" if mean == 0 else f"{-10 * math.log10(mean):.1f}"


def _centibels(noise: float) -> int | None:
    """Hundredths of a dB below the signal."""
    return None if noise == 0 else round(-1000 * math.log10(noise))


def _ratio(centibels: int | None) -> float:
    return 0.0 if centibels is None else 10 ** (-centibels / 1000)
