"""The model that another is compared with, by the name or directory given on a command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .digits import UNET_FOLDER
from .errors import ConfigError
from .glyphs import DIT_FOLDER
from .glyphs import UNET_FOLDER as GLYPHS_UNET_FOLDER

SHIPPED = {"digits": UNET_FOLDER, "glyphs": DIT_FOLDER, "glyphs-unet": GLYPHS_UNET_FOLDER}


def load_reference(name: str, dtype: torch.dtype) -> nn.Module:
    """A shipped model ("digits", "glyphs", "glyphs-unet") or the one that diffusers'
    save_pretrained wrote to the directory `name`, in eval mode and in `dtype`; nothing is
    downloaded.

    Raises ConfigError where there is none, or it cannot be loaded.
    """
    path = SHIPPED.get(name, Path(name))
    kind = _class_name(path)
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError(f"{path} is a diffusers model; install diffusers to load it") from error
    made: Any = getattr(diffusers, kind, None)
    if not (isinstance(made, type) and issubclass(made, nn.Module)):
        raise ConfigError(f"{path}: diffusers {diffusers.__version__} has no model {kind!r}")
    options = {"local_files_only": True, "low_cpu_mem_usage": False, "torch_dtype": dtype}
    try:
        loaded = cast(Any, made).from_pretrained(path, **options)
    except Exception as error:  # whatever diffusers makes of files that do not fit
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{path}: {kind} cannot be loaded: {type(error).__name__}: {reason}"
        ) from error
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.data = tensor.data.clone()  # in the file they start at any byte, see artifact.py
    return cast(nn.Module, loaded.eval())


def _class_name(path: Path) -> str:
    """The class that a model directory names."""
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"{path} is neither {' nor '.join(SHIPPED)}, nor a directory with the config.json that "
            "save_pretrained of a diffusers model writes"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not a JSON file that can be read: {error}") from error
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise ConfigError(f"{file} has no _class_name: it is no config of a diffusers model")
    return kind
