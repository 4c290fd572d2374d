"""Draw images with a denoiser and a diffusers scheduler."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

from .scheduler_steps import begin, denoised, prediction


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


def batch_generators(seed: int, count: int) -> list[torch.Generator]:
    """One generator for each batch, so that any process can draw any batch."""
    draw = torch.Generator().manual_seed(seed)
    seeds = [seed, *torch.randint(2**62, (count - 1,), generator=draw).tolist()]
    return [torch.Generator().manual_seed(each) for each in seeds]


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
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Images (n, ...) drawn by the steps of a scheduler, with eta 0 where it has one, on the CPU.

    denoiser(x, t): x is (batch, ...) of `dtype` and t a tensor without dimensions, both on
    `device`; returns a tensor, a tuple that starts with one, or an object with `.sample`.
    scheduler: of diffusers; its timesteps are set here, and each batch is drawn by a copy.
    shape: (n, ...) of all images. seed: of the initial noise, which is drawn before batching, as
    in `initial_noise`; so the images do not depend on batch_size beyond rounding, where steps add
    no noise. What they add comes from a generator for each batch.
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
    begin(scheduler, num_inference_steps, device)
    starts = range(0, len(noise), batch_size)
    generators = batch_generators(seed, len(starts))
    batches = list(zip(starts, noise.split(batch_size), generators, strict=True))
    own = len(shard_indices(len(batches))) if parallel else len(batches)
    total = own * len(scheduler.timesteps)
    bar = tqdm(total=total, desc="sample", file=sys.stderr, disable=not progress or rank() > 0)

    def draw(start: int, batch: Tensor, generator: torch.Generator) -> Tensor:
        part = {name: v[start : start + batch_size].to(device) for name, v in rows.items()}

        def answer(x: Tensor, t: Tensor) -> Any:
            bar.update()
            return denoiser(x, t, **part)

        own = copy.deepcopy(scheduler)  # many keep what earlier steps gave
        x = batch.to(device=device, dtype=dtype)
        return denoised(answer, own, x, generator=generator).cpu()

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
