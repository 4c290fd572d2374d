"""Frozen configuration values: what is quantized, to how many bits, and how it is reconstructed.

Every value checks itself when it is made, prints as the call that makes it, changes with
`dataclasses.replace`, and survives `to_dict` / `from_dict` (unknown keys are errors).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .errors import ConfigError

Rounding = Literal["nearest", "second-order"]
TemporalMode = Literal["select", "table", "cache", "tib"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """Integer weights, one scale (and zero point) per output channel.

    bits: 2 to 8.  8-bit weights are always symmetric: they must fit int8 kernels.
    symmetric: False lets fewer than 8 bits use a zero point per channel; the codes minus the zero
    point still fit int8, so the same kernels run them.
    search: candidates of the clipping range tried per channel (1 keeps min-max), minimising
    |w - what|^2.4 (TFMQ-DM's released settings use 80).
    """

    bits: int = 8
    symmetric: bool = False
    search: int = 80

    def __post_init__(self) -> None:
        _require(self.bits in range(2, 9), f"WeightSpec.bits must be 2 to 8, got {self.bits}")
        _require(self.search >= 1, f"WeightSpec.search must be at least 1, got {self.search}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationSpec:
    """Integer activations, one range per tensor.

    bits: 4 to 8, or 16.
    per_timestep: one scale for each timestep of the finite set (finite set calibration, FSC, of
    TFMQ-DM), looked up from t, with a zero point shared by all; False keeps one static range.
    """

    bits: int = 8
    per_timestep: bool = True

    def __post_init__(self) -> None:
        _require(
            self.bits in (4, 5, 6, 7, 8, 16),
            f"ActivationSpec.bits must be 4 to 8 or 16, got {self.bits}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """What becomes of one convolution or linear layer; None keeps that side in floating point."""

    weights: WeightSpec | None = None
    activations: ActivationSpec | None = None

    def __post_init__(self) -> None:
        _require(
            self.weights is not None or self.activations is None,
            "LayerConfig: activations cannot be quantized with floating-point weights; "
            "give weights=WeightSpec(...) as well",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporalSpec:
    """What becomes of the temporal information block (everything that depends on t alone).

    mode: "table" stores exact rows, "cache" stores rows as integers of `cache_bits`, "tib" keeps
    the block as quantized modules reconstructed over every timestep (TIAR), "select" chooses per
    feature by measured disturbance under `budget` (TFMQ-DM's journal extension).
    budget: bytes for tables and kept weights together; None is the size of the quantized block,
    so that a table is never chosen where it outweighs the weights it replaces.
    tiar_iters: Adam steps of temporal information aware reconstruction; 0 rounds to nearest.
    """

    mode: TemporalMode = "select"
    cache_bits: tuple[int, ...] = (8, 4)
    budget: int | None = None
    tiar_iters: int = 1000

    def __post_init__(self) -> None:
        _require(
            self.mode in get_args(TemporalMode),
            f"TemporalSpec.mode must be one of {get_args(TemporalMode)}, got {self.mode!r}",
        )
        object.__setattr__(self, "cache_bits", tuple(self.cache_bits))
        _require(
            bool(self.cache_bits) and set(self.cache_bits) <= {4, 8},
            f"TemporalSpec.cache_bits must be drawn from 4 and 8, got {self.cache_bits}",
        )
        _require(
            self.budget is None or self.budget >= 0,
            f"TemporalSpec.budget must be a number of bytes or None, got {self.budget}",
        )
        _require(
            self.tiar_iters >= 0,
            f"TemporalSpec.tiar_iters must not be negative, got {self.tiar_iters}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructionSpec:
    """How weights are rounded outside the temporal block.

    rounding: "nearest", or "second-order": column-wise rounding against the Gram matrix of the
    layer's inputs (GPTQ), in execution order.
    iters: Adam steps of AdaRound for each block (BRECQ units); 0 leaves it out.
    samples: calibration samples used at most, drawn evenly over timesteps.
    memory: bytes of activations that may be held at once; fewer samples are used where needed.
    batch_size: samples per step of AdaRound and per forward of a block.
    learning_rate: of AdaRound, here and in TIAR.  regularization: weight of its rounding term
    against an error that starts at 1.
    damping: share of the mean diagonal added to Gram matrices.
    seed: of every random draw.
    """

    rounding: Rounding = "second-order"
    iters: int = 0
    samples: int = 640
    memory: int = 4 << 30
    batch_size: int = 64
    learning_rate: float = 3e-2
    regularization: float = 30.0
    damping: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            self.rounding in get_args(Rounding),
            f"ReconstructionSpec.rounding must be one of {get_args(Rounding)}, "
            f"got {self.rounding!r}",
        )
        for name in ("samples", "memory", "batch_size"):
            value = getattr(self, name)
            _require(value > 0, f"ReconstructionSpec.{name} must be positive, got {value}")
        for name in ("iters", "learning_rate", "regularization", "damping"):
            value = getattr(self, name)
            _require(value >= 0, f"ReconstructionSpec.{name} must not be negative, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One whole recipe.

    layers: every convolution and linear layer outside the temporal block (and, for weights, in it).
    first, last: what the first and last layer get instead; None treats them like the rest.
    """

    name: str = "custom"
    layers: LayerConfig = field(default_factory=LayerConfig)
    first: LayerConfig | None = None
    last: LayerConfig | None = None
    temporal: TemporalSpec = field(default_factory=TemporalSpec)
    reconstruction: ReconstructionSpec = field(default_factory=ReconstructionSpec)


def _recipe(name: str, weights: int, activations: int | None) -> Config:
    """A preset: 8-bit first and last weights, and 16 bits for what enters the first layer.

    The noisy sample spans the noise range, and the step of an 8-bit grid over it is coarser than
    what the last steps must resolve; it feeds a handful of channels, so 16 bits there cost nothing.
    """
    acts = None if activations is None else ActivationSpec(bits=activations)
    sixteen = None if activations is None else ActivationSpec(bits=16)
    return Config(
        name=name,
        layers=LayerConfig(weights=WeightSpec(bits=weights), activations=acts),
        first=LayerConfig(weights=WeightSpec(bits=8), activations=sixteen),
        last=LayerConfig(weights=WeightSpec(bits=8), activations=acts),
    )


PRESETS: dict[str, Config] = {
    "fp": Config(name="fp", temporal=TemporalSpec(mode="table")),
    "w8a8": _recipe("w8a8", 8, 8),
    "w4a8": _recipe("w4a8", 4, 8),
    "w8a16": _recipe("w8a16", 8, None),
    "w4a16": _recipe("w4a16", 4, None),
}
"""Presets by name. In "w8a16" and "w4a16" activations stay in the model's own dtype.

Second-order rounding is on and block reconstruction off: on the models measured so far the latter
adds nothing to the former. ReconstructionSpec switches both.
"""


def resolve(config: str | Config) -> Config:
    """The configuration meant by a preset name or given as a value. Raises ConfigError."""
    if isinstance(config, Config):
        return config
    if config == "fp8":
        raise ConfigError(
            "config='fp8' is not available: this version has no fp8 convolution kernels. "
            f"Use one of {', '.join(PRESETS)}."
        )
    if not isinstance(config, str) or config not in PRESETS:
        raise ConfigError(f"unknown config {config!r}; presets are {', '.join(PRESETS)}")
    return PRESETS[config]


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration value as plain JSON-ready dicts."""
    return dataclasses.asdict(config)


_NESTED: dict[str, type] = {
    "weights": WeightSpec,
    "activations": ActivationSpec,
    "layers": LayerConfig,
    "first": LayerConfig,
    "last": LayerConfig,
    "temporal": TemporalSpec,
    "reconstruction": ReconstructionSpec,
}


def from_dict(data: dict[str, Any], kind: type = Config) -> Any:
    """The configuration value saved by `to_dict`. Raises ConfigError on an unknown key."""
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(data) - known):
        raise ConfigError(f"{kind.__name__}: unknown keys {unknown}; known are {sorted(known)}")
    values = {
        key: from_dict(value, _NESTED[key]) if isinstance(value, dict) and key in _NESTED else value
        for key, value in data.items()
    }
    return kind(**values)
