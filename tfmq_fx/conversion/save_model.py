"""Write a converted model to a directory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfmq_fx.core.arguments import path_of
from tfmq_fx.core.config_json import to_dict
from tfmq_fx.core.distributed import rank, together
from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.core.inference import outside_inference_mode
from tfmq_fx.serialization import artifact


@outside_inference_mode
@together("save()")
def save_model(
    model: Any,
    path: str | Path,
    *,
    calibration: bool = False,
    diffusers_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a `Converted` model to `path`, as `tfmq_fx.save` describes.

    diffusers_config: the content of a config.json, where the files are to have the names that
    diffusers looks for; None: they have the library's own.
    """
    path, origin = path_of(path, "path", ArtifactError), model.origin
    if calibration and origin is not None and origin.calibrated and origin.calibration is None:
        raise ArtifactError(
            "save(calibration=True) of a model that was loaded without its calibration: there is "
            "none to keep. Leave the option out, or convert the source again"
        )
    if model.watch is not None:
        model.watch.check_contents()
    if rank():
        return
    artifact.save(
        path,
        gm=model.gm,
        call=model.call.to_dict(),
        config=to_dict(model.recipe),
        extra={
            "record": model.record,
            "model_config": json_entries(model.model_config),
            "source": None if model.outline is None else model.outline.to_json(),
            "prologue": model.prologue_settings(),
        },
        origin=None if origin is None else origin.to_parts(calibration=calibration),
        diffusers_config=diffusers_config,
    )


def json_entries(config: Any) -> dict[str, Any] | None:
    """Return the entries of a model configuration that JSON can hold."""
    if not isinstance(config, Mapping):
        return None
    entries: dict[str, Any] = {}
    for key, value in config.items():
        with contextlib.suppress(TypeError):
            entries[key] = json.loads(json.dumps(value))
    return entries
