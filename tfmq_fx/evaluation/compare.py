"""Compare two pipelines on the same seeds, image by image.

Images of equal noise differ by the models alone, so a few of them tell more than the statistics of
thousands. Whether the reference repeats itself is measured too: differences below that floor are
not the candidate's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.core.arguments import check_whole
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.inference import outside_inference_mode
from tfmq_fx.core.progress import progress_bar

from .difference_image import pillow
from .image_comparison import Comparison, ImageComparison, measure, quality
from .image_metrics import psnr
from .output_files import make_folder
from .seeded_sampling import DrawPlan, Sampler, pipeline_sampler, plan_images, scheduler_sampler


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
    not depend on batch_size, beyond rounding, nor on the others. A scheduler whose `step` takes no
    generator must add no noise.
    features: images (n, channels, height, width), float32 in [-1, 1] on the CPU, to features
    (n, d): `digits.load_classifier().features`, say.
    out: a directory that the result is saved in, as by `Comparison.save`.

    Pipelines are copied: neither they nor their schedulers change. Images
    are in [-1, 1] throughout, at the precision the pipeline has them in (output_type="pil" compares
    them as bytes). The reference draws its first batch twice, which gives the floor.
    Raises ConfigError for arguments that cannot be used, images of different sizes, and a reference
    that draws nan; ImportError where `out` is given without Pillow.
    """
    if samples is not None:
        check_whole(samples, "samples", 1)
    check_whole(seed, "seed", 0)
    check_whole(num_inference_steps, "num_inference_steps", 1)
    check_whole(batch_size, "batch_size", 1)
    if out is not None:  # before the long work
        pillow("Image")
        make_folder(out)
    plan = plan_images(kwargs, samples=samples, seed=seed, steps=num_inference_steps, shared=shared)
    samplers = _samplers(reference, candidate, source, component, plan)
    comparison = _compared(*samplers, plan, batch_size, features, progress)
    if out is not None:
        comparison.save(out)
    return comparison


def _samplers(
    reference: Any, candidate: Any, source: Any, component: str | None, plan: DrawPlan
) -> tuple[Sampler, Sampler]:
    """The samplers of the two models. Raises ConfigError where they are not a pair."""
    replaces = source is None and isinstance(candidate, nn.Module)
    if component is not None and not replaces:
        raise ConfigError(
            "component= names what a candidate denoiser replaces in a pipeline; there is none here"
        )
    if source is not None:
        pair = isinstance(source, tuple) and len(source) == 2 and hasattr(source[0], "step")
        if not pair or len(source[1]) != 3:
            raise ConfigError(
                "source must be a (scheduler, shape) pair, the shape (channels, height, width)"
            )
        for each in (reference, candidate):
            if hasattr(each, "components") or not callable(each):
                raise ConfigError(
                    f"with source= both models are denoisers; got a {type(each).__name__}"
                )
        return (
            scheduler_sampler(reference, source, plan),
            scheduler_sampler(candidate, source, plan),
        )
    if not hasattr(reference, "components"):
        raise ConfigError(
            f"the reference must be a diffusers pipeline, got a {type(reference).__name__}; to "
            "compare two denoisers, give source=(scheduler, shape of one image)"
        )
    if replaces:
        other = pipeline_sampler(reference, plan, denoiser=candidate, component=component)
    elif hasattr(candidate, "components"):
        other = pipeline_sampler(candidate, plan)
    else:
        raise ConfigError(
            "the candidate must be a diffusers pipeline or a denoiser (an nn.Module), got a "
            f"{type(candidate).__name__}"
        )
    return pipeline_sampler(reference, plan), other


def _compared(
    reference: Sampler,
    candidate: Sampler,
    plan: DrawPlan,
    batch_size: int,
    features: Callable[[Tensor], Tensor] | None,
    progress: bool,
) -> Comparison:
    images: list[ImageComparison] = []
    starts = range(0, plan.samples, batch_size)
    for start in progress_bar(starts, "compare", enabled=progress):
        rows = range(start, min(start + batch_size, plan.samples))
        expected = reference(rows)
        if not bool(torch.isfinite(expected).all()):
            raise ConfigError("the reference draws images with nan: there is nothing to compare to")
        if start == 0:
            floor = float(psnr(expected, reference(rows)).min())
        drawn = candidate(rows)
        if expected.shape != drawn.shape:
            raise ConfigError(
                f"the reference draws images of {tuple(expected.shape[1:])} and the candidate of "
                f"{tuple(drawn.shape[1:])} (channels, height, width); they must be alike"
            )
        images += measure(expected, drawn, [plan.seed + i for i in rows], features)
        worst = min(range(len(images)), key=lambda i: quality(images[i]))
        if worst in rows:
            pair = expected[worst - start].clone(), drawn[worst - start].clone()
    return Comparison(per_image=images, floor=floor, worst=worst, pair=pair)
