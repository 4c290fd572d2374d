"""Build diffusers models from their configuration alone, on the meta device, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tfmq_fx.core.errors import ConfigError

_DENOISERS = ("unet", "transformer", "prior")  # components of a pipeline directory


def meta_model(path: str | Path) -> nn.Module:
    """The diffusers model that a config file describes, on the meta device and in eval mode.

    path: a config.json, a model directory with one, or a pipeline directory with one denoiser.
    Raises ConfigError where the file cannot be read, names no diffusers model, or does not fit it.
    """
    file = _config_file(Path(path))
    kind, config = read_config(file)
    try:
        with torch.device("meta"):
            model: nn.Module = kind.from_config(config)  # type: ignore[attr-defined]
    except Exception as error:  # constructors fail in many ways on a config that does not fit
        raise ConfigError(
            f"{file}: {kind.__name__} cannot be built: {type(error).__name__}: {error}"
        ) from error
    return model.to("meta").eval()  # buffers made through numpy are not on it yet


def _config_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file or directory")
    if (path / "config.json").is_file():
        return path / "config.json"
    inside = [path / name / "config.json" for name in _DENOISERS]
    files = [file for file in inside if file.is_file()]
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(str(file.parent) for file in files)
        raise ConfigError(f"{path} holds several denoisers; choose from {names}")
    raise ConfigError(f"{path} holds no config.json, and no {', '.join(_DENOISERS)} with one")


def read_config(file: Path) -> tuple[type[nn.Module], dict[str, Any]]:
    """The diffusers class that a config.json names, and the content of the file.

    Raises ConfigError where the file cannot be read or names no model of diffusers.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not a JSON file that can be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} is no config: it holds a {type(config).__name__}")
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise ConfigError(f"{file} has no _class_name: it is no config of a diffusers model")
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError(
            f"{file} describes a diffusers model; install diffusers to build it"
        ) from error
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ConfigError(f"{file}: diffusers {diffusers.__version__} has no class {name!r}")
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ConfigError(f"{file}: {name} is no model")
    return kind, config
