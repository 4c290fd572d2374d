"""Quantize a denoiser as diffusers loads it, or load one that was saved quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from tfmq_fx.api import prepare
from tfmq_fx.capture.inputs import find_timestep, named_inputs
from tfmq_fx.conversion.convert import convert
from tfmq_fx.conversion.models import Converted
from tfmq_fx.core.errors import ArtifactError, ConfigError
from tfmq_fx.prologue.load_model import load
from tfmq_fx.serialization.artifact import GRAPH_FILE

from .quantization_config import TFMQConfig

_STEPS = 1000  # of a scheduler's training, where nobody says otherwise


class TFMQQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """What `from_pretrained` of a diffusers model calls for a `TFMQConfig`.

    The object that it returns is made into a `Converted` model, whose outline answers for the
    attributes of the original class.
    """

    requires_calibration = False
    use_keep_in_fp32_modules = True  # as without a quantizer

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._asked: TFMQConfig = quantization_config
        self._dtype: torch.dtype | None = None
        self._device: torch.device | None = None
        self._folder: Path | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            self._asked.recipe()

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        self._dtype = torch_dtype
        return torch_dtype

    def update_device_map(self, device_map: Any) -> None:
        """Take the placement over from diffusers, whose hooks would be lost with the modules."""
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if len(devices) != 1 or devices & {"auto", "balanced", "balanced_low_0", "sequential"}:
            raise ConfigError(
                f"device_map={device_map!r:.80}: a tfmq_fx model lies on one device. Give that, as "
                'in device_map="cuda", or move the model'
            )
        (device,) = devices
        self._device = None if device is None else torch.device(device)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Any) -> list[str]:
        self._folder = Path(checkpoint_files[0]).parent
        return [] if self.pre_quantized else loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized:  # the skeleton on the meta device, which is not needed
            for table in (model._modules, model._parameters, model._buffers):
                table.clear()

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        made = self._loaded() if self.pre_quantized else self._quantized(model)
        vars(model).clear()
        vars(model).update(vars(made))
        object.__setattr__(model, "__class__", type(made))
        return model

    def _loaded(self) -> Converted:
        if self._folder is None or not (self._folder / GRAPH_FILE).exists():
            raise ArtifactError(
                f"{self._folder or 'the directory of the model'} holds no {GRAPH_FILE}, which this "
                "diffusers may not have fetched or named. Fetch the whole directory "
                "(huggingface_hub.snapshot_download), and load it with tfmq_fx.load(directory)"
            )
        model = load(self._folder, device=self._device)
        return model if self._dtype in (None, model.dtype) else model.to(self._dtype)

    def _quantized(self, model: nn.Module) -> Converted:
        asked = self._asked
        source = object.__new__(type(model))  # `model` itself becomes the result
        source.__dict__ = dict(vars(model))
        if self._device is not None:
            source.to(self._device)
        source.eval()
        inputs, timesteps = named_inputs(source, None), asked.timesteps
        if timesteps is None:
            example = torch.as_tensor(inputs[find_timestep(inputs, None)])
            if example.is_floating_point():
                raise ConfigError(
                    f"a {type(model).__name__} takes floats as timesteps, which only its scheduler "
                    "knows: TFMQConfig(timesteps=...) with all values that it will be called with"
                )
            timesteps = _STEPS
        prepared = prepare(
            source, config=asked.recipe(), timesteps=timesteps, dynamic=asked.dynamic
        )
        return convert(prepared, progress=False)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
