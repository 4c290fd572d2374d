"""Quantize the denoisers of a diffusers pipeline in one call."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tfmq_fx import api, backends
from tfmq_fx.calibration.sampling_pass import takes_batch_size
from tfmq_fx.capture.call_inference import Dynamic
from tfmq_fx.conversion.models import Compiled, Converted
from tfmq_fx.core.arguments import check_dynamic, check_names, check_whole, path_of
from tfmq_fx.core.config import Config, PrologueSpec
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.inference import outside_inference_mode
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.presets import resolve
from tfmq_fx.quant.budget import read_budget

from .default_inputs import call_arguments, in_batches, without_decoding
from .denoisers import chosen_denoisers
from .pipeline_report import PipelineReport
from .record_inputs import record_inputs


@outside_inference_mode
def quantize_pipeline(
    pipeline: Any,
    config: str | Config = "w8a8",
    *,
    prompts: str | Sequence[str] | None = None,
    steps: int = 20,
    samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    component: str | Collection[str] | None = None,
    overrides: Mapping[str, LayerConfig] | None = None,
    dynamic: Dynamic | None = None,
    budget: object = None,
    checkpoint: str | Path | None = None,
    bind: bool | PrologueSpec = False,
    compile: bool | str = False,
    progress: bool = True,
    **call: Any,
) -> PipelineReport:
    """Quantize the denoisers of `pipeline`, put the results in their places, and report.

    Each denoiser is captured at the inputs that the pipeline gives it (see `record_inputs`),
    calibrated while the pipeline samples in full precision, and converted. `pipeline` then draws
    with the results; the modules it had are never changed, and `restore()` of the report puts them
    back. Where an error is raised, `pipeline` is as it was.

    pipeline: a diffusers pipeline.  config, overrides, dynamic: as for `prepare`.
    prompts: what text pipelines draw for calibration, a sample each; left out, eight built-in ones
    (`default_inputs.PROMPTS`).  call: further arguments of the pipeline's call, as it takes them:
    an image and a mask, embeddings, a guidance scale, class_labels (left out, eight, evenly over
    the classes).  steps: of the sampler; the results know the timesteps of these.
    samples (64): of pipelines that take no prompts or labels.  batch_size: samples at a time, 2
    where left out, and 32 where there are no prompts or labels.  seed: of sampling.
    component: names of the denoisers to quantize; left out, all: unet, transformer, transformer_2,
    prior, decoder and the like.
    budget, checkpoint: as for `convert`; where there are several denoisers, each has the budget and
    a folder of its own in `checkpoint`.
    bind: whether to bind the results to requests, as `bind_request` does; or the settings.
    compile: whether to compile them, or the name of the backend.
    Raises ConfigError, before the long work, for arguments that cannot be used, CaptureError where
    a denoiser cannot be captured, CalibrationError for NaN or Inf.
    """
    recipe = resolve(config)
    _check(overrides, dynamic, budget, compile, steps=steps, seed=seed)
    chosen = chosen_denoisers(pipeline, component)
    if "num_inference_steps" in call or "generator" in call:
        raise ConfigError("give steps= and seed= in place of num_inference_steps and generator")
    arguments = call_arguments(pipeline, prompts, call)
    if samples is not None and not takes_batch_size(pipeline):
        raise ConfigError(
            f"leave out samples: a {type(pipeline).__name__} draws as many as it has prompts, "
            "labels or embeddings"
        )
    first, size = in_batches(pipeline, arguments, batch_size)
    folders = _folders(checkpoint, chosen)
    examples = {
        name: record_inputs(pipeline, component=name, num_inference_steps=steps, **first)
        for name in chosen
    }
    prepared = {
        name: api.prepare(
            module, examples[name], config=recipe, overrides=overrides, dynamic=dynamic
        )
        for name, module in chosen.items()
    }
    for model in prepared.values():
        api.calibrate(
            model,
            pipeline,
            num_inference_steps=steps,
            samples=samples,
            batch_size=size,
            seed=seed,
            progress=progress,
            **without_decoding(pipeline) | arguments,
        )
    models: dict[str, Converted] = {}
    spec = bind if isinstance(bind, PrologueSpec) else None
    facts = {"pipeline": type(pipeline).__name__, "steps": steps}
    for name in chosen:
        done = api.convert(
            prepared.pop(name), budget=budget, checkpoint=folders[name], progress=progress
        )
        models[name] = done if bind is False else api.bind_request(done, spec=spec)
        own = {"component": name, "class": type(chosen[name]).__name__}
        models[name].record["sampled"] = facts | own
    placed: dict[str, Converted | Compiled] = {**models}
    if compile is not False:
        backend = "auto" if compile is True else compile
        placed = {name: api.compile(model, backend) for name, model in models.items()}
    return PipelineReport(pipeline, models, placed)


def _check(
    overrides: Any, dynamic: Any, budget: object, compile: Any, *, steps: int, seed: int
) -> None:
    """Raise ConfigError for arguments that a later call would refuse, after the long work."""
    check_whole(steps, "steps", 1)
    check_whole(seed, "seed", 0)
    check_dynamic(dynamic)
    if overrides is not None:
        check_names(overrides, "overrides", "LayerConfig")
    if budget is not None:
        read_budget(budget, float_bytes=1 << 40, float_micros=1.0)
    if isinstance(compile, str) and compile != "auto":
        backends.backend_module(compile)
    elif not isinstance(compile, (bool, str)):
        raise ConfigError(f"compile must be True, False or a backend's name, got {compile!r}")


def _folders(checkpoint: Any, chosen: Mapping[str, nn.Module]) -> dict[str, Path | None]:
    """The folder of each denoiser's checkpoint."""
    if checkpoint is None:
        return dict.fromkeys(chosen)
    path = path_of(checkpoint, "checkpoint")
    return {name: path if len(chosen) == 1 else path / name for name in chosen}
