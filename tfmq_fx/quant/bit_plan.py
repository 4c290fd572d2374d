"""Hold the weight bits of every layer, with the measurements that they were chosen from."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from tfmq_fx.core.errors import ArtifactError, ConfigError
from tfmq_fx.core.files import write_whole
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.reading import read_json

from .bit_allocation import allocate
from .budget import asks_for_time, read_budget


@dataclass(frozen=True, slots=True)
class Option:
    """A candidate format of one layer.

    bits: of its weights; None is floating point, inputs too.  bytes: size of its weights.
    micros: time of one call in microseconds; 0 where layers were not timed.
    noise: error that this layer alone causes at the model's output at each timestep, as error
    energy over signal energy; NaN where no sample was seen.
    """

    bits: int | None
    bytes: int
    micros: float
    noise: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SiteBits:
    """The candidate formats of one layer, and the chosen one.

    weights: their number.  chosen: the bits of one of the options.
    """

    weights: int
    options: tuple[Option, ...]
    chosen: int | None

    @property
    def option(self) -> Option:
        """The chosen candidate."""
        return next(each for each in self.options if each.bits == self.chosen)


@dataclass(frozen=True, slots=True)
class BitPlan:
    """The weight bits of every planned layer, with the measurements behind the choice.

    timesteps: the model's set.  sites: by module path.  rest: noise at each timestep that the plan
    does not change, as in `Option`.  fixed_bytes: size of everything that the plan does not change.
    float_bytes: size of the model in floating point.  budget: the limits of the plan, in words.

    `str()` is a table for reading.  A plan is a value: `with_bits` and `within` give new ones, and
    `convert(prepared, bits=plan)` replays any of them.
    """

    timesteps: tuple[float, ...]
    sites: Mapping[str, SiteBits]
    rest: tuple[float, ...]
    fixed_bytes: int
    float_bytes: int
    budget: str

    # ------------------------------------------------------------------ totals

    @property
    def bytes(self) -> int:
        """The size of the whole model under this plan."""
        return self.fixed_bytes + sum(site.option.bytes for site in self.sites.values())

    @property
    def micros(self) -> float:
        """The time of one call of all planned layers, in microseconds; 0 if not timed."""
        return sum(site.option.micros for site in self.sites.values())

    @property
    def sqnr_by_step(self) -> tuple[float, ...]:
        """The predicted output SQNR in dB at each timestep: the measured noises added up."""
        total = np.sum([self.rest, *(s.option.noise for s in self.sites.values())], axis=0)
        return tuple(math.inf if x == 0 else -10 * math.log10(x) for x in total.tolist())

    @property
    def sqnr(self) -> float:
        """The predicted output SQNR in dB, averaged over the timesteps that were seen."""
        return _mean_of_seen(self.sqnr_by_step)

    def layers(self, plan: Mapping[str, LayerConfig]) -> dict[str, LayerConfig]:
        """The layers of a recipe with the bits of this plan; ConfigError where it lacks a layer."""
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
        """A plan with other bits for the layers whose paths match fnmatch patterns.

        None is floating point; later patterns win. Raises ConfigError for a pattern that matches
        nothing and for bits that were not measured.
        """
        sites = dict(self.sites)
        for pattern, chosen in bits.items():
            matches = fnmatch.filter(sites, pattern)
            if not matches:
                raise ConfigError(
                    f"{pattern!r} matches no planned layer; they are {', '.join(list(sites)[:8])}"
                    f"{', ...' if len(sites) > 8 else ''}"
                )
            for name in matches:
                measured = [option.bits for option in sites[name].options]
                if chosen not in measured:
                    raise ConfigError(
                        f"{name}: {_bits(chosen)} was not measured; choose among "
                        f"{', '.join(map(_bits, measured))}"
                    )
                sites[name] = dataclasses.replace(sites[name], chosen=chosen)
        return dataclasses.replace(self, sites=sites, budget="edited")

    def within(self, budget: object) -> BitPlan:
        """The best plan for another budget, from the same measurements.

        budget: as for `convert`. Raises ConfigError naming the least that can be met, where the
        budget cannot.
        """
        options = [site.options for site in self.sites.values()]
        sizes = [np.array([o.bytes for o in each], float) for each in options]
        times = [np.array([o.micros for o in each], float) for each in options]
        if asks_for_time(budget) and not any(each.any() for each in times):
            raise ConfigError(
                f"budget {budget!r} limits time, but the layers of this plan were not timed; "
                "convert with a budget of time to time them"
            )
        in_float = [next((o.micros for o in each if o.bits is None), None) for each in options]
        slowest = float(sum(each.max() for each in times))
        float_micros = slowest if None in in_float else sum(filter(None, in_float))
        limit = read_budget(budget, float_bytes=self.float_bytes, float_micros=float_micros)
        picks = allocate(
            [np.array([o.noise for o in each]) for each in options],
            [sizes, times],
            limits=[limit.bytes - self.fixed_bytes, limit.micros],
            rest=np.array(self.rest),
        )
        if picks is None:
            least = self.fixed_bytes + int(sum(each.min() for each in sizes))
            text = (
                f"budget {budget!r} cannot be met: the least is {least} bytes "
                f"({least / max(self.float_bytes, 1):.3f}x), of which {self.fixed_bytes} are no "
                "weights of planned layers (tables, biases, scales, norms, layers whose bits are "
                "given)"
            )
            if asks_for_time(budget):
                fastest = float(sum(each.min() for each in times))
                share = fastest / max(float_micros, 1e-300)
                text += f"; the least time is {fastest / 1e3:.3f} ms ({share:.3f}x time)"
            raise ConfigError(text)
        sites = {
            name: dataclasses.replace(site, chosen=site.options[i].bits)
            for (name, site), i in zip(self.sites.items(), picks, strict=True)
        }
        return dataclasses.replace(self, sites=sites, budget=str(budget))

    # ------------------------------------------------------------------ text and JSON

    def shares(self) -> str:
        """The share of the weights at each bit width, as text."""
        counts: Counter[int | None] = Counter()
        for site in self.sites.values():
            counts[site.chosen] += site.weights
        total = max(counts.total(), 1)
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
                f"{_bits(o.bits).removesuffix(' bits')} {_decibels(o.noise)}" for o in site.options
            )
            lines.append(f"  {name}: {site.weights}, {_bits(site.chosen)} ({tried})")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values for `from_dict`.

        The noise of options is written for the timesteps that were seen, in hundredths of a dB
        below the signal; None where there is no noise.
        """
        data = dataclasses.asdict(self)
        data["rest"] = [None if math.isnan(x) else float(f"{x:.4g}") for x in self.rest]
        for site in data["sites"].values():
            for option in site["options"]:
                noise = [option["noise"][i] for i in _seen(self.rest)]
                option["noise"] = [None if x == 0 else round(-1000 * math.log10(x)) for x in noise]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Restore the plan that `to_dict` wrote. Raises ConfigError for anything else."""
        try:
            rest = tuple(math.nan if x is None else float(x) for x in data["rest"])
            return cls(
                tuple(map(_number, data["timesteps"])),
                {name: _restored_site(site, rest) for name, site in data["sites"].items()},
                rest,
                _number(data["fixed_bytes"]),
                _number(data["float_bytes"]),
                str(data["budget"]),
            )
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"this is no bit plan: {type(error).__name__} {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, which can be edited ("chosen" of a site) and read by `load`."""
        write_whole(Path(path), json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan from a file. Raises ConfigError where there is no plan in it."""
        try:
            data = read_json(Path(path), nan=True)
        except (ArtifactError, OSError) as error:
            raise ConfigError(f"{path} is no bit plan that can be read: {error}") from error
        return cls.from_dict(data)


def _restored_site(data: Mapping[str, Any], rest: Sequence[float]) -> SiteBits:
    """The layer that `to_dict` wrote as `data`."""
    options = []
    for option in data["options"]:
        noise = list(rest)
        for i, level in zip(_seen(rest), option["noise"], strict=True):
            noise[i] = 0.0 if level is None else 10 ** (-level / 1000)
        bits = None if option["bits"] is None else _number(option["bits"])
        size, micros = _number(option["bytes"]), _number(option["micros"])
        options.append(Option(bits, size, micros, tuple(noise)))
    if data["chosen"] not in [option.bits for option in options]:
        raise ValueError(f"no option has the chosen bits, {data['chosen']!r:.80}")
    return SiteBits(_number(data["weights"]), tuple(options), data["chosen"])


def _number(value: Any) -> Any:
    """`value`, if it is a number; raises TypeError."""
    if type(value) not in (int, float):
        raise TypeError(f"{value!r:.80} is no number")
    return value


def _seen(values: Sequence[float]) -> list[int]:
    """The indices of the timesteps that have a value."""
    return [i for i, value in enumerate(values) if not math.isnan(value)]


def _mean_of_seen(values: Sequence[float]) -> float:
    """The mean over the timesteps that have a value, NaN if none has."""
    seen = [value for value in values if not math.isnan(value)]
    return sum(seen) / len(seen) if seen else math.nan


def _bits(bits: int | None) -> str:
    """A bit width as text."""
    return "float" if bits is None else f"{bits} bits"


def _decibels(noise: Sequence[float]) -> str:
    """The mean noise over the timesteps that were seen, in dB below the signal, as text."""
    mean = _mean_of_seen(noise)
    return "exact" if mean == 0 else f"{-10 * math.log10(mean):.1f}"
