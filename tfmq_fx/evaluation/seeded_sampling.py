"""Draw each image from a seed of its own, so that it is the same in any batch and on its own.

A pipeline, or a scheduler with a denoiser, becomes a function from rows to images. The noise of
image i comes from a generator of its own on the CPU, seeded `seed + i`: the initial noise and what
the scheduler adds at each step. The pipeline and its scheduler stay as they are.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tfmq_fx.calibration.sampling_pass import takes_batch_size, with_denoiser
from tfmq_fx.calibration.scheduler_steps import denoised
from tfmq_fx.core.errors import ConfigError

Sampler = Callable[[range], Tensor]  # rows -> images (n, channels, height, width) in [-1, 1]

_WHOLE = ("timesteps", "sigmas", "callback_on_step_end_tensor_inputs")  # lists, but not by row
_DEFAULT_SAMPLES = 8
_REFUSED = {
    "generator": "every image has one of its own, give seed=",
    "num_images_per_prompt": "repeat the prompts",
    "parallel": "each process compares by itself",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawPlan:
    """The images to draw and the arguments they are drawn with.

    samples: number of images.  seed: of the first; image i has seed + i.  steps: of the denoising
    loop.  each: arguments with a row for each image.  common: those that all images share.
    """

    samples: int
    seed: int
    steps: int
    each: Mapping[str, Any]
    common: Mapping[str, Any]

    def generators(self, rows: range) -> list[torch.Generator]:
        """A generator on the CPU for each of these images."""
        return [torch.Generator().manual_seed(self.seed + i) for i in rows]

    def arguments(self, rows: range) -> dict[str, Any]:
        """The arguments of a call that draws these images."""
        own = {name: value[rows.start : rows.stop] for name, value in self.each.items()}
        return {**self.common, **own}


def plan_images(
    arguments: Mapping[str, Any],
    *,
    samples: int | None,
    seed: int,
    steps: int,
    shared: Collection[str],
) -> DrawPlan:
    """A plan for `samples` images, drawn with these arguments of a pipeline or a denoiser.

    A list, and a tensor or array with dimensions, has a row for each image; tuples, numbers,
    strings and all else are for all of them, and so is what `shared` names. A prompt in one string
    is repeated. samples: None is the number of rows, or 8 where no argument has rows.
    Raises ConfigError for numbers of rows that differ, an unknown name in `shared`, and arguments
    that would give an image other noise than its seed's.
    """
    for name, why in _REFUSED.items():
        if name in arguments:
            raise ConfigError(f"{name} cannot be given: {why}")
    if unknown := sorted(set(shared) - set(arguments)):
        raise ConfigError(f"shared names {unknown[0]!r}, which is none of the arguments given")
    each = {
        name: value
        for name, value in arguments.items()
        if name not in (*shared, *_WHOLE)
        and (isinstance(value, list) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim))
    }
    if samples is None:
        samples = min((len(v) for v in each.values()), default=_DEFAULT_SAMPLES)
    for name, value in each.items():
        if len(value) != samples:
            raise ConfigError(
                f"{name} has {len(value)} rows for {samples} images; give one for each, or "
                f"shared=({name!r},) if it is one argument for all of them"
            )
    if samples < 1:
        raise ConfigError(f"nothing to draw: {next(iter(each))} is empty")
    common = {name: value for name, value in arguments.items() if name not in each}
    for name, value in list(common.items()):
        if isinstance(value, str) and re.fullmatch(r"(negative_)?prompt(_\d)?", name):
            each[name] = [common.pop(name)] * samples
    return DrawPlan(samples=samples, seed=seed, steps=steps, each=each, common=common)


# ---------------------------------------------------------------------------- pipelines


def pipeline_sampler(
    pipeline: Any,
    plan: DrawPlan,
    *,
    denoiser: nn.Module | None = None,
    component: str | None = None,
) -> Sampler:
    """A function that draws the images of `plan` with a copy of a diffusers pipeline.

    denoiser: takes the place of the pipeline's own.  component: the name of the one that is
    replaced; None finds it.  Raises ConfigError where the pipeline has no denoiser or several,
    takes no generator, or lacks the arguments that set the number of images.
    """
    kind = type(pipeline).__name__
    modules = {n: part for n, part in pipeline.components.items() if isinstance(part, nn.Module)}
    if not modules or "scheduler" not in pipeline.components:
        missing = "scheduler" if modules else "denoiser"
        raise ConfigError(
            f"this {kind} has no {missing} (components: {', '.join(pipeline.components)})"
        )
    parameters = inspect.signature(pipeline.__call__).parameters
    if "generator" not in parameters:
        raise ConfigError(f"this {kind} takes no generator, so its noise cannot be chosen")
    counted = takes_batch_size(pipeline)
    if not (counted or plan.each):
        raise ConfigError(
            f"this {kind} draws an image for each prompt, label or embedding; give "
            "compare() some, by name, as the pipeline takes them"
        )
    if plan.common.get("output_type", "np") == "latent":
        raise ConfigError('output_type="latent" gives no images to compare; use "np" or "pil"')
    replaced = next(iter(modules.values()))
    if denoiser is not None:
        replaced = modules[_denoiser_name(modules, component, kind)]
        for name in ("config", "device", "dtype"):
            if hasattr(replaced, name) and not hasattr(denoiser, name):
                raise ConfigError(
                    f"the candidate, a {type(denoiser).__name__}, has no .{name}, which pipelines "
                    "read of their denoiser"
                )
    own = with_denoiser(pipeline, replaced, replaced if denoiser is None else denoiser)
    own.set_progress_bar_config(disable=True)
    generators = _share_generators(own.scheduler)
    fixed = {"output_type": "np"} if "output_type" in parameters else {}

    def draw(rows: range) -> Tensor:
        generators[:] = plan.generators(rows)
        arguments = {**fixed, **plan.arguments(rows), "num_inference_steps": plan.steps}
        if counted:
            arguments["batch_size"] = len(rows)
        answer = own(**arguments, generator=list(generators))
        first = answer[0] if isinstance(answer, tuple) else getattr(answer, "images", None)
        images = to_tensor(first)
        if len(images) != len(rows):
            raise ConfigError(f"this {kind} drew {len(images)} images where {len(rows)} were due")
        return images

    return draw


def _denoiser_name(modules: Mapping[str, nn.Module], component: str | None, kind: str) -> str:
    if component is not None:
        if component in modules:
            return component
        raise ConfigError(
            f"component={component!r} is no module of this {kind}; it has {', '.join(modules)}"
        )
    names = [name for name in modules if name.startswith(("unet", "transformer"))]
    if len(names) == 1:
        return names[0]
    raise ConfigError(
        f"cannot tell which part of this {kind} the candidate replaces; pass component=<one of "
        f"{', '.join(names or modules)}>"
    )


def _share_generators(scheduler: Any) -> list[torch.Generator]:
    """A list whose generator i, at the time of a step, draws row i's noise in `scheduler.step`.

    That holds where the caller names no generator, as DiTPipeline does. A batch for guidance has
    the images several times over.
    """
    step, generators = scheduler.step, list[torch.Generator]()
    if "generator" not in inspect.signature(step).parameters:
        return generators

    @functools.wraps(step)
    def seeded(model_output: Any, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and kwargs.get("generator") is None and len(sample) % len(generators) == 0:
            kwargs["generator"] = generators * (len(sample) // len(generators))
        return step(model_output, timestep, sample, *args, **kwargs)

    scheduler.step = seeded
    return generators


def to_tensor(images: Any) -> Tensor:
    """Images of any form that pipelines return, as one tensor (n, channels, height, width), float32
    in [-1, 1].

    images: a list of PIL images, an array (n, height, width, channels) or a tensor (n, channels,
    height, width) or a list of their rows, floats in [0, 1] or bytes. Raises ConfigError for
    anything else.
    """
    if isinstance(images, list) and images:
        tensors = isinstance(images[0], Tensor)
        images = torch.stack(images) if tensors else np.stack([np.asarray(i) for i in images])
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images[..., None] if images.ndim == 3 else images)  # grey
        images = images.movedim(-1, 1) if images.dim() == 4 else images
    if not isinstance(images, Tensor) or images.dim() != 4:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ConfigError(
            f"the pipeline must draw images (n, channels, height, width), got {shape}"
        )
    levels = 255 if images.dtype == torch.uint8 else 1
    images = images.detach().to("cpu", torch.float32) / levels
    if bool(((images < 0) | (images > 1)).any()):
        raise ConfigError(
            f"the pipeline's images run from {float(images.min()):.3g} to "
            f"{float(images.max()):.3g}; they must lie in [0, 1], as diffusers clamps them"
        )
    scaled: Tensor = 2 * images - 1
    return scaled


# ---------------------------------------------------------------------------- schedulers


def scheduler_sampler(
    denoiser: Callable[..., Any], source: tuple[Any, Sequence[int]], plan: DrawPlan
) -> Sampler:
    """A function that draws the images of `plan` with `denoiser` and a copy of a scheduler.

    source: the scheduler, and the shape of one image: (channels, height, width).
    denoiser(x, t, **arguments): x is (batch, *shape) float32, t (batch,); it answers with a tensor,
    a tuple that starts with one, or an object with `.sample`. The images are clamped to [-1, 1].
    """
    scheduler, shape = copy.deepcopy(source[0]), source[1]
    generators = _share_generators(scheduler)
    device = getattr(denoiser, "device", "cpu")

    @torch.no_grad()
    def draw(rows: range) -> Tensor:
        generators[:] = plan.generators(rows)
        arguments = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in plan.arguments(rows).items()
        }
        scheduler.set_timesteps(plan.steps, device=device)
        noise = [torch.randn(1, *shape, dtype=torch.float32, generator=g) for g in generators]
        x = denoised(
            lambda x, t: denoiser(x, t.expand(len(x)), **arguments),
            scheduler,
            torch.cat(noise).to(device),
        )
        return x.float().cpu().clamp(-1, 1)

    return draw
