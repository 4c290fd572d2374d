"""Define the presets: our own recipes and those of published methods."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .config import AttentionSpec, Config, ReconstructionSpec, RewriteSpec, TemporalSpec
from .errors import ConfigError
from .layer_config import ActivationSpec, LayerConfig, WeightSpec


def _layer(weights: int, activations: ActivationSpec | None) -> LayerConfig:
    """Quantization of a layer to `weights` bits, and of its input unless that is None."""
    return LayerConfig(weights=WeightSpec(bits=weights), activations=activations)


def _with_activations(config: Config, **changes: Any) -> Config:
    """The recipe with `changes` to the inputs of all its layers, first and last included."""

    def changed(layer: LayerConfig | None) -> LayerConfig:
        assert layer is not None and layer.activations is not None
        return replace(layer, activations=replace(layer.activations, **changes))

    return replace(
        config,
        layers=changed(config.layers),
        first=changed(config.first),
        last=changed(config.last),
    )


def _plain(name: str, weights: int, activations: int | None) -> Config:
    """A recipe with 8-bit first and last weights, and a 16-bit input of the first layer.

    The noisy sample spans the noise range, and the step of an 8-bit grid over it is coarser than
    what the last steps must resolve; it feeds a handful of channels, so 16 bits there cost nothing.
    """
    if activations is None:
        edge = _layer(8, None)
        return Config(name=name, layers=_layer(weights, None), first=edge, last=edge)
    return Config(
        name=name,
        layers=_layer(weights, ActivationSpec(bits=activations)),
        first=_layer(8, ActivationSpec(bits=16)),
        last=_layer(8, ActivationSpec(bits=max(activations, 8))),
    )


def _fp8(name: str) -> Config:
    """A recipe with e4m3 weights and inputs, except that the first layer is as in "w8a8".

    3 bits of mantissa would blur the noisy sample itself.
    """
    fp8 = LayerConfig(weights=WeightSpec(format="fp8"), activations=ActivationSpec(format="fp8"))
    return replace(_plain(name, 8, 8), layers=fp8, last=fp8)


def _dynamic(base: Config) -> Config:
    """The recipe with ranges measured at run time and weights rounded to nearest, so that it needs
    the timesteps and no calibration."""
    nearest = ReconstructionSpec(rounding="nearest")
    base = replace(base, name=f"{base.name}-dynamic", reconstruction=nearest)
    return _with_activations(base, dynamic=True)


def _best(weights: int, activations: int) -> Config:
    """The recipe that measured best in the ablation of docs/quality.md: split shortcuts, rotated
    linear layers, refined second-order codes; below 8 bits of activations clipped ranges and a
    low-rank branch as well, which at 8 bits cost more than they bring."""
    coarse = activations < 8
    acts = ActivationSpec(bits=activations, ranges="mse" if coarse else "minmax")
    return replace(
        _plain("best", weights, activations),
        layers=_layer(weights, acts),
        rewrites=RewriteSpec(split_concat=True, rotate=64, low_rank=8 if coarse else 0),
        reconstruction=ReconstructionSpec(refine=3),
    )


_RELEASED = ReconstructionSpec(
    rounding="nearest",
    iters=20_000,
    quantize_inputs=False,
    batch_size=32,
    learning_rate=1e-3,
    samples=5120,
)
"""Block reconstruction as in the released code of BRECQ and TFMQ-DM: 20,000 steps a block from
nearest rounding, activations in full precision meanwhile, 256 samples for each of 20 steps.

Kinder than that code in three ways: the error and the rounding term are normalised, so that one
weight suits all blocks; biases move along; and no block ends worse than nearest."""


def _brecq(weights: int, activations: int) -> Config:
    """BRECQ (arXiv 2102.05426): block reconstruction, static ranges, 8-bit first and last layers;
    the time embedding is quantized like any other layer."""
    edge = _layer(8, ActivationSpec(bits=max(activations, 8), per_timestep=False))
    return Config(
        name="brecq",
        layers=_layer(weights, ActivationSpec(bits=activations, per_timestep=False)),
        first=edge,
        last=edge,
        temporal=TemporalSpec(mode="tib", tiar_iters=0),
        reconstruction=_RELEASED,
    )


def _q_diffusion(weights: int, activations: int) -> Config:
    """Q-Diffusion (arXiv 2302.04304): BRECQ on samples drawn evenly over timesteps, shortcuts split
    at their concatenation, attention's products quantized."""
    return replace(
        _brecq(weights, activations),
        name="q-diffusion",
        rewrites=RewriteSpec(split_concat=True),
        attention=AttentionSpec(
            activations=ActivationSpec(bits=max(activations, 4), per_timestep=False),
            probabilities_bits=8,
        ),
    )


def _ptq4dm(weights: int, activations: int) -> Config:
    """PTQ4DM (arXiv 2211.15736): nearest rounding and static ranges of least squared error, on
    timesteps drawn from a normal distribution that leans towards little noise."""
    return replace(
        _with_activations(_brecq(weights, activations), ranges="mse"),
        name="ptq4dm",
        reconstruction=ReconstructionSpec(rounding="nearest", sampling="normal", samples=1024),
    )


def _ptqd(weights: int, activations: int) -> Config:
    """PTQD (arXiv 2305.10657): Q-Diffusion, and the error of the output corrected by a factor and a
    mean for each timestep; the variance of a stochastic sampler stays as it is."""
    return replace(_q_diffusion(weights, activations), name="ptqd", correction="noise")


def _tfmq(weights: int, activations: int) -> Config:
    """TFMQ-DM (arXiv 2311.16503): TIAR for the temporal block, finite set calibration everywhere,
    block reconstruction of the rest, all at the released settings."""
    return replace(
        _with_activations(_brecq(weights, activations), per_timestep=True),
        name="tfmq",
        temporal=TemporalSpec(mode="tib", tiar_iters=20_000),
    )


def _tfmq_cache(weights: int, activations: int) -> Config:
    """The journal extension of TFMQ-DM (arXiv 2407.19547): cached temporal features or the block
    after TIAR, chosen by measured disturbance."""
    base = _tfmq(weights, activations)
    return replace(base, name="tfmq-cache", temporal=replace(base.temporal, mode="select"))


def _tcaq(weights: int, activations: int) -> Config:
    """TCAQ-DM (arXiv 2412.16700): joint reparameterisation of timesteps and channels, ranges for
    groups of timesteps, reconstruction, then two rounds of it on what the quantized model visits.
    The bits of attention probabilities decide their grid; the paper's likelihood test (DAQ) chose
    worse."""
    base = _brecq(weights, activations)
    base = _with_activations(base, per_timestep=True, timestep_groups=10)
    assert base.layers.activations is not None
    return replace(
        base,
        name="tcaq",
        rewrites=RewriteSpec(tcr=10.0),
        attention=AttentionSpec(
            activations=base.layers.activations,
            probabilities_bits=activations,
            probabilities="log2" if activations < 6 else "uniform",
        ),
        reconstruction=replace(_RELEASED, rounds=2, round_iters=5_000),
    )


RECIPES: dict[str, tuple[Callable[[int, int], Config], tuple[int, int]]] = {
    "best": (_best, (4, 8)),
    "brecq": (_brecq, (4, 8)),
    "q-diffusion": (_q_diffusion, (4, 8)),
    "ptq4dm": (_ptq4dm, (8, 8)),
    "ptqd": (_ptqd, (4, 8)),
    "tfmq": (_tfmq, (4, 8)),
    "tfmq-cache": (_tfmq_cache, (4, 8)),
    "tcaq": (_tcaq, (6, 6)),
}
"""Recipes that take bits: name -> (function of weight and activation bits, default bits of both).

"tfmq-w6a6" is "tfmq" with 6-bit weights and activations; a16 means integers of 16 bits.
"""

PRESETS: dict[str, Config] = {
    "fp": Config(name="fp", temporal=TemporalSpec(mode="table")),
    "w8a8": _plain("w8a8", 8, 8),
    "w4a8": _plain("w4a8", 4, 8),
    "w8a16": _plain("w8a16", 8, None),
    "w4a16": _plain("w4a16", 4, None),
    "fp8": _fp8("fp8"),
    "w8a8-dynamic": _dynamic(_plain("w8a8", 8, 8)),
    "fp8-dynamic": _dynamic(_fp8("fp8")),
    **{name: make(*bits) for name, (make, bits) in RECIPES.items()},
}
"""Presets by name. In "w8a16" and "w4a16" activations stay in the model's own dtype."""

_WITH_BITS = re.compile(r"(.+)-w(\d+)a(\d+)")


def resolve(config: str | Config) -> Config:
    """Return the Config of a preset name ("w4a8", "best", "best-w4a6"), or a Config unchanged.

    Raises ConfigError for an unknown name.
    """
    if isinstance(config, Config):
        return config
    if isinstance(config, str) and config in PRESETS:
        return PRESETS[config]
    bits = _WITH_BITS.fullmatch(config) if isinstance(config, str) else None
    if bits is None or bits[1] not in RECIPES:
        raise ConfigError(
            f"unknown config {config!r}; presets are {', '.join(PRESETS)}; "
            f"{', '.join(RECIPES)} take bits, as in 'best-w4a6'"
        )
    make, _ = RECIPES[bits[1]]
    return replace(make(int(bits[2]), int(bits[3])), name=str(config))
