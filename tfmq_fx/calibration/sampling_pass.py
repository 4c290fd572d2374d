"""Run a pipeline, a scheduler or given inputs, so that calibration can watch the denoiser."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.capture.model_checks import unwrapped
from tfmq_fx.core.arguments import check_names
from tfmq_fx.core.distributed import nothing, shard
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.progress import progress_bar

from .ddim import sample


def with_denoiser(pipeline: Any, source: nn.Module, denoiser: nn.Module) -> Any:
    """A pipeline like `pipeline` with `denoiser` for its component `source`, and a scheduler of its
    own; the given one and its scheduler stay as they are.

    Raises ConfigError where `source` is none of its components.
    """
    return _without(pipeline, source)(denoiser)


def _without(pipeline: Any, source: nn.Module) -> Callable[[nn.Module], Any]:
    """Makes pipelines like `pipeline` of other denoisers, and holds neither of the two."""
    components = dict(pipeline.components)
    kind = type(pipeline)
    name = next((name for name, part in components.items() if unwrapped(part) is source), None)
    if name is None:
        raise ConfigError(
            f"the prepared model is not a component of this {kind.__name__} "
            f"(components: {', '.join(components)}). Calibrate with the pipeline it came from, or "
            "pass a (scheduler, shape) pair."
        )
    settings = _settings(pipeline)
    del components[name]

    def made(denoiser: nn.Module) -> Any:
        own = {"scheduler": copy.deepcopy(components["scheduler"]), name: denoiser}
        return kind(**settings, **{**components, **own})

    return made


def _settings(pipeline: Any) -> dict[str, Any]:
    """The constructor's arguments that are no components (requires_safety_checker, ...)."""
    config = getattr(pipeline, "config", {})
    names = inspect.signature(type(pipeline)).parameters
    return {n: config[n] for n in names if n in config and n not in pipeline.components}


@dataclass(frozen=True, slots=True)
class SamplingPass:
    """A way to call a denoiser as sampling does.

    run: calls the module it is given.  Of many processes each takes its own batches, and all call
    what `run` is given besides after each round.  repeatable: whether another module would be shown
    what it steers to itself, which is so where a scheduler drives and not where inputs are given.
    """

    run: Callable[..., None]
    repeatable: bool


SETTINGS = {"num_inference_steps": 50, "samples": 64, "batch_size": 32, "seed": 0}
"""What a sampling pass goes by, and what it is where it was left out."""


def _checked(settings: Mapping[str, int | None]) -> dict[str, int]:
    chosen: dict[str, int] = {}
    for name, usual in SETTINGS.items():
        value, least = settings[name], int(name != "seed")
        value = usual if value is None else value
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ConfigError(f"{name} must be a whole number, at least {least}, got {value!r}")
        chosen[name] = int(value)
    return chosen


def _fit(chosen: dict[str, int], settings: Mapping[str, int | None], batch: int) -> None:
    """Choose what was left out so that all batches have that size. Raises ConfigError where what
    was given has others."""
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


def _check_shape(shape: Any) -> None:
    sizes = shape if isinstance(shape, Sequence) else ()
    whole = all(isinstance(size, Integral) and int(size) >= 1 for size in sizes)
    if not sizes or not whole:
        raise ConfigError(
            "calibrate() with a (scheduler, shape) pair takes the sizes of one sample, as "
            f"(channels, height, width); got {shape!r}"
        )


def _is_pair(source: Any) -> bool:
    return isinstance(source, tuple) and len(source) == 2 and hasattr(source[0], "step")


def _refuse(settings: Mapping[str, int | None], names: Iterable[str], why: str) -> None:
    """Raise ConfigError for settings that were given and would change nothing."""
    if given := [f"{name}={settings[name]}" for name in names if settings[name] is not None]:
        raise ConfigError(f"leave out {', '.join(given)}: {why}")


def sampling_pass(
    source: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    original: nn.Module,
    settings: Mapping[str, int | None],
    fixed_batch: int | None = None,
    progress: bool,
) -> SamplingPass:
    """How `source` samples: a diffusers pipeline that holds `original`, a (scheduler, shape) pair,
    or an iterable of inputs; the arguments are those of `tfmq_fx.calibrate`.

    settings: SETTINGS by name, None where they were left out.  fixed_batch: the batch size of every
    call, where the model was captured for one alone.
    Raises ConfigError for arguments that cannot be used, settings that `source` brings included.
    """
    chosen = _checked(settings)
    if fixed_batch is not None and _is_pair(source):
        _fit(chosen, settings, fixed_batch)
    steps, samples = chosen["num_inference_steps"], chosen["samples"]
    batch_size, seed = chosen["batch_size"], chosen["seed"]

    def by_scheduler(denoiser: nn.Module, done: Callable[[], None] = nothing) -> None:
        scheduler, shape = source
        sample(
            denoiser,
            copy.deepcopy(scheduler),
            (samples, *shape),
            num_inference_steps=steps,
            seed=seed,
            batch_size=batch_size,
            device=getattr(denoiser, "device", "cpu"),
            progress=progress,
            conditions=kwargs,
            parallel=True,
            done=done,
        )

    def by_inputs(denoiser: nn.Module, done: Callable[[], None] = nothing) -> None:
        for inputs in shard(progress_bar(source, "calibration", enabled=progress), done):
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

    if hasattr(source, "components"):
        make = _without(source, original)  # a pass that is kept keeps neither alive
        if args or not takes_batch_size(source):
            _refuse(
                settings,
                ("samples", "batch_size"),
                f"{type(source).__name__} draws one batch, as many as its prompts, labels or "
                "embeddings are",
            )
        _check_prompts(source, args, kwargs)

        def by_pipeline(denoiser: nn.Module, done: Callable[[], None] = nothing) -> None:
            pipe = make(denoiser)
            pipe.set_progress_bar_config(disable=not progress)
            calls: list[dict[str, Any]] = [{}]  # prompts, labels or embeddings say how many
            if not args and takes_batch_size(pipe):
                starts = range(0, samples, batch_size)
                calls = [{"batch_size": min(batch_size, samples - start)} for start in starts]
            own = {**kwargs, "num_inference_steps": steps}
            each = zip(calls, _generators(seed, len(calls)), strict=True)
            for call, generator in shard(each, done):
                pipe(*args, **own | call | {"generator": generator})

        return SamplingPass(by_pipeline, True)
    given = ", ".join([*(type(a).__name__ for a in args), *kwargs])
    if _is_pair(source):
        if args or not all(isinstance(value, Tensor) for value in kwargs.values()):
            raise ConfigError(
                "calibrate() with a (scheduler, shape) pair takes the model's further inputs by "
                f"name, tensors with a row for each sample; got {given}"
            )
        _check_shape(source[1])
        return SamplingPass(by_scheduler, True)
    if not isinstance(source, Iterable):
        raise ConfigError(
            "calibrate() takes a diffusers pipeline, a (scheduler, shape) pair or an iterable of "
            f"inputs, got {type(source).__name__}"
        )
    if given:
        raise ConfigError(f"calibrate() with an iterable takes nothing else; got {given}")
    _refuse(settings, SETTINGS, "an iterable brings its own calls, as many as it has")
    return SamplingPass(by_inputs, False)


def _check_prompts(pipeline: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ConfigError for a pipeline that draws what a text says and is given none."""
    parameters = inspect.signature(pipeline.__call__).parameters
    if "prompt" in parameters and not args and not kwargs:
        raise ConfigError(
            f'a {type(pipeline).__name__} needs prompts: calibrate(prepared, pipe, ["a photo of '
            f'...", ...]), with as many as there shall be samples'
        )


def _generators(seed: int, count: int) -> list[torch.Generator]:
    """One for each batch, so that any process can draw any of them; the first one's is the seed."""
    draw = torch.Generator().manual_seed(seed)
    seeds = [seed, *torch.randint(2**62, (count - 1,), generator=draw).tolist()]
    return [torch.Generator().manual_seed(each) for each in seeds]


def takes_batch_size(pipeline: Any) -> bool:
    """Whether a call of `pipeline` is told how many samples to draw, not what of."""
    return "batch_size" in inspect.signature(pipeline.__call__).parameters
