"""Frozen configuration values: what is quantized, to how many bits, and how it is reconstructed.

Every value checks itself when it is made, prints as the call that makes it, changes with
`dataclasses.replace`, and survives `to_dict` / `from_dict` (unknown keys are errors).
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, get_args

from .errors import ConfigError

Format = Literal["int", "fp8"]
Rounding = Literal["nearest", "second-order"]
RangeEstimator = Literal["minmax", "mse"]
Sampling = Literal["uniform", "normal"]
Softmax = Literal["uniform", "log2"]
Correction = Literal["none", "bias", "noise"]
TemporalMode = Literal["select", "table", "cache", "tib"]
Offload = Literal["none", "cpu", "disk"]
OnMiss = Literal["compute", "error"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _one_of(name: str, value: Any, choices: Any) -> None:
    _require(
        value in get_args(choices), f"{name} must be one of {get_args(choices)}, got {value!r}"
    )


def _check_kinds(config: Any) -> None:
    """Refuse a field that holds another kind of value than is declared."""
    for each in dataclasses.fields(config):
        kinds, value = str(each.type).split(" | "), getattr(config, each.name)
        if value is None and "None" in kinds:
            continue
        if kinds[0] == "int":
            fits = isinstance(value, Integral) and not isinstance(value, bool)
        elif kinds[0] == "float":
            fits = isinstance(value, Real) and not isinstance(value, bool)
        elif kinds[0] == "bool":
            fits = isinstance(value, bool)
        elif kinds[0].startswith("tuple"):
            fits = isinstance(value, Iterable) and not isinstance(value, str)
        else:
            fits = not isinstance(kind := globals().get(kinds[0]), type) or isinstance(value, kind)
        _require(
            fits, f"{type(config).__name__}.{each.name} must be of type {each.type}, got {value!r}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """Weights as integers or 8-bit floats, one scale (and zero point) per output channel or per
    group of it.

    format: "int", or "fp8": e4m3 floats with scale amax / 448 per output channel. These are
    rounded to nearest whatever the reconstruction says (second-order rounding still aligns the
    weight with the quantized inputs first; biases still move), and are always symmetric.
    bits: 2 to 8.  8-bit weights are always symmetric: they must fit int8 kernels.
    symmetric: False lets fewer than 8 bits use a zero point per channel; the codes minus the zero
    point still fit int8, so the same kernels run them.
    search: candidates of the clipping range of integers tried per channel (1 keeps min-max),
    minimising |w - what|^2.4 (TFMQ-DM's released settings use 80).
    group_size: input channels that share a scale; None is one scale per output channel. A layer
    whose input channels it does not divide keeps one scale per output channel, and the report says
    so. No integer kernel runs grouped weights yet.
    """

    bits: int = 8
    symmetric: bool = False
    search: int = 80
    group_size: int | None = None
    format: Format = "int"

    def __post_init__(self) -> None:
        _check_kinds(self)
        _require(self.bits in range(2, 9), f"WeightSpec.bits must be 2 to 8, got {self.bits}")
        _require(self.search >= 1, f"WeightSpec.search must be at least 1, got {self.search}")
        _require(
            self.group_size is None or self.group_size >= 1,
            f"WeightSpec.group_size must be a number of channels or None, got {self.group_size}",
        )
        _one_of("WeightSpec.format", self.format, Format)
        if self.format == "fp8":
            _require(self.bits == 8, f"WeightSpec: fp8 has 8 bits, got bits={self.bits}")
            _require(
                self.group_size is None,
                "WeightSpec: fp8 has one scale per output channel; "
                f"leave out group_size={self.group_size}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationSpec:
    """Activations as integers or 8-bit floats, one range per tensor or measured at run time.

    format: "int", or "fp8": e4m3 floats, whose scale is the largest magnitude / 448.
    bits: 4 to 8, or 16.
    per_timestep: one scale for each timestep of the finite set (finite set calibration, FSC, of
    TFMQ-DM), looked up from t, with a zero point shared by all; False keeps one static range.
    dynamic: a symmetric range measured at every call, for each token (row of the last dimension) of
    a linear layer, for each sample of a convolution; nothing is calibrated or looked up from t, so
    per_timestep becomes False.
    timestep_groups: groups of neighbouring timesteps that share a range (TCAQ-DM); None gives each
    its own.
    ranges: "minmax", or "mse": the clipped range that loses least, over calibration values.
    """

    bits: int = 8
    per_timestep: bool = True
    timestep_groups: int | None = None
    ranges: RangeEstimator = "minmax"
    format: Format = "int"
    dynamic: bool = False

    def __post_init__(self) -> None:
        _check_kinds(self)
        _require(
            self.bits in (4, 5, 6, 7, 8, 16),
            f"ActivationSpec.bits must be 4 to 8 or 16, got {self.bits}",
        )
        _one_of("ActivationSpec.ranges", self.ranges, RangeEstimator)
        _one_of("ActivationSpec.format", self.format, Format)
        _require(
            self.timestep_groups is None or self.timestep_groups >= 1,
            f"ActivationSpec.timestep_groups must be positive or None, got {self.timestep_groups}",
        )
        if self.dynamic:
            _require(
                self.timestep_groups is None and self.ranges == "minmax",
                "ActivationSpec: dynamic ranges are measured at run time; "
                "leave out timestep_groups and ranges",
            )
            object.__setattr__(self, "per_timestep", False)
        _require(
            self.per_timestep or self.timestep_groups is None,
            "ActivationSpec: timestep_groups contradicts per_timestep=False, which keeps one range",
        )
        if self.format == "fp8":
            _require(self.bits == 8, f"ActivationSpec: fp8 has 8 bits, got bits={self.bits}")
            _require(
                self.ranges == "minmax",
                "ActivationSpec: ranges='mse' clips what integers would round coarsely, which fp8 "
                "does not; use ranges='minmax'",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """What becomes of one convolution or linear layer; None keeps that side in floating point."""

    weights: WeightSpec | None = None
    activations: ActivationSpec | None = None

    def __post_init__(self) -> None:
        _check_kinds(self)
        _require(
            self.weights is not None or self.activations is None,
            "LayerConfig: activations cannot be quantized with floating-point weights; "
            "give weights=WeightSpec(...) as well",
        )
        sides = (self.weights, self.activations)
        formats = {side.format for side in sides if side is not None}
        _require(
            len(formats) < 2,
            "LayerConfig: weights and activations must have the same format, got "
            f"{' and '.join(side.format for side in sides if side is not None)}",
        )

    @property
    def calibrated(self) -> ActivationSpec | None:
        """The activations, where calibration is to find their range: neither float nor dynamic."""
        acts = self.activations
        return None if acts is None or acts.dynamic else acts


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
        _check_kinds(self)
        _one_of("TemporalSpec.mode", self.mode, TemporalMode)
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
class RewriteSpec:
    """Rewrites of quantized layers that change nothing before they are quantized.

    split_concat: the parts of a channel concatenation get layers, and so ranges, of their own
    (Q-Diffusion).
    tcr: timestep-channel joint reparameterisation of convolutions and linear layers (TCAQ-DM):
    input channels are divided by a factor between 1 and this limit; None leaves it out.
    smooth: exponent alpha of SmoothQuant's factors for linear layers, 0 to 1; None leaves it out.
    rotate: channels in each Hadamard block that rotates the input of linear layers (a power of
    two); layers it does not divide take the largest power of two that does. None leaves it out.
    low_rank: rank of a 16-bit branch beside each layer, of whose weight the rest is quantized
    (SVDQuant); 0 leaves it out.
    """

    split_concat: bool = False
    tcr: float | None = None
    smooth: float | None = None
    rotate: int | None = None
    low_rank: int = 0

    def __post_init__(self) -> None:
        _check_kinds(self)
        _require(
            self.tcr is None or self.tcr >= 1,
            f"RewriteSpec.tcr must be a limit of at least 1 or None, got {self.tcr}",
        )
        _require(
            self.smooth is None or 0 <= self.smooth <= 1,
            f"RewriteSpec.smooth must be 0 to 1 or None, got {self.smooth}",
        )
        _require(
            self.tcr is None or self.smooth is None,
            "RewriteSpec: tcr and smooth both scale the input channels of linear layers; "
            "choose one of them",
        )
        _require(
            self.rotate is None or (self.rotate >= 2 and self.rotate & (self.rotate - 1) == 0),
            f"RewriteSpec.rotate must be a power of two or None, got {self.rotate}",
        )
        _require(
            self.low_rank >= 0,
            f"RewriteSpec.low_rank must not be negative, got {self.low_rank}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Quantized attention: both matrix products of activations, q.k and softmax.v.

    Fused attention never forms what this quantizes, so it is written out as products and a softmax;
    no integer kernel runs it yet.
    activations: of queries, keys and values.  probabilities_bits: of the softmax's result.
    probabilities: their grid: "uniform", or "log2", which measured better at 4 bits and worse at 8
    (docs/quality.md).
    """

    activations: ActivationSpec = field(default_factory=ActivationSpec)
    probabilities_bits: int = 8
    probabilities: Softmax = "uniform"

    def __post_init__(self) -> None:
        _check_kinds(self)
        _one_of("AttentionSpec.probabilities", self.probabilities, Softmax)
        _require(
            self.activations.format == "int" and not self.activations.dynamic,
            "AttentionSpec.activations must be integers with calibrated ranges, "
            f"got {self.activations}",
        )
        _require(
            self.probabilities_bits in (4, 5, 6, 7, 8, 16),
            f"AttentionSpec.probabilities_bits must be 4 to 8 or 16, got {self.probabilities_bits}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructionSpec:
    """How weights are rounded outside the temporal block.

    rounding: "nearest", or "second-order": column-wise rounding against the Gram matrix of the
    layer's inputs (GPTQ), in execution order.
    refine: sweeps of coordinate descent over second-order codes and their scales.
    iters: Adam steps of AdaRound for each block (BRECQ units); 0 leaves it out.
    quantize_inputs: whether AdaRound of blocks sees quantized activations, or full-precision ones
    as in the released code of BRECQ and TFMQ-DM.
    rounds: rounds of resampling with the quantized model and learning again on what it visits
    (progressively aligned reconstruction, PAR, of TCAQ-DM).  round_iters: Adam steps of each.
    sampling: how many samples each timestep contributes: "uniform", or "normal": timesteps drawn
    from a normal distribution about `center` (share of the way from noise 0 to 1) with a deviation
    of half the set (PTQ4DM).
    samples: calibration samples used at most.
    cache: bytes of sample inputs that calibration keeps.
    memory: bytes of activations held in memory between steps; what is more waits on disk. A model
    that writes to activations in place has all of them held in memory.
    batch_size: samples per step of AdaRound and per forward of a block.
    learning_rate: of AdaRound, here and in TIAR.  regularization: weight of its rounding term
    against an error that starts at 1.
    damping: share of the mean diagonal added to Gram matrices.
    seed: of every random draw.
    """

    rounding: Rounding = "second-order"
    refine: int = 0
    iters: int = 0
    quantize_inputs: bool = True
    rounds: int = 0
    round_iters: int = 0
    sampling: Sampling = "uniform"
    center: float = 0.4
    samples: int = 640
    cache: int = 1 << 30
    memory: int = 64 << 20
    batch_size: int = 64
    learning_rate: float = 3e-2
    regularization: float = 30.0
    damping: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        _check_kinds(self)
        _one_of("ReconstructionSpec.rounding", self.rounding, Rounding)
        _one_of("ReconstructionSpec.sampling", self.sampling, Sampling)
        for name in ("samples", "cache", "memory", "batch_size"):
            value = getattr(self, name)
            _require(value > 0, f"ReconstructionSpec.{name} must be positive, got {value}")
        not_negative = (
            "refine",
            "iters",
            "rounds",
            "round_iters",
            "learning_rate",
            "regularization",
            "damping",
        )
        for name in not_negative:
            value = getattr(self, name)
            _require(value >= 0, f"ReconstructionSpec.{name} must not be negative, got {value}")
        _require(
            0 <= self.center <= 1, f"ReconstructionSpec.center must be 0 to 1, got {self.center}"
        )
        _require(
            self.rounds == 0 or self.round_iters > 0,
            "ReconstructionSpec: rounds of resampling need round_iters, Adam steps of each",
        )
        _require(
            self.rounding == "second-order" or self.refine == 0,
            "ReconstructionSpec: refine improves second-order codes; rounding is 'nearest'",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One whole recipe.

    layers: every convolution and linear layer outside the temporal block (and, for weights, in it).
    first, last: what the first and last layer get instead; None treats them like the rest.
    rewrites: of the layers, before they are quantized.
    attention: how attention's own products are quantized; None leaves them fused and in float.
    correction: per-timestep correction of the output against full precision, measured on
    calibration samples: "bias" subtracts the mean error of each channel; "noise" is PTQD's model of
    it, a factor and a mean.
    """

    name: str = "custom"
    layers: LayerConfig = field(default_factory=LayerConfig)
    first: LayerConfig | None = None
    last: LayerConfig | None = None
    rewrites: RewriteSpec = field(default_factory=RewriteSpec)
    attention: AttentionSpec | None = None
    temporal: TemporalSpec = field(default_factory=TemporalSpec)
    reconstruction: ReconstructionSpec = field(default_factory=ReconstructionSpec)
    correction: Correction = "none"

    def __post_init__(self) -> None:
        _check_kinds(self)
        _one_of("Config.correction", self.correction, Correction)
        acts = self.layers.activations
        scaling = [n for n in ("tcr", "smooth", "rotate") if getattr(self.rewrites, n) is not None]
        _require(
            acts is not None or not scaling,
            f"Config {self.name!r}: rewrites.{', '.join(scaling)} make inputs easier to quantize, "
            "but layers.activations is None",
        )
        _require(
            self.layers.weights is not None or self.rewrites == RewriteSpec(),
            f"Config {self.name!r}: rewrites are of quantized layers, but layers.weights is None",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrologueSpec:
    """How values that a request fixes are computed before its steps, and kept.

    conditions: inputs that are fixed for a request, by name, dotted path or placeholder; None is
    all but the sample, the timestep and what another network adds at every step.
    steps: timesteps of a request, about; decides which values are worth storing. None is as many as
    the model was made for, or 50.
    capacity: conditions kept at once; the least recently used goes first.
    offload: what becomes of weights that no step reads once the values are there: "cpu" moves them
    off the accelerator, "disk" maps them from a temporary file that memory need not hold.
    on_miss: a timestep outside the schedule is computed, or is an error.
    """

    conditions: tuple[str, ...] | None = None
    steps: int | None = None
    capacity: int = 4
    offload: Offload = "none"
    on_miss: OnMiss = "compute"

    def __post_init__(self) -> None:
        _require(
            not isinstance(self.conditions, str),
            f"PrologueSpec.conditions must be a sequence of names, got {self.conditions!r}",
        )
        _check_kinds(self)
        if self.conditions is not None:
            object.__setattr__(self, "conditions", tuple(self.conditions))
        _require(
            self.steps is None or self.steps >= 1,
            f"PrologueSpec.steps must be at least 1, got {self.steps}",
        )
        _require(
            self.capacity >= 1, f"PrologueSpec.capacity must be at least 1, got {self.capacity}"
        )
        _one_of("PrologueSpec.offload", self.offload, Offload)
        _one_of("PrologueSpec.on_miss", self.on_miss, OnMiss)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration value as plain JSON-ready dicts."""
    return dataclasses.asdict(config)


NESTED: dict[str, type] = {
    "weights": WeightSpec,
    "activations": ActivationSpec,
    "layers": LayerConfig,
    "first": LayerConfig,
    "last": LayerConfig,
    "rewrites": RewriteSpec,
    "attention": AttentionSpec,
    "temporal": TemporalSpec,
    "reconstruction": ReconstructionSpec,
}
"""Fields whose value is a configuration of its own, and of which kind."""


def from_dict(data: Any, kind: type = Config) -> Any:
    """The configuration value saved by `to_dict`. Raises ConfigError on an unknown key and on a
    value of another type."""
    if not isinstance(data, dict):
        raise ConfigError(f"{kind.__name__}: expected a dict, got {data!r:.80}")
    hints = _hints(kind)
    if unknown := sorted(map(str, set(data) - set(hints))):
        raise ConfigError(f"{kind.__name__}: unknown keys {unknown}; known are {sorted(hints)}")
    values = {
        key: from_dict(value, NESTED[key]) if isinstance(value, dict) and key in NESTED else value
        for key, value in data.items()
    }
    for key, value in values.items():
        if not _is_a(value, hints[key]):
            raise ConfigError(f"{kind.__name__}.{key}: {value!r:.80} is no {hints[key]}")
    return kind(**values)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The fields of a configuration and their types."""
    return typing.get_type_hints(kind)


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as the fields here are declared; lists are tuples."""
    parts = get_args(hint)
    if typing.get_origin(hint) is Literal:
        return type(value) is str and value in parts
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (tuple, list)) and all(_is_a(each, parts[0]) for each in value)
    if parts:
        return any(_is_a(value, part) for part in parts)
    if hint in (int, float):
        whole = hint is float or type(value) is int or (type(value) is float and value % 1 == 0)
        return type(value) in (int, float) and whole
    return type(value) is hint
