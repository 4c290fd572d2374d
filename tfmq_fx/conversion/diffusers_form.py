"""Write and read models by the methods that diffusers calls on the parts of a pipeline."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar

import torch

from tfmq_fx.core.arguments import path_of
from tfmq_fx.core.distributed import world
from tfmq_fx.core.errors import ArtifactError, ConfigError
from tfmq_fx.quant.budget import read_budget

from .save_model import json_entries, save_model

QUANT_METHOD = "tfmq"  # what a config.json of diffusers calls this library


class DiffusersForm:
    """The methods `save_pretrained` and `from_pretrained` of a model.

    reader: `prologue.load_model.load`, which knows all classes of models.
    """

    reader: ClassVar[Callable[..., Any]]

    def saved_form(self) -> Any:
        """Return the converted model that is written for this one. Raises ArtifactError."""
        return self

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        *,
        calibration: bool = False,
    ) -> None:
        """Write the model to a directory that diffusers and `tfmq_fx.load` read.

        The files are those of `tfmq_fx.save`, with the names that diffusers looks for, and a
        config.json.  `pipeline.save_pretrained` calls this; a compiled model is written as the
        converted one that it was compiled from, while that is in memory.
        max_shard_size: as for diffusers ("10GB"); there is one file of tensors, and a model that
        is larger is refused.  calibration: as for `tfmq_fx.save`.
        Raises ArtifactError where the directory holds other files or cannot be written, and for
        options of diffusers that this form does not have.
        """
        for option, given, remedy in (
            (
                "safe_serialization=False",
                not safe_serialization,
                "there is no pickle: leave it out",
            ),
            (f"variant={variant!r}", variant is not None, "there is one form, leave it out"),
            ("push_to_hub=True", push_to_hub, "upload the directory with huggingface_hub"),
        ):
            if given:
                raise ArtifactError(f"save_pretrained({option}) of a tfmq_fx model: {remedy}")
        model = self.saved_form()
        if max_shard_size is not None:
            _check_size(model.nbytes(), max_shard_size)
        if not is_main_process and world() == 1:
            return
        save_model(
            model, save_directory, calibration=calibration, diffusers_config=config_json(model)
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Raise ArtifactError: files are uploaded by huggingface_hub itself."""
        raise ArtifactError(
            "push_to_hub(): call save_pretrained(directory) and upload that with "
            "huggingface_hub.upload_folder"
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        quantization_config: Any = None,
        outputs: Collection[type] = (),
    ) -> Any:
        """Return the `Converted` model in a local directory, bit for bit as it was saved.

        subfolder: of the directory.  torch_dtype, dtype: the dtype to cast the model to where it
        has another.  device: as for `tfmq_fx.load`, as are outputs.
        Raises ArtifactError as `tfmq_fx.load` does, ConfigError for a model that is to be quantized
        again, and for a dtype that it cannot be cast to.
        """
        path = path_of(pretrained_model_name_or_path, "path", ArtifactError)
        if quantization_config is not None:
            raise ConfigError(f"{path} is quantized already: leave out quantization_config")
        if subfolder is not None:
            path = path / subfolder
        model = cls.reader(path, outputs=outputs, device=device)
        asked = torch_dtype if dtype is None else dtype
        return model if asked in (None, model.dtype) else model.to(asked)


def config_json(model: Any) -> dict[str, Any]:
    """Return the content of config.json, by which classes of diffusers find how to load a model."""
    config = json_entries(model.model_config) or {}
    kind = config.get("_class_name") if model.outline is None else model.outline.kind
    if "diffusers" in sys.modules:
        config.setdefault("_diffusers_version", sys.modules["diffusers"].__version__)
    method = {"quant_method": QUANT_METHOD, "config": model.recipe.name}
    return {**config, "_class_name": kind, "quantization_config": method}


def _check_size(size: int, limit: int | str) -> None:
    """Raise ArtifactError where a file of `size` bytes is larger than `limit`."""
    if size > read_budget(limit, float_bytes=0, float_micros=0).bytes:
        raise ArtifactError(
            f"save_pretrained(max_shard_size={limit!r}): a tfmq_fx model is one file, here of "
            f"{size} bytes. Leave the option out"
        )
