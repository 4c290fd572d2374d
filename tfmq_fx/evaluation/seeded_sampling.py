"""Images drawn from a seed each, so that an image is the same in any batch and on its own.

A pipeline, or a scheduler with a denoiser, becomes a function from rows to images. The noise of
image i comes from a generator of its own on the CPU, seeded `seed + i`: the initial noise and what
the scheduler adds at each step. Nothing here touches the pipeline it is given, its scheduler or
torch's global random state.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tfmq_fx.calibration.ddim import denoised
from tfmq_fx.calibration.sampling_pass import takes_batch_size, with_denoiser
from tfmq_fx.core.errors import ConfigError

Draw = Callable[[range], Tensor]

_OF_ALL = ("timesteps", "sigmas", "callback_on_step_end_tensor_inputs")
_DEFAULT_SAMPLES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What images to draw.

    samples: how many.  seed: of the first; image i has seed + i.  steps: of the denoising loop.
    each: arguments with a row for each image.  common: those that all images share.
    """

    samples: int
    seed: int
    steps: int
    each: Mapping[str, Any]
    common: Mapping[str, Any]

    def generators(self, rows: range) -> list[torch.Generator]:
        """A generator for each of these images, on the CPU."""
        return [torch.Generator().manual_seed(self.seed + i) for i in rows]

    def arguments(self, rows: range) -> dict[str, Any]:
        """The arguments of a call that draws these images."""
        own = {name: value[rows.start : rows.stop] for name, value in self.each.items()}
        return {**self.common, **own}


def wanted_images(
    arguments: Mapping[str, Any],
    *,
    samples: int | None,
    seed: int,
    steps: int,
    shared: Collection[str],
) -> Wanted:
    """`samples` images, drawn with these arguments of a pipeline or a denoiser.

    A list, and a tensor or array with dimensions, has a row for each image; tuples, numbers,
    strings and all else are for all of them, and so is what `shared` names. A prompt in one string
    is repeated. samples: None is the number of rows, or 8 where no argument has rows.
    Raises ConfigError for numbers of rows that differ, an unknown name in `shared`, and arguments
    that would give an image other noise than its seed's.
    """
    for name, why in (
        ("generator", "every image has one of its own, give seed="),
        ("num_images_per_prompt", "repeat the prompts"),
    ):
        if name in arguments:
            raise ConfigError(f"{name} cannot be given: {why}")
    if unknown := sorted(set(shared) - set(arguments)):
        raise ConfigError(f"shared names {unknown[0]!r}, which is none of the arguments given")
    whole = {*shared, *_OF_ALL}
    each = {n: v for n, v in arguments.items() if n not in whole and _has_rows(v)}
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
    common = {n: v for n, v in arguments.items() if n not in each}
    for name in [n for n, v in common.items() if isinstance(v, str) and _is_prompt(n)]:
        each[name] = [common.pop(name)] * samples
    return Wanted(samples=samples, seed=seed, steps=steps, each=each, common=common)


def _has_rows(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0)


def _is_prompt(name: str) -> bool:
    return re.fullmatch(r"(negative_)?prompt(_\d)?", name) is not None


# ---------------------------------------------------------------------------- pipelines


def by_pipeline(
    pipeline: Any,
    wanted: Wanted,
    *,
    denoiser: nn.Module | None = None,
    component: str | None = None,
) -> Draw:
    """How a copy of the diffusers pipeline `pipeline` draws the images of `wanted`.

    denoiser: what takes the place of the pipeline's own.  component: the name of the one that is
    replaced; None finds it.  Raises ConfigError where the pipeline has no denoiser or several,
    takes no generator, or is not told how many images to draw.
    """
    kind = type(pipeline).__name__
    modules = {n: part for n, part in pipeline.components.items() if isinstance(part, nn.Module)}
    if not modules or "scheduler" not in pipeline.components:
        missing = "scheduler" if modules else "denoiser"
        raise ConfigError(
            f"this {kind} has no {missing} (components: {', '.join(pipeline.components)})"
        )
    taken = inspect.signature(pipeline.__call__).parameters
    if "generator" not in taken:
        raise ConfigError(f"this {kind} takes no generator, so its noise cannot be chosen")
    counted = takes_batch_size(pipeline)
    if not (counted or wanted.each):
        raise ConfigError(
            f"this {kind} draws an image for each prompt, label or embedding; give "
            "compare() some, by name, as the pipeline takes them"
        )
    if wanted.common.get("output_type", "np") == "latent":
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
    lent: list[torch.Generator] = []
    _lend(own.scheduler, lent)
    fixed = {"output_type": "np"} if "output_type" in taken else {}

    def draw(rows: range) -> Tensor:
        lent[:] = wanted.generators(rows)
        given = {**fixed, **wanted.arguments(rows), "num_inference_steps": wanted.steps}
        if counted:
            given["batch_size"] = len(rows)
        with _global_seed(wanted.seed + rows.start):
            found = own(**given, generator=list(lent))
        images = to_tensor(found[0] if isinstance(found, tuple) else getattr(found, "images", None))
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
    found = [name for name in modules if name.startswith(("unet", "transformer"))]
    if len(found) == 1:
        return found[0]
    raise ConfigError(
        f"cannot tell which part of this {kind} the candidate replaces; pass component=<one of "
        f"{', '.join(found or modules)}>"
    )


def _lend(scheduler: Any, lent: list[torch.Generator]) -> None:
    """Have `scheduler.step` draw row i's noise from generator i of `lent`, the list as it is then,
    where its caller names none (as DiTPipeline does not).

    A batch for guidance has the images several times over.
    """
    step = scheduler.step
    if "generator" not in inspect.signature(step).parameters:
        return

    @functools.wraps(step)
    def seeded(model_output: Any, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and kwargs.get("generator") is None and len(sample) % len(lent) == 0:
            kwargs["generator"] = lent * (len(sample) // len(lent))
        return step(model_output, timestep, sample, *args, **kwargs)

    scheduler.step = seeded


@contextlib.contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """torch's own generators seeded, and as they were afterwards: for schedulers that draw from
    them (of those, images are paired, but depend on how they are batched)."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


def to_tensor(images: Any) -> Tensor:
    """Images as pipelines give them as one tensor (n, channels, height, width), float32 in [-1, 1].

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
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ConfigError(
            f"the pipeline must draw images (n, channels, height, width), got {found}"
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


def by_scheduler(
    denoiser: Callable[..., Any], source: tuple[Any, Sequence[int]], wanted: Wanted
) -> Draw:
    """How `denoiser` and a copy of a scheduler draw the images of `wanted`.

    source: the scheduler, and the shape of one image: (channels, height, width).
    denoiser(x, t, **arguments): x is (batch, *shape) float32, t (batch,); it answers with a tensor,
    a tuple that starts with one, or an object with `.sample`. The images are clamped to [-1, 1].
    """
    scheduler, shape = source
    own = copy.deepcopy(scheduler)
    lent: list[torch.Generator] = []
    _lend(own, lent)
    device = getattr(denoiser, "device", "cpu")

    @torch.no_grad()
    def draw(rows: range) -> Tensor:
        lent[:] = wanted.generators(rows)
        given = {
            n: v.to(device) if isinstance(v, Tensor) else v
            for n, v in wanted.arguments(rows).items()
        }
        own.set_timesteps(wanted.steps, device=device)
        noise = [torch.randn(1, *shape, dtype=torch.float32, generator=each) for each in lent]
        with _global_seed(wanted.seed + rows.start):
            x = denoised(
                lambda x, t: denoiser(x, t.expand(len(x)), **given),
                own,
                torch.cat(noise).to(device),
            )
        return x.float().cpu().clamp(-1, 1)

    return draw
