"""Draw images with a denoiser and a diffusers scheduler."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from tfmq_fx.core.arguments import check_whole
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
) -> Tensor:
    """Images (n, ...) drawn by deterministic DDIM (eta 0), on the CPU.

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
    check_whole(batch_size, "batch_size", 1)
    check_whole(num_inference_steps, "num_inference_steps", 1)
    rows = dict(conditions or {})
    if wrong := [name for name, value in rows.items() if len(value) != shape[0]]:
        raise ConfigError(
            f"{wrong[0]} has {len(rows[wrong[0]])} rows for {shape[0]} samples; give one for each"
        )
    noise = initial_noise(shape, seed=seed)
    scheduler.set_timesteps(num_inference_steps, device=device)
    batches = list(zip(range(0, len(noise), batch_size), noise.split(batch_size), strict=True))
    own = len(shard_indices(len(batches))) if parallel else len(batches)
    total = own * len(scheduler.timesteps)
    bar = tqdm(total=total, desc="sample", file=sys.stderr, disable=not progress or rank() > 0)

    def draw(start: int, batch: Tensor) -> Tensor:
        part = {name: v[start : start + batch_size].to(device) for name, v in rows.items()}

        def answer(x: Tensor, t: Tensor) -> Any:
            bar.update()
            return denoiser(x, t, **part)

        return denoised(answer, scheduler, batch.to(device), eta=0.0).cpu()

    with bar:
        if not parallel:
            return torch.cat([draw(*batch) for batch in batches])
        facts = {"shape": tuple(shape), "steps": num_inference_steps, "seed": seed}
        with together("sample()"):
            check_same("sample()", facts | {"batch_size": batch_size})
            images = [draw(*batch) for batch in shard(batches, done)]
            return torch.cat(interleaved(images, len(batches), "images"))


def record_trajectory(
    denoiser: Callable[..., Any], scheduler: Any, shape: Sequence[int], **options: Any
) -> tuple[Tensor, Trajectory]:
    """Images that `sample` draws in one batch, and what the denoiser saw and answered meanwhile.

    options: those of `sample`, but for batch_size.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def recorded(x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        output = prediction(denoiser(x, t, **conditions))
        # Copies: a denoiser may answer from a buffer that its next call overwrites.
        inputs.append(x.to("cpu", copy=True))
        outputs.append(output.to("cpu", copy=True))
        return output

    images = sample(recorded, scheduler, shape, batch_size=shape[0], **options)
    return images, Trajectory(
        timesteps=scheduler.timesteps.cpu(),
        inputs=torch.stack(inputs),
        outputs=torch.stack(outputs),
    )


def prediction(answer: Any) -> Tensor:
    """The tensor in a denoiser's answer: the answer itself, the first of a tuple, or `.sample`."""
    first = answer[0] if isinstance(answer, tuple) else answer
    return cast(Tensor, first if isinstance(first, Tensor) else first.sample)


def denoised(
    denoiser: Callable[[Tensor, Tensor], Any], scheduler: Any, noise: Tensor, **options: Any
) -> Tensor:
    """Images (n, ...) that a diffusers scheduler, its timesteps set, draws from `noise`.

    denoiser(x, t): t is without dimensions; its answer is read by `prediction`.  options: of the
    scheduler's `step`.
    """
    # Schedulers of flow matching have neither of the two.
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        answer = prediction(denoiser(scale(x, t), t))
        x = scheduler.step(answer, t, x, return_dict=False, **options)[0]
    return x
