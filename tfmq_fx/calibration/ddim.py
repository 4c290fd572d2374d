"""Draw images with a denoiser and a scheduler.

`sample` takes any denoiser and any diffusers scheduler whose `step` returns the previous sample
first.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from tfmq_fx.core.distributed import (
    check_same,
    interleaved,
    nothing,
    rank,
    shard,
    shard_indices,
    together,
)
from tfmq_fx.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """What a denoiser saw and answered while sampling, in the order of the steps.

    timesteps: (steps,), as the scheduler gives them.
    inputs: (steps, n, ...), the noisy images x_t.
    outputs: (steps, n, ...), the denoiser's answers.
    """

    timesteps: Tensor
    inputs: Tensor
    outputs: Tensor


def _progress_bar(total: int) -> Any:
    return importlib.import_module("tqdm").tqdm(total=total, desc="sample")


def initial_noise(shape: Sequence[int], *, seed: int) -> Tensor:
    """Standard normal noise, float32 on the CPU, of `shape` (n, ...).

    Drawn image by image from one generator, so the first images of a longer run are those of a
    shorter one with the same seed. Raises ConfigError for an empty shape.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise ConfigError(f"shape must be (n, ...) with no empty dimension, got {tuple(shape)}")
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randn(*shape[1:], dtype=torch.float32, generator=generator) for _ in range(shape[0])]
    )


@overload
def sample(
    denoiser: Callable[..., Any],
    scheduler: Any,
    shape: Sequence[int],
    *,
    num_inference_steps: int,
    seed: int = ...,
    batch_size: int = ...,
    device: torch.device | str = ...,
    progress: bool = ...,
    conditions: Mapping[str, Tensor] | None = ...,
    parallel: bool = ...,
    done: Callable[[], None] = ...,
    record: Literal[False] = ...,
) -> Tensor: ...


@overload
def sample(
    denoiser: Callable[..., Any],
    scheduler: Any,
    shape: Sequence[int],
    *,
    num_inference_steps: int,
    seed: int = ...,
    batch_size: int = ...,
    device: torch.device | str = ...,
    progress: bool = ...,
    conditions: Mapping[str, Tensor] | None = ...,
    parallel: bool = ...,
    done: Callable[[], None] = ...,
    record: Literal[True],
) -> tuple[Tensor, Trajectory]: ...


@torch.no_grad()
def sample(
    denoiser: Callable[..., Any],
    scheduler: Any,
    shape: Sequence[int],
    *,
    num_inference_steps: int,
    seed: int = 0,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    progress: bool = False,
    conditions: Mapping[str, Tensor] | None = None,
    parallel: bool = False,
    done: Callable[[], None] = nothing,
    record: bool = False,
) -> Tensor | tuple[Tensor, Trajectory]:
    """Images (n, ...) drawn by deterministic DDIM (eta 0), on the CPU; with record, a Trajectory.

    denoiser(x, t): x is (batch, ...) float32 and t a tensor without dimensions, both on `device`;
    returns a tensor, a tuple that starts with one, or an object with `.sample`.
    scheduler: a diffusers DDIMScheduler; its timesteps are set here.
    shape: (n, ...) of all images. seed: of the initial noise, which is drawn before batching, as
    in `initial_noise`; so the images do not depend on batch_size beyond rounding.
    conditions: further inputs of the denoiser by name, (n, ...) each, one row for each image.
    parallel: whether processes share the batches (see `distributed`), all of which call this; each
    then has all images, with the bits they have in one process.  done: called by all of them after
    each round of batches.
    Raises ConfigError for an empty shape, batch_size < 1 or num_inference_steps < 1, or conditions
    of another length.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    if num_inference_steps < 1:
        raise ConfigError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    given = dict(conditions or {})
    if wrong := [name for name, value in given.items() if len(value) != shape[0]]:
        raise ConfigError(
            f"{wrong[0]} has {len(given[wrong[0]])} rows for {shape[0]} samples; give one for each"
        )
    noise = initial_noise(shape, seed=seed)
    scheduler.set_timesteps(num_inference_steps, device=device)
    batches = list(zip(range(0, len(noise), batch_size), noise.split(batch_size), strict=True))
    steps = (len(shard_indices(len(batches))) if parallel else len(batches)) * len(
        scheduler.timesteps
    )
    bar = _progress_bar(steps) if progress and not rank() else None

    def draw(start: int, batch: Tensor) -> list[Tensor]:
        own = {name: v[start : start + batch_size].to(device) for name, v in given.items()}
        return _draw(denoiser, scheduler, batch.to(device), own, record, bar)

    if parallel:
        facts = {"shape": tuple(shape), "steps": num_inference_steps, "seed": seed}
        with together("sample()"):
            check_same("sample()", facts | {"batch_size": batch_size, "record": record})
            found = [draw(*batch) for batch in shard(batches, done)]
            found = interleaved(found, len(batches), "images")
    else:
        found = [draw(*batch) for batch in batches]
    if bar is not None:
        bar.close()
    drawn, *recorded = zip(*found, strict=True)
    if not record:
        return torch.cat(drawn)
    inputs, outputs = (torch.cat(parts, 1) for parts in recorded)
    return torch.cat(drawn), Trajectory(
        timesteps=scheduler.timesteps.cpu(), inputs=inputs, outputs=outputs
    )


def _draw(
    denoiser: Callable[..., Any],
    scheduler: Any,
    noise: Tensor,
    conditions: Mapping[str, Tensor],
    record: bool,
    bar: Any,
) -> list[Tensor]:
    """One batch of images (n, ...), on the CPU; with record, also what the denoiser saw and
    answered, (steps, n, ...) each."""
    seen: list[Tensor] = []
    answered: list[Tensor] = []

    def watch(x: Tensor, answer: Tensor) -> None:
        if record:
            # Copies: a denoiser may answer from a buffer that its next call overwrites.
            seen.append(x.to("cpu", copy=True))
            answered.append(answer.to("cpu", copy=True))
        if bar is not None:
            bar.update()

    call = functools.partial(denoiser, **conditions)
    x = denoised(call, scheduler, noise, watch, eta=0.0).cpu()
    return [x, torch.stack(seen), torch.stack(answered)] if record else [x]


def prediction(answer: Any) -> Tensor:
    """The tensor that a denoiser answers with: its answer, or the first of a tuple, or what
    diffusers calls `.sample`."""
    first = answer[0] if isinstance(answer, tuple) else answer
    return cast(Tensor, first if isinstance(first, Tensor) else first.sample)


def denoised(
    denoiser: Callable[[Tensor, Tensor], Any],
    scheduler: Any,
    noise: Tensor,
    watch: Callable[[Tensor, Tensor], object] = lambda x, answer: None,
    **options: Any,
) -> Tensor:
    """What a diffusers scheduler, its timesteps set, makes of noise (n, ...) with `denoiser`.

    denoiser(x, t): t is without dimensions; it answers with what `prediction` reads.  watch: told
    each step's input and prediction.  options: of the scheduler's `step`.
    """
    # Schedulers of flow matching have neither of the two.
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scale(x, t)
        answer = prediction(denoiser(scaled, t))
        watch(scaled, answer)
        x = scheduler.step(answer, t, x, return_dict=False, **options)[0]
    return x
