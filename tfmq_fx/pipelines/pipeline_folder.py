"""Write a pipeline with quantized denoisers as a folder in diffusers' form, and read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tfmq_fx.core.errors import ArtifactError, ConfigError, TfmqError
from tfmq_fx.core.temporary_files import folder_beside
from tfmq_fx.serialization.artifact import GRAPH_FILE
from tfmq_fx.serialization.atomic_directory import make_parents, swap

from .denoisers import copied
from .pipeline_report import PipelineReport

INDEX = "model_index.json"


def read_index(path: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline's folder.

    Raises ConfigError, saying what is there instead, where there is none.
    """
    if not path.exists():
        raise ConfigError(f"{path}: there is no such directory")
    if (path / INDEX).is_file():
        try:
            found = json.loads((path / INDEX).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path / INDEX} is not JSON: {error}") from error
        if isinstance(found, dict):
            return found
        raise ConfigError(f"{path / INDEX} must be a JSON object")
    what = "holds no pipeline: it has no model_index.json"
    if (path / GRAPH_FILE).is_file():
        what = "is a denoiser that tfmq_fx saved, without its pipeline"
    elif (path / "config.json").is_file():
        what = "is one model without its pipeline, so nothing says what it is called with"
    raise ConfigError(
        f"{path} {what}. Give the directory that pipe.save_pretrained() writes; a denoiser alone "
        "is quantized in Python, with tfmq_fx.prepare, calibrate and convert"
    )


def load_pipeline(path: Path, device: str | None = None) -> Any:
    """The pipeline in a folder, its quantized denoisers loaded by tfmq_fx; nothing is downloaded.

    device: where it shall be, such as "cuda"; None leaves it on the CPU.
    Raises ConfigError where there is none or it cannot be loaded.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError(
            'pipelines need diffusers: pip install "tfmq-fx[diffusers]" transformers'
        ) from error
    # what was left out when it was written, as text encoders may be
    absent = {name: None for name, entry in read_index(path).items() if entry == [None, None]}
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            path, local_files_only=True, **absent
        )
        return pipeline if device is None else pipeline.to(device)
    except TfmqError:
        raise
    except Exception as error:  # diffusers fails in many ways on files that do not fit
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{path}: the pipeline cannot be loaded: {type(error).__name__}: {reason}"
        ) from error


def write_pipeline(report: PipelineReport, path: Path) -> None:
    """Write the pipeline that `report` is about to a folder, its converted models in their places.

    The folder appears complete or not at all; an earlier quantized pipeline there is replaced.
    Raises ArtifactError where it cannot be written.
    """
    check_writable(path)
    own = copied(report.pipeline)
    for name, model in report.models.items():
        setattr(own, name, model)
    with folder_beside(path, "pipeline") as new:
        try:
            own.save_pretrained(new)
        except TfmqError:
            raise
        except (OSError, RuntimeError) as error:
            raise ArtifactError(f"{path} cannot be written: {error}") from error
        swap(new, path)


def check_writable(path: Path) -> None:
    """Raise ArtifactError where a pipeline's folder cannot be written to `path`, or where that
    holds anything but an earlier quantized pipeline."""
    if path.exists() and not path.is_dir():
        raise ArtifactError(f"{path} is a file: give the name of a directory")
    if path.is_dir() and any(path.iterdir()) and not [*path.glob(f"*/{GRAPH_FILE}")]:
        raise ArtifactError(
            f"{path} holds other files than a quantized pipeline: give a new directory"
        )
    make_parents(path.absolute().parent)
