"""Define the quantization of one layer: its weight and its input."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from .spec_checks import check_range, check_types, require

Format = Literal["int", "fp8"]
RangeEstimator = Literal["minmax", "mse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """The format of a weight: integers or 8-bit floats, scaled per output channel or per group.

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
        check_types(self)
        check_range(self, 2, 8, "bits")
        check_range(self, 1, inf, "search", "group_size")
        if self.format == "fp8":
            require(self.bits == 8, f"WeightSpec: fp8 has 8 bits, got bits={self.bits}")
            require(
                self.group_size is None,
                "WeightSpec: fp8 has one scale per output channel; "
                f"leave out group_size={self.group_size}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationSpec:
    """The format of a layer's input: integers or 8-bit floats, calibrated or ranged at run time.

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
        check_types(self)
        require(
            self.bits in (4, 5, 6, 7, 8, 16),
            f"ActivationSpec.bits must be 4 to 8 or 16, got {self.bits}",
        )
        check_range(self, 1, inf, "timestep_groups")
        if self.dynamic:
            require(
                self.timestep_groups is None and self.ranges == "minmax",
                "ActivationSpec: dynamic ranges are measured at run time; "
                "leave out timestep_groups and ranges",
            )
            object.__setattr__(self, "per_timestep", False)
        require(
            self.per_timestep or self.timestep_groups is None,
            "ActivationSpec: timestep_groups contradicts per_timestep=False, which keeps one range",
        )
        if self.format == "fp8":
            require(self.bits == 8, f"ActivationSpec: fp8 has 8 bits, got bits={self.bits}")
            require(
                self.ranges == "minmax",
                "ActivationSpec: ranges='mse' clips what integers would round coarsely, which fp8 "
                "does not; use ranges='minmax'",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """The formats of weight and input of one layer; None keeps that side in floating point."""

    weights: WeightSpec | None = None
    activations: ActivationSpec | None = None

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.weights is not None or self.activations is None,
            "LayerConfig: activations cannot be quantized with floating-point weights; "
            "give weights=WeightSpec(...) as well",
        )
        formats = [s.format for s in (self.weights, self.activations) if s is not None]
        require(
            len(set(formats)) < 2,
            f"LayerConfig: weights and activations must have the same format, got "
            f"{' and '.join(formats)}",
        )

    @property
    def calibrated(self) -> ActivationSpec | None:
        """The format of activations that need calibration; None if they are float or dynamic."""
        acts = self.activations
        return None if acts is None or acts.dynamic else acts
