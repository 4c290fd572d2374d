"""Call a denoiser as a pipeline, a scheduler or an iterable of inputs does, to calibrate it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.capture.call_spec import CallSpec
from tfmq_fx.capture.model_checks import unwrapped
from tfmq_fx.core.arguments import check_names, check_whole
from tfmq_fx.core.distributed import nothing, shard
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.progress import progress_bar
from tfmq_fx.core.timesteps import is_scheduler

from .call_batches import Call, call_batches
from .scheduler_sampling import batch_generators, sample
from .scheduler_steps import rehearse

Settings = Mapping[str, int | None]

SETTINGS = {"num_inference_steps": 50, "samples": 64, "batch_size": 32, "seed": 0}
"""The settings of a sampling pass, and their values where they are left out."""


@dataclass(frozen=True, slots=True)
class SamplingPass:
    """A repeatable or single pass that calls a denoiser at every step of sampling.

    run(denoiser, done): with many processes each takes its own batches, and all call `done` after
    each round.  repeatable: whether another denoiser would get the inputs that its own outputs lead
    to, which is so where a scheduler drives and not where inputs are given.
    """

    run: Callable[..., None]
    repeatable: bool


def sampling_pass(
    source: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    original: nn.Module,
    settings: Settings,
    fixed_batch: int | None = None,
    progress: bool,
) -> SamplingPass:
    """The sampling pass of `source`: a diffusers pipeline that holds `original`, a (scheduler,
    shape) pair, or an iterable of inputs.

    args, kwargs, settings: those of `tfmq_fx.calibrate`; None where a setting was left out.
    fixed_batch: the batch size of every call, where the model was captured for one alone.
    Raises ConfigError for arguments that cannot be used, and settings that `source` brings.
    """
    chosen: dict[str, int] = {}
    for name, usual in SETTINGS.items():
        setting = settings[name]
        value = usual if setting is None else setting
        check_whole(value, name, int(name != "seed"))
        chosen[name] = int(value)
    if hasattr(source, "components"):
        return _pipeline_pass(source, args, kwargs, original, settings, chosen, progress)
    others = ", ".join([*(type(value).__name__ for value in args), *kwargs])
    if isinstance(source, tuple) and len(source) == 2 and _drives(source[0]):
        if args or not all(isinstance(value, Tensor) for value in kwargs.values()):
            raise ConfigError(
                "calibrate() with a (scheduler, shape) pair takes the model's further inputs by "
                f"name, tensors with a row for each sample; got {others}"
            )
        if fixed_batch is not None:
            _fit(chosen, settings, fixed_batch)
        return _scheduler_pass(source[0], source[1], kwargs, chosen, progress)
    if not isinstance(source, Iterable):
        raise ConfigError(
            "calibrate() takes a diffusers pipeline, a (scheduler, shape) pair or an iterable of "
            f"inputs, got {type(source).__name__}"
        )
    if others:
        raise ConfigError(f"calibrate() with an iterable takes nothing else; got {others}")
    _refuse(settings, SETTINGS, "an iterable brings its own calls, as many as it has")
    return _iterable_pass(source, progress)


def _drives(value: Any) -> bool:
    """Whether `value` is a scheduler, of any kind."""
    return not isinstance(value, (Tensor, type)) and (hasattr(value, "step") or is_scheduler(value))


def _fit(chosen: dict[str, int], settings: Settings, batch: int) -> None:
    """Choose the settings left out so that all batches have `batch` samples.

    Raises ConfigError where the settings passed give other batches.
    """
    if settings["batch_size"] is None:
        chosen["batch_size"] = batch
    if settings["samples"] is None:
        chosen["samples"] = -(-chosen["samples"] // batch) * batch
    if chosen["batch_size"] != batch or chosen["samples"] % batch:
        raise ConfigError(
            f"the model was captured for batches of {batch} alone: calibrate() needs batch_size="
            f"{batch} and samples a multiple of it, got {chosen['batch_size']} and "
            f"{chosen['samples']}"
        )


def _refuse(settings: Settings, names: Iterable[str], why: str) -> None:
    """Raise ConfigError for settings that were passed and would change nothing."""
    if useless := [f"{name}={settings[name]}" for name in names if settings[name] is not None]:
        raise ConfigError(f"leave out {', '.join(useless)}: {why}")


def _scheduler_pass(
    scheduler: Any,
    shape: Any,
    conditions: Mapping[str, Tensor],
    chosen: Mapping[str, int],
    progress: bool,
) -> SamplingPass:
    """A pass that draws images of `shape`, one sample's, with a copy of `scheduler`."""
    sizes = shape if isinstance(shape, Sequence) else ()
    if not sizes or not all(isinstance(size, Integral) and int(size) >= 1 for size in sizes):
        raise ConfigError(
            "calibrate() with a (scheduler, shape) pair takes the sizes of one sample, as "
            f"(channels, height, width); got {shape!r}"
        )
    options = {name: value for name, value in chosen.items() if name != "samples"}

    def run(denoiser: nn.Module, done: Callable[[], None] = nothing) -> None:
        call = getattr(denoiser, "call", None)
        steps = rehearse(scheduler, shape, chosen["num_inference_steps"])
        sample(
            denoiser if call is None else _receiving(denoiser, call, steps),
            copy.deepcopy(scheduler),
            (chosen["samples"], *shape),
            device=getattr(denoiser, "device", "cpu"),
            dtype=getattr(denoiser, "dtype", torch.float32),
            progress=progress,
            conditions=conditions,
            parallel=True,
            done=done,
            **options,
        )

    return SamplingPass(run, repeatable=True)


def _receiving(denoiser: nn.Module, call: CallSpec, steps: Sequence[Tensor]) -> Callable[..., Any]:
    """A function that calls a captured `denoiser` at `steps`, the timesteps of a scheduler.

    They arrive in the dtype that the scheduler gives, or as whole numbers, where the graph takes
    those and holds all of them; one for each sample, as models written by hand often want them.
    """
    kind = call.inputs[call.timestep_position].dtype
    whole = not kind.is_floating_point and all(float(t.to(kind)) == float(t) for t in steps)

    def received(x: Tensor, t: Any, **inputs: Tensor) -> Any:
        row = torch.as_tensor(t, device=x.device).expand(len(x)).contiguous()
        return denoiser(x, row.to(kind) if whole else row, **inputs)

    return received


def _iterable_pass(calls: Iterable[Any], progress: bool) -> SamplingPass:
    """A pass that makes `calls`, each a tuple or a dict of arguments."""

    def run(denoiser: nn.Module, done: Callable[[], None] = nothing) -> None:
        for inputs in shard(progress_bar(calls, "calibration", enabled=progress), done):
            if isinstance(inputs, Mapping):
                check_names(inputs, "a call", "inputs")
                denoiser(**inputs)
            elif isinstance(inputs, (tuple, list)):
                denoiser(*inputs)
            else:
                raise ConfigError(
                    "calibrate() takes an iterable of calls, each a tuple or a dict of arguments; "
                    f"it gave a {type(inputs).__name__}"
                )

    return SamplingPass(run, repeatable=False)


def _pipeline_pass(
    pipeline: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    original: nn.Module,
    settings: Settings,
    chosen: Mapping[str, int],
    progress: bool,
) -> SamplingPass:
    """A pass that calls pipelines like `pipeline`, with the denoiser in the place of `original`."""
    make = _pipeline_maker(pipeline, original)  # a pass outlives calibration and holds neither
    kind = type(pipeline).__name__
    counted = takes_batch_size(pipeline) and not args
    if not counted:
        why = f"{kind} draws as many samples as its prompts, labels or embeddings are"
        _refuse(settings, ("samples",), why)
    if "prompt" in inspect.signature(pipeline.__call__).parameters and not args and not kwargs:
        raise ConfigError(
            f'a {kind} needs prompts: calibrate(prepared, pipe, ["a photo of ...", ...]), with as '
            "many as there shall be samples"
        )
    samples, size = chosen["samples"], chosen["batch_size"]
    calls: list[Call] = [(tuple(args), dict(kwargs))]
    if counted:
        counts = [min(size, samples - start) for start in range(0, samples, size)]
        calls = [((), {**kwargs, "batch_size": count}) for count in counts]
    elif settings["batch_size"] is not None:
        calls = call_batches(args, kwargs, size)

    def run(denoiser: nn.Module, done: Callable[[], None] = nothing) -> None:
        pipe = make(denoiser)
        pipe.set_progress_bar_config(disable=not progress)
        steps = chosen["num_inference_steps"]
        batches = zip(calls, batch_generators(chosen["seed"], len(calls)), strict=True)
        for (given, named), generator in shard(batches, done):
            pipe(*given, **named, num_inference_steps=steps, generator=generator)

    return SamplingPass(run, repeatable=True)


def takes_batch_size(pipeline: Any) -> bool:
    """Whether a call of `pipeline` takes the number of samples, and no prompts or labels."""
    return "batch_size" in inspect.signature(pipeline.__call__).parameters


def with_denoiser(pipeline: Any, source: nn.Module, denoiser: nn.Module) -> Any:
    """A pipeline like `pipeline` with `denoiser` for its component `source`, and a scheduler of its
    own; `pipeline` and its scheduler stay as they are.

    Raises ConfigError where `source` is none of its components.
    """
    return _pipeline_maker(pipeline, source)(denoiser)


def _pipeline_maker(pipeline: Any, source: nn.Module) -> Callable[[nn.Module], Any]:
    """A function that makes pipelines like `pipeline` around other denoisers, and keeps neither
    `pipeline` nor `source` alive."""
    components = dict(pipeline.components)
    kind = type(pipeline)
    name = next((name for name, part in components.items() if unwrapped(part) is source), None)
    if name is None:
        raise ConfigError(
            f"the prepared model is not a component of this {kind.__name__} "
            f"(components: {', '.join(components)}). Calibrate with the pipeline it came from, or "
            "pass a (scheduler, shape) pair."
        )
    config = getattr(pipeline, "config", {})
    options = inspect.signature(kind).parameters  # such as requires_safety_checker
    settings = {n: config[n] for n in options if n in config and n not in components}
    del components[name]

    def make(denoiser: nn.Module) -> Any:
        own = {"scheduler": copy.deepcopy(components["scheduler"]), name: denoiser}
        return kind(**settings, **{**components, **own})

    return make
