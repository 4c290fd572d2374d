"""Take the steps of any diffusers scheduler, and find out beforehand whether it can be driven."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tfmq_fx.core.errors import ConfigError

_DRIVEN = (
    "A scheduler can drive whose set_timesteps(n) and step(model_output, timestep, sample) need "
    "nothing else and whose samples are noise, as those of DDIM, DDPM, PNDM, LCM, and the Euler, "
    "Heun, DPM-Solver, UniPC and flow-matching families. Otherwise calibrate with the pipeline, or "
    "with an iterable of the model's calls"
)
_VARIANCE = "variance_type"  # of a scheduler's config: "learned" where models answer with both
_USUAL = ("model_output", "timestep", "sample")
_SUPPLIED = ("eta", "generator", "prev_timestep", "return_dict")  # arguments of step() given here


def prediction(answer: Any) -> Tensor:
    """The tensor in a denoiser's answer: the answer itself, the first of a tuple, or `.sample`."""
    first = answer[0] if isinstance(answer, tuple) else answer
    return cast(Tensor, first if isinstance(first, Tensor) else first.sample)


def begin(scheduler: Any, num_inference_steps: int, device: torch.device | str) -> None:
    """Set the timesteps of a scheduler, on `device` where it takes one."""
    takes_device = "device" in _parameters(scheduler.set_timesteps)
    options = {"device": device} if takes_device else {}
    scheduler.set_timesteps(num_inference_steps, **options)


def denoised(
    denoiser: Callable[[Tensor, Tensor], Any],
    scheduler: Any,
    noise: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images (n, ...) that a diffusers scheduler, its timesteps set, draws from `noise`.

    denoiser(x, t): x has the dtype of `noise`, t is without dimensions, as the scheduler gives it;
    the answer is read by `prediction`.  generator: of the noise that steps add.  What a step takes
    besides is as in diffusers' pipelines: eta is 0.
    """
    # Schedulers of flow matching have neither of the two.
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    x = (noise * getattr(scheduler, "init_noise_sigma", 1.0)).to(noise.dtype)
    takes = _parameters(scheduler.step)
    options: dict[str, Any] = {"return_dict": False}
    if "eta" in takes:
        options["eta"] = 0.0
    if "generator" in takes and generator is not None:
        options["generator"] = generator
    steps = scheduler.timesteps
    for i, t in enumerate(steps):
        answer = prediction(denoiser(scale(x, t).to(noise.dtype), t))
        if "prev_timestep" in takes:  # of unCLIP, which would take t - 1
            options["prev_timestep"] = steps[i + 1] if i + 1 < len(steps) else None
        x = scheduler.step(answer, t, x, **options)[0]
    return x


def rehearse(scheduler: Any, shape: Sequence[int], num_inference_steps: int) -> list[Tensor]:
    """The timesteps, in order and without dimensions, at which a scheduler calls a denoiser.

    shape: of one sample.  All steps are taken by a copy on the CPU, with a denoiser that answers
    with zeros.  Raises ConfigError, saying what can drive, where they cannot be taken.
    """
    kind, met = type(scheduler).__name__, list[Tensor]()
    takes = _parameters(getattr(scheduler, "step", None))
    empty, named = inspect.Parameter.empty, (inspect.Parameter.VAR_KEYWORD,)
    needed = [n for n, p in takes.items() if p.default is empty and p.kind not in named]
    needed = [name for name in needed if name not in _SUPPLIED]
    more = [name for name in needed if name not in _USUAL]
    if len(needed) > len(_USUAL):
        raise ConfigError(f"{kind}.step() needs {', '.join(more)} as well. {_DRIVEN}")

    learns_variance = "learned" in str(getattr(getattr(scheduler, "config", None), _VARIANCE, ""))

    def answer(x: Tensor, t: Tensor) -> Tensor:
        met.append(t)
        return torch.zeros_like(x if not learns_variance else torch.cat([x, x], 1))

    noise = torch.zeros(1, *shape, dtype=torch.float32)
    try:
        own = copy.deepcopy(scheduler)
        begin(own, num_inference_steps, "cpu")
        image = denoised(answer, own, noise, generator=torch.Generator().manual_seed(0))
    except Exception as error:
        raise ConfigError(
            f"a {kind} cannot drive {num_inference_steps} steps: {type(error).__name__}: "
            f"{str(error).strip():.300}. {_DRIVEN}"
        ) from error
    if (
        not isinstance(image, Tensor)
        or image.shape != noise.shape
        or not image.dtype.is_floating_point
    ):
        raise ConfigError(f"the samples of a {kind} are no noise like its input. {_DRIVEN}")
    return [torch.as_tensor(t) for t in met]


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a function by name; none where it is none."""
    return dict(inspect.signature(function).parameters) if callable(function) else {}
