"""What a quantized denoiser is judged by: noise ratios, Frechet distance, and the images it draws.

Pure functions over tensors; sums run in float64. `sample` takes any denoiser and any diffusers
scheduler whose `step` returns the previous sample first.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from .errors import ConfigError
from .noise import decibels, energies, pooled
from .processes import agree, dealt, interleaved, mine, nothing, rank, together


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ConfigError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    if a.numel() == 0:
        raise ConfigError(f"nothing to compare: the shape is {tuple(a.shape)}")


def _energies(reference: Tensor, estimate: Tensor) -> Tensor:
    """Squares summed of the reference and of the error: (2, 1), the difference in float64 too."""
    return energies(reference.detach().double(), estimate.detach().double(), 1)


def sqnr(reference: Tensor, estimate: Tensor) -> float:
    """Signal to quantization noise in dB: 10 log10(sum f^2 / sum (f - fhat)^2) over all elements.

    reference, estimate: one shape, any real dtype, summed in float64. inf where they are equal,
    -inf where only the reference is zero, nan where either has a nan. Raises ConfigError for
    unequal or empty shapes.
    """
    _same_shape(reference, estimate)
    return pooled(_energies(reference, estimate))


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSqnr:
    """Signal to quantization noise of a denoiser's outputs along a trajectory, in dB.

    per_step: one ratio for each denoising step, over all images.
    mean: their arithmetic mean; inf as soon as one step is exact.
    pooled: one ratio of the energies summed over all steps.
    """

    per_step: list[float]
    mean: float
    pooled: float


def output_sqnr(reference_outputs: Tensor, outputs: Tensor) -> OutputSqnr:
    """Noise ratios in dB of outputs (steps, n, ...) against the full-precision ones.

    Each step: 10 log10(sum f^2 / sum (f - fhat)^2) over the n images and their elements, as in
    `sqnr`. Raises ConfigError for unequal, empty or one-dimensional shapes.
    """
    _same_shape(reference_outputs, outputs)
    if outputs.dim() < 2:
        raise ConfigError(f"outputs must be (steps, n, ...), got {tuple(outputs.shape)}")
    pairs = zip(reference_outputs, outputs, strict=True)
    energy = torch.cat([_energies(f, fhat) for f, fhat in pairs], 1)
    per_step = decibels(energy).tolist()
    return OutputSqnr(per_step=per_step, mean=sum(per_step) / len(per_step), pooled=pooled(energy))


def psnr(reference: Tensor, images: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal to noise of each image in dB, float64 (n,); inf where an image is exact.

    reference, images: (n, ...) of one shape, in units in which `data_range` is the span from
    lowest to highest: 2 for [-1, 1]. 10 log10(data_range^2 / mean square error). Raises
    ConfigError for unequal or empty shapes and for data_range <= 0.
    """
    _same_shape(reference, images)
    if reference.dim() < 2:
        raise ConfigError(f"images must be (n, ...), got {tuple(images.shape)}")
    if not data_range > 0:
        raise ConfigError(f"data_range must be > 0, got {data_range}")
    error = (reference.detach().double() - images.detach()).square().flatten(1).mean(1)
    return 20 * math.log10(data_range) - 10 * error.log10()


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    if features.dim() != 2 or features.shape[0] < 2 or features.shape[1] < 1:
        raise ConfigError(f"features must be (n >= 2, d >= 1), got {tuple(features.shape)}")
    values = features.detach().double()
    return values.mean(0), torch.cov(values.T).reshape(values.shape[1], values.shape[1])


def _square_root(symmetric: Tensor) -> Tensor:
    """Square root of a positive semidefinite (d, d) matrix; rounding below zero counts as zero."""
    values, vectors = torch.linalg.eigh(symmetric)
    return cast(Tensor, (vectors * values.clamp_min(0).sqrt()) @ vectors.T)


def gaussian_distance(
    mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor
) -> float:
    """Frechet distance of two Gaussians: |ma - mb|^2 + tr(Ca + Cb - 2 (Ca^1/2 Cb Ca^1/2)^1/2).

    means: (d,). covariances: (d, d), symmetric, positive semidefinite. Computed in float64. The
    trace of the last root is the sum of the singular values of Ca^1/2 Cb^1/2, which is exact where
    a general matrix root loses half its digits near singular covariances. (Heusel et al. 2017,
    the squared form known as FID.)
    """
    root_a, root_b = _square_root(covariance_a.double()), _square_root(covariance_b.double())
    overlap = torch.linalg.svdvals(root_a @ root_b).sum()
    between = (mean_a.double() - mean_b.double()).square().sum()
    return float(between + covariance_a.double().trace() + covariance_b.double().trace()) - 2 * (
        float(overlap)
    )


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance of Gaussians fitted to two sets of features; 0 is best.

    features_a: (n, d) and features_b: (m, d), n and m at least 2, any real dtype, in the same
    units; the distance is in those units squared. Covariances are unbiased and everything is in
    float64, so equal sets give 0 up to rounding, of either sign. Raises ConfigError for other
    shapes.
    """
    if features_a.shape[-1] != features_b.shape[-1]:
        raise ConfigError(
            f"feature dimensions differ: {features_a.shape[-1]} and {features_b.shape[-1]}"
        )
    return gaussian_distance(*_moments(features_a), *_moments(features_b))


def bootstrap_interval(
    features_a: Tensor,
    features_b: Tensor,
    *,
    samples: int = 200,
    level: float = 0.95,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Bootstrap interval (low, high) of the Frechet distance over the choice of generated images.

    features_a: (n, d) generated features, resampled with replacement `samples` times.
    features_b: (m, d) reference features, kept.
    Percentiles of the resampled distances, moved so that their mean is the distance of
    features_a itself: fewer distinct rows make every resampled distance larger, often by more than
    the interval is wide. Not below 0. The bias of a finite set against an infinite one stays in:
    compare sets of one size only. Raises ConfigError for samples < 1 or level outside (0, 1), and
    for shapes as `frechet_distance`.
    """
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, got {samples}")
    if not 0 < level < 1:
        raise ConfigError(f"level must be between 0 and 1, got {level}")
    if features_a.shape[-1] != features_b.shape[-1]:
        raise ConfigError(
            f"feature dimensions differ: {features_a.shape[-1]} and {features_b.shape[-1]}"
        )
    fixed = _moments(features_b)
    n = features_a.shape[0]
    distances = torch.empty(samples, dtype=torch.float64)
    for i in range(samples):
        rows = torch.randint(n, (n,), generator=generator, device=generator.device)
        resampled = features_a[rows.to(features_a.device)]
        distances[i] = gaussian_distance(*_moments(resampled), *fixed)
    distances += gaussian_distance(*_moments(features_a), *fixed) - distances.mean()
    tail = (1 - level) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.quantile(distances, ends).clamp_min(0).tolist()
    return low, high


def confident_share(logits: Tensor, threshold: float = 0.9) -> float:
    """Share in [0, 1] of rows whose most probable class has a probability above `threshold`.

    logits: (n, classes), n >= 1. Raises ConfigError for other shapes.
    """
    if logits.dim() != 2 or logits.numel() == 0:
        raise ConfigError(f"logits must be (n >= 1, classes), got {tuple(logits.shape)}")
    largest = logits.detach().double().softmax(1).amax(1)
    return float((largest > threshold).double().mean())


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
    parallel: whether processes share the batches (see `processes`), all of which call this; each
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
    steps = (len(mine(len(batches))) if parallel else len(batches)) * len(scheduler.timesteps)
    bar = _progress_bar(steps) if progress and not rank() else None

    def draw(start: int, batch: Tensor) -> list[Tensor]:
        own = {name: v[start : start + batch_size].to(device) for name, v in given.items()}
        return _draw(denoiser, scheduler, batch.to(device), own, record, bar)

    if parallel:
        facts = {"shape": tuple(shape), "steps": num_inference_steps, "seed": seed}
        with together("sample()"):
            agree("sample()", facts | {"batch_size": batch_size, "record": record})
            found = [draw(*batch) for batch in dealt(batches, done)]
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
