"""Resolve the recipes of an evaluation by name and bits, and limit their learning steps."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from tfmq_fx.core.config import Config
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.presets import PRESETS, RECIPES, resolve

NEAREST, MIXED = "nearest", "mixed"
NAMES = (NEAREST, *(name for name in RECIPES if name != "best"), "best", MIXED)
BITS = ("w8a8", "w4a8", "w6a6", "w4a6", "w4a4")
PUBLISHED = "published"
FEW = 100  # learning steps a block, unless told otherwise: minutes where 20,000 take hours
_FEWEST_TIAR = 1000  # steps of TIAR kept where blocks learn for fewer: they are cheap


def nearest(bits: str) -> Config:
    """The recipe with nearest rounding and one static range for every layer, 8 bits for the input
    of the first."""
    base = resolve(f"brecq-{bits}")
    spec = dataclasses.replace(base.reconstruction, iters=0)
    return dataclasses.replace(base, name=f"{NEAREST}-{bits}", reconstruction=spec)


def recipe(name: str, bits: str) -> Config:
    """The recipe called `name`, one of NAMES, at `bits`, as in "w4a8"; "mixed" is "best", whose
    weight bits are chosen layer by layer at the bytes that it takes. Raises ConfigError."""
    if name not in NAMES:
        raise ConfigError(f"unknown recipe {name!r}; there are {', '.join(NAMES)}")
    if not re.fullmatch(r"w\d+a\d+", bits):
        raise ConfigError(f"bits are written as in 'w4a8', got {bits!r}; usual: {', '.join(BITS)}")
    try:
        if name == MIXED:
            return dataclasses.replace(resolve(f"best-{bits}"), name=f"{MIXED}-{bits}")
        return nearest(bits) if name == NEAREST else resolve(f"{name}-{bits}")
    except ConfigError as error:
        error.add_note(f"in recipe {name!r} at {bits!r}; usual bits are {', '.join(BITS)}")
        raise


@dataclasses.dataclass(frozen=True, slots=True)
class Baseline:
    """A recipe to evaluate. bits: as in "w4a8", or "" for a Config of the caller's own."""

    name: str
    bits: str
    config: Config


def baselines(
    recipes: Iterable[str | Config] | None, bits: Sequence[str] | None, learning: str | int
) -> list[Baseline]:
    """Every recipe at each width, width by width; then Configs. None is all there are.

    learning: "published" leaves learning steps as they are, a number is the most steps a block.
    Raises ConfigError for unknown names, bits and rules, for no recipe, and for one twice.
    """
    if learning != PUBLISHED:
        number = isinstance(learning, int) and not isinstance(learning, bool)
        if not number or int(learning) < 1:
            raise ConfigError(
                f"learning must be {PUBLISHED!r} or a whole number of steps a block of at least 1, "
                f"got {learning!r}"
            )
    names = list(NAMES if recipes is None else [recipes] if isinstance(recipes, str) else recipes)
    widths = list(BITS if bits is None else [bits] if isinstance(bits, str) else bits)
    chosen = [
        Baseline(name, width, recipe(name, width))
        for width in widths
        for name in names
        if not isinstance(name, Config)
    ]
    chosen += [Baseline(each.name, "", each) for each in names if isinstance(each, Config)]
    keys = [(each.name, each.bits) for each in chosen]
    if not chosen or len(set(keys)) < len(keys):
        raise ConfigError(
            f"give each recipe and each width once, at least one; got {', '.join(map(str, names))} "
            f"at {', '.join(widths)}"
        )
    if learning == PUBLISHED:
        return chosen
    return [dataclasses.replace(each, config=capped(each.config, int(learning))) for each in chosen]


def capped(config: Config, iters: int) -> Config:
    """`config` with no more than `iters` learning steps a block.

    Rounds of resampling keep their proportion of a quarter, TIAR no fewer than 1,000 steps. Fewer
    steps go with the step size that suits them, which is this package's default, and with 1,280
    samples: the released step size needs all 20,000 to decide the roundings. A recipe with no more
    steps than that, or none, stays as it is.
    """
    spec, default = config.reconstruction, PRESETS["w4a8"].reconstruction
    if not spec.iters or max(spec.iters, config.temporal.tiar_iters) <= iters:
        return config
    rounds = min(spec.round_iters, max(iters // 4, 1)) if spec.rounds else 0
    spec = dataclasses.replace(
        spec,
        iters=min(spec.iters, iters),
        round_iters=rounds,
        learning_rate=default.learning_rate,
        samples=min(spec.samples, 1280),
    )
    tiar = min(config.temporal.tiar_iters, max(iters, _FEWEST_TIAR))
    temporal = dataclasses.replace(config.temporal, tiar_iters=tiar)
    return dataclasses.replace(config, reconstruction=spec, temporal=temporal)
