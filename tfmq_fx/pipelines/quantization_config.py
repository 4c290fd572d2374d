"""Say to diffusers' `from_pretrained` how a denoiser is to be quantized as it is loaded."""

from __future__ import annotations

import copy
import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from tfmq_fx.conversion.diffusers_form import QUANT_METHOD
from tfmq_fx.core.config import Config, ReconstructionSpec
from tfmq_fx.core.config_json import from_dict, to_dict
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.presets import PRESETS, resolve


class QuantMethod(enum.StrEnum):
    """The name of this library among diffusers' quantization methods."""

    TFMQ = QUANT_METHOD


class TFMQConfig:
    """The recipe by which `from_pretrained` of a diffusers model quantizes what it loads.

        unet = UNet2DConditionModel.from_pretrained(path, quantization_config=TFMQConfig("w8a16"))

    gives a `Converted` model, as `prepare` and `convert` would.  What a folder holds that
    `save_pretrained` wrote is quantized already, and needs none.

    config: a preset that needs no calibration ("w8a16", "w4a16", "w8a8-dynamic", "fp8-dynamic"), or
    a Config of that kind. Weights are rounded to nearest, and nothing is learnt.
    timesteps: the finite set that the model will be called with, as for `prepare`: an int N (0 to
    N - 1) or a sequence of numbers; left out, 0 to 999 where the model takes integers.
    dynamic: as for `prepare`.
    Raises ConfigError for values that cannot be used, and for recipes that read calibration.
    """

    def __init__(
        self,
        config: str | Config = "w8a8-dynamic",
        *,
        timesteps: int | Sequence[float] | None = None,
        dynamic: Sequence[str] | None = None,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ConfigError(f"TFMQConfig: quant_method is {QUANT_METHOD!r}, not {quant_method!r}")
        self.quant_method = QuantMethod.TFMQ
        self.config = from_dict(config, Config) if isinstance(config, dict) else config
        numbers = timesteps is None or isinstance(timesteps, int)
        self.timesteps = timesteps if numbers else [float(t) for t in _each(timesteps)]
        self.dynamic = None if dynamic is None else tuple(dynamic)

    def recipe(self) -> Config:
        """Return the recipe, without anything that learns. Raises ConfigError for one that needs
        calibration."""
        recipe = resolve(self.config)
        if recipe.layers.activations is None and PRESETS.get(recipe.name) == recipe:
            recipe = replace(recipe, reconstruction=ReconstructionSpec(rounding="nearest"))
        if reason := _needs_calibration(recipe):
            raise ConfigError(
                f"TFMQConfig({recipe.name!r}): {reason}, which from_pretrained() cannot measure. "
                "Load the model without it, and call prepared = tfmq_fx.prepare(model, "
                f"config={recipe.name!r}); tfmq_fx.calibrate(prepared, pipeline, ...); "
                "tfmq_fx.convert(prepared). Without calibration there are w8a16, w4a16, "
                "w8a8-dynamic and fp8-dynamic."
            )
        return replace(recipe, temporal=replace(recipe.temporal, tiar_iters=0))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data for `from_dict`."""
        config = to_dict(self.config) if isinstance(self.config, Config) else self.config
        data: dict[str, Any] = {"quant_method": QUANT_METHOD, "config": config}
        if self.timesteps is not None:
            data["timesteps"] = copy.copy(self.timesteps)
        if self.dynamic is not None:
            data["dynamic"] = list(self.dynamic)
        return data

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Return what `to_dict` wrote. Raises ConfigError for an unknown key."""
        known = ("config", "timesteps", "dynamic", "quant_method")
        if unknown := sorted(set(config_dict) - set(known)):
            raise ConfigError(f"TFMQConfig: unknown keys {unknown}; known are {list(known)}")
        made = cls(**config_dict)
        return (made, kwargs) if return_unused_kwargs else made

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return `to_dict` as a JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"TFMQConfig {self.to_json_string()}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TFMQConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _each(timesteps: Any) -> list[Any]:
    try:
        return list(timesteps)
    except TypeError as error:
        raise ConfigError(
            f"TFMQConfig(timesteps=) takes an int or numbers, not {timesteps!r:.80}"
        ) from error


def _needs_calibration(recipe: Config) -> str:
    """Return what of a recipe reads calibration, or ""."""
    for name in ("layers", "first", "last"):
        layer: LayerConfig | None = getattr(recipe, name)
        if layer is not None and layer.activations is not None and not layer.activations.dynamic:
            return f"its {name} have calibrated ranges of inputs"
    learnt = recipe.reconstruction
    if recipe.layers.weights is not None and (
        learnt.rounding != "nearest" or learnt.iters or learnt.rounds
    ):
        return "its weights are rounded by calibration samples"
    if recipe.attention is not None:
        return "its attention has calibrated ranges"
    if recipe.rewrites.tcr is not None or recipe.rewrites.smooth is not None:
        return "its layers are scaled by calibrated ranges"
    return "its outputs are corrected by samples" if recipe.correction != "none" else ""
