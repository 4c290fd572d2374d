"""Define the configuration of a conversion as frozen values: formats, bits, reconstruction.

Every value checks itself when it is made, prints as the call that makes it, and changes with
`dataclasses.replace`. `config_json` converts it to plain dicts and back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from .layer_config import ActivationSpec, LayerConfig
from .spec_checks import check_range, check_types, require

Rounding = Literal["nearest", "second-order"]
Sampling = Literal["uniform", "normal"]
Softmax = Literal["uniform", "log2"]
Correction = Literal["none", "bias", "noise"]
TemporalMode = Literal["select", "table", "cache", "tib"]
Offload = Literal["none", "cpu", "disk"]
OnMiss = Literal["compute", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporalSpec:
    """The form of the temporal information block (TIB: everything that depends on t alone).

    mode: "table" stores exact rows, "cache" stores rows as integers of `cache_bits`, "tib" keeps
    the block as quantized modules reconstructed over every timestep (TIAR), "select" chooses per
    feature by measured disturbance under `budget` (TFMQ-DM's journal extension).
    budget: bytes for tables and kept weights together; None is the size of the quantized block,
    so that a table is never chosen where it outweighs the weights it replaces.
    tiar_iters: Adam steps of temporal information aware reconstruction (TIAR); 0 rounds to nearest.
    """

    mode: TemporalMode = "select"
    cache_bits: tuple[int, ...] = (8, 4)
    budget: int | None = None
    tiar_iters: int = 1000

    def __post_init__(self) -> None:
        check_types(self)
        require(
            bool(self.cache_bits) and set(self.cache_bits) <= {4, 8},
            f"TemporalSpec.cache_bits must be drawn from 4 and 8, got {self.cache_bits}",
        )
        check_range(self, 0, inf, "budget", "tiar_iters")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewriteSpec:
    """Rewrites of layers before quantization, which do not change what the model computes.

    split_concat: each part of a channel concatenation gets a layer, and so a range, of its own
    (Q-Diffusion).
    tcr: timestep-channel joint reparameterisation of convolutions and linear layers (TCAQ-DM):
    input channels are divided by a factor between 1 and this limit; None omits it.
    smooth: exponent alpha of SmoothQuant's factors for linear layers, 0 to 1; None omits it.
    rotate: channels in each Hadamard block that rotates the input of linear layers (a power of
    two); layers it does not divide take the largest power of two that does. None omits it.
    low_rank: rank of a 16-bit branch beside each layer, whose remaining weight is quantized
    (SVDQuant); 0 omits it.
    """

    split_concat: bool = False
    tcr: float | None = None
    smooth: float | None = None
    rotate: int | None = None
    low_rank: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, 1, inf, "tcr")
        check_range(self, 0, 1, "smooth")
        check_range(self, 0, inf, "low_rank")
        require(
            self.tcr is None or self.smooth is None,
            "RewriteSpec: tcr and smooth both scale the input channels of linear layers; "
            "choose one of them",
        )
        require(
            self.rotate is None or (self.rotate >= 2 and self.rotate & (self.rotate - 1) == 0),
            f"RewriteSpec.rotate must be a power of two or None, got {self.rotate}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The quantization of attention's matrix products of activations, q.k and softmax.v.

    Fused attention is replaced by two products and a softmax; no integer kernel runs them yet.
    activations: format of queries, keys and values.  probabilities_bits: bits of the softmax's
    result.  probabilities: its grid: "uniform", or "log2", which measured better at 4 bits and
    worse at 8 (docs/quality.md).
    """

    activations: ActivationSpec = field(default_factory=ActivationSpec)
    probabilities_bits: int = 8
    probabilities: Softmax = "uniform"

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.activations.format == "int" and not self.activations.dynamic,
            "AttentionSpec.activations must be integers with calibrated ranges, "
            f"got {self.activations}",
        )
        require(
            self.probabilities_bits in (4, 5, 6, 7, 8, 16),
            f"AttentionSpec.probabilities_bits must be 4 to 8 or 16, got {self.probabilities_bits}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructionSpec:
    """The rounding of weights outside the temporal block.

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
        check_types(self)
        check_range(self, 1, inf, "samples", "cache", "memory", "batch_size")
        check_range(self, 0, inf, "refine", "iters", "rounds", "round_iters")
        check_range(self, 0, inf, "learning_rate", "regularization", "damping")
        check_range(self, 0, 1, "center")
        require(
            self.rounds == 0 or self.round_iters > 0,
            "ReconstructionSpec: rounds of resampling need round_iters, Adam steps of each",
        )
        require(
            self.rounding == "second-order" or self.refine == 0,
            "ReconstructionSpec: refine improves second-order codes; rounding is 'nearest'",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole recipe of a conversion.

    layers: every convolution and linear layer outside the temporal block (and, for weights, in it).
    first, last: configuration of the first and last layer; None treats them like the rest.
    rewrites: of the layers, before they are quantized.
    attention: quantization of attention's own products; None leaves them fused and in float.
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
        check_types(self)
        acts = self.layers.activations
        scaling = [n for n in ("tcr", "smooth", "rotate") if getattr(self.rewrites, n) is not None]
        require(
            acts is not None or not scaling,
            f"Config {self.name!r}: rewrites.{', '.join(scaling)} make inputs easier to quantize, "
            "but layers.activations is None",
        )
        require(
            self.layers.weights is not None or self.rewrites == RewriteSpec(),
            f"Config {self.name!r}: rewrites are of quantized layers, but layers.weights is None",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrologueSpec:
    """The computation of values that are the same in all steps of a request.

    conditions: inputs that are fixed for a request, by name, dotted path or placeholder; None means
    all except the sample, the timestep and the values that another network adds at every step.
    steps: approximate number of timesteps of a request, which decides what is worth storing; None
    is the number that the model was prepared for, or 50.
    capacity: sets of conditions cached at once; the least recently used is dropped first.
    offload: treatment of weights that no step reads once the values are computed: "cpu" moves them
    off the accelerator, "disk" maps them from a temporary file that memory need not hold.
    on_miss: a timestep outside the schedule is computed, or is an error.
    """

    conditions: tuple[str, ...] | None = None
    steps: int | None = None
    capacity: int = 4
    offload: Offload = "none"
    on_miss: OnMiss = "compute"

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, 1, inf, "steps", "capacity")
