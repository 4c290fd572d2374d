"""Two pipelines on the same seeds, image by image: what a change to the model did to its pictures.

Images of equal noise differ by the models alone, so a few of them tell more than the statistics of
thousands. Whether the reference repeats itself is measured too: differences below that floor are
not the candidate's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.core.distributed import alone, check_same, in_order, rank, together
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.inference import outside_inference_mode
from tfmq_fx.core.progress import progress_bar

from .difference_image import pillow
from .image_comparison import Comparison, ImageComparison, measure, quality
from .image_metrics import psnr
from .seeded_sampling import Draw, Wanted, by_pipeline, by_scheduler, wanted_images


@outside_inference_mode
def compare(
    reference: Any,
    candidate: Any,
    *,
    source: tuple[Any, Sequence[int]] | None = None,
    samples: int | None = None,
    seed: int = 0,
    num_inference_steps: int = 50,
    batch_size: int = 8,
    features: Callable[[Tensor], Tensor] | None = None,
    component: str | None = None,
    shared: Collection[str] = (),
    out: str | Path | None = None,
    parallel: bool = False,
    progress: bool = True,
    **kwargs: Any,
) -> Comparison:
    """Draw the same images with `reference` and `candidate`, and measure how far they are apart.

    reference: a diffusers pipeline.  candidate: another one, or a denoiser that takes the place of
    the reference's own (`component` names it where there are several).
    source: a (scheduler, shape of one image) pair; then both are denoisers, called as
    denoiser(x, t, **kwargs) with a timestep for each row, and images are clamped to [-1, 1].
    **kwargs: further arguments of the pipelines or denoisers. A list, tensor or array has a row for
    each image, all else is the same for all, and so are those that `shared` names; a prompt in one
    string is repeated.
    samples: images to draw; None is one for each row, or 8.  seed: image i draws its initial noise
    and the scheduler's from a generator of its own, on the CPU, seeded seed + i. So an image does
    not depend on batch_size, beyond rounding, nor on the others. (A scheduler whose `step` takes
    no generator draws from torch's global one, which is seeded for each batch and restored: pairs
    have equal noise, other batch sizes have other noise.)
    features: images (n, channels, height, width), float32 in [-1, 1] on the CPU, to features
    (n, d): `digits.load_classifier().features`, say.
    out: a directory that the result is saved in, as by `Comparison.save`.
    parallel: whether processes share the batches (see `distributed`), all of which call this; each
    then has the whole result, and the first one saves it.

    Pipelines are copied: neither they nor their schedulers nor torch's random state change. Images
    are in [-1, 1] throughout, at the precision the pipeline has them in (output_type="pil" compares
    them as bytes). The reference draws its first batch twice, which gives the floor.
    Raises ConfigError for arguments that cannot be used, images of different sizes, and a reference
    that draws nan; ImportError where `out` is given without Pillow.
    """
    _check_numbers(samples=samples, seed=seed, steps=num_inference_steps, batch_size=batch_size)
    if out is not None:  # before the long work
        _make_ready(Path(out))
    wanted = wanted_images(
        kwargs, samples=samples, seed=seed, steps=num_inference_steps, shared=shared
    )
    draws = _draws(reference, candidate, source, component, wanted)
    with together("compare()") if parallel else alone():
        facts = {"samples": wanted.samples, "seed": seed, "num_inference_steps": wanted.steps}
        check_same("compare()", facts | {"batch_size": batch_size})
        found = _compared(*draws, wanted, batch_size, features, progress)
        if out is not None and not rank():
            found.save(out)
    return found


def _check_numbers(*, samples: int | None, seed: int, steps: int, batch_size: int) -> None:
    for name, value, least in (
        ("samples", 1 if samples is None else samples, 1),
        ("seed", seed, 0),
        ("num_inference_steps", steps, 1),
        ("batch_size", batch_size, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be a whole number, at least {least}, got {value!r}")


def _make_ready(out: Path) -> None:
    """Make the directory, and raise ImportError where pictures cannot be drawn."""
    pillow("Image")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out must be a directory that can be made: {error}") from error


def _draws(
    reference: Any, candidate: Any, source: Any, component: str | None, wanted: Wanted
) -> tuple[Draw, Draw]:
    """How each of the two draws images. Raises ConfigError where they are not a pair."""
    replaces = source is None and isinstance(candidate, nn.Module)
    if component is not None and not replaces:
        raise ConfigError(
            "component= names what a candidate denoiser replaces in a pipeline; there is none here"
        )
    pipelines = [hasattr(each, "components") for each in (reference, candidate)]
    if source is not None:
        pair = isinstance(source, tuple) and len(source) == 2 and hasattr(source[0], "step")
        if not pair or len(source[1]) != 3:
            raise ConfigError(
                "source must be a (scheduler, shape) pair, the shape (channels, height, width)"
            )
        for each, is_pipeline in zip((reference, candidate), pipelines, strict=True):
            if is_pipeline or not callable(each):
                raise ConfigError(
                    f"with source= both models are denoisers; got a {type(each).__name__}"
                )
        return by_scheduler(reference, source, wanted), by_scheduler(candidate, source, wanted)
    if not pipelines[0]:
        raise ConfigError(
            f"the reference must be a diffusers pipeline, got a {type(reference).__name__}; to "
            "compare two denoisers, give source=(scheduler, shape of one image)"
        )
    if not (replaces or pipelines[1]):
        raise ConfigError(
            "the candidate must be a diffusers pipeline or a denoiser (an nn.Module), got a "
            f"{type(candidate).__name__}"
        )
    if replaces:
        other = by_pipeline(reference, wanted, denoiser=candidate, component=component)
    else:
        other = by_pipeline(candidate, wanted)
    return by_pipeline(reference, wanted), other


def _compared(
    reference: Draw,
    candidate: Draw,
    wanted: Wanted,
    batch_size: int,
    features: Callable[[Tensor], Tensor] | None,
    progress: bool,
) -> Comparison:
    starts = range(0, wanted.samples, batch_size)
    batches = [range(start, min(start + batch_size, wanted.samples)) for start in starts]

    def drawn(rows: range) -> tuple[Tensor, Tensor, float, list[ImageComparison]]:
        """Both models' images of one batch, the floor (of the first alone), and the figures."""
        expected, lowest = reference(rows), math.inf
        if not bool(torch.isfinite(expected).all()):
            raise ConfigError("the reference draws images with nan: there is nothing to compare to")
        if rows.start == 0:
            lowest = float(psnr(expected, reference(rows)).min())
        found = candidate(rows)
        if expected.shape != found.shape:
            raise ConfigError(
                f"the reference draws images of {tuple(expected.shape[1:])} and the candidate of "
                f"{tuple(found.shape[1:])} (channels, height, width); they must be alike"
            )
        measured = measure(expected, found, [wanted.seed + i for i in rows], features)
        return expected, found, lowest, measured

    images: list[ImageComparison] = []
    floor = math.inf
    turns = in_order(progress_bar(batches, "compare", enabled=progress), drawn, "images to compare")
    for rows, (expected, found, lowest, measured) in zip(batches, turns, strict=True):
        floor = lowest if rows.start == 0 else floor
        images += measured
        worst = min(range(len(images)), key=lambda i: quality(images[i]))
        if worst in rows:
            i = worst - rows.start
            pair = expected[i].clone(), found[i].clone()
    return Comparison(per_image=images, floor=floor, worst=worst, pair=pair)
