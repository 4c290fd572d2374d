"""Load the reference model of a comparison by its name or directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.diagnostics.meta_model import read_config

from .digits import UNET_FOLDER
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
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"{path} is neither {' nor '.join(SHIPPED)}, nor a directory with the config.json that "
            "save_pretrained of a diffusers model writes"
        )
    kind, _ = read_config(file)
    options = {"local_files_only": True, "low_cpu_mem_usage": False, "torch_dtype": dtype}
    try:
        loaded = cast(Any, kind).from_pretrained(path, **options)
    except Exception as error:  # diffusers fails in many ways on files that do not fit
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{path}: {kind.__name__} cannot be loaded: {type(error).__name__}: {reason}"
        ) from error
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.data = tensor.data.clone()  # in the file they start at any byte
    return cast(nn.Module, loaded.eval())
