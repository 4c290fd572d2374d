"""Measure images: PSNR, structural similarity, Frechet distance.

Pure functions over tensors; sums run in float64.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.quant.sqnr import same_shape


def psnr(reference: Tensor, images: Tensor) -> Tensor:
    """The peak signal to noise ratio of each image in dB, float64 (n,); inf where it is exact.

    reference, images: (n, ...) of one shape, in [-1, 1]. 10 log10(2^2 / mean square error). Raises
    ConfigError for unequal or empty shapes.
    """
    same_shape(reference, images)
    if reference.dim() < 2:
        raise ConfigError(f"images must be (n, ...), got {tuple(images.shape)}")
    error = (reference.detach().double() - images.detach()).square().flatten(1).mean(1)
    return 20 * math.log10(2) - 10 * error.log10()


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    if features.dim() != 2 or features.shape[0] < 2 or features.shape[1] < 1:
        raise ConfigError(f"features must be (n >= 2, d >= 1), got {tuple(features.shape)}")
    values = features.detach().double()
    return values.mean(0), torch.cov(values.T).reshape(values.shape[1], values.shape[1])


def _square_root(symmetric: Tensor) -> Tensor:
    """The square root of a positive semidefinite (d, d) matrix; rounding below 0 counts as 0."""
    values, vectors = torch.linalg.eigh(symmetric)
    return cast(Tensor, (vectors * values.clamp_min(0).sqrt()) @ vectors.T)


def gaussian_distance(
    mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor
) -> float:
    """The Frechet distance of two Gaussians: |ma - mb|^2 + tr(Ca + Cb - 2 (Ca^1/2 Cb Ca^1/2)^1/2).

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
    """The Frechet distance of Gaussians fitted to two sets of features; 0 is best.

    features_a: (n, d) and features_b: (m, d), n and m at least 2, any real dtype, in the same
    units; the distance is in those units squared. Covariances are unbiased and everything is in
    float64, so equal sets give 0 up to rounding, of either sign. Raises ConfigError for other
    shapes.
    """
    _check_dimensions(features_a, features_b)
    return gaussian_distance(*_moments(features_a), *_moments(features_b))


def _check_dimensions(features_a: Tensor, features_b: Tensor) -> None:
    if features_a.shape[-1] != features_b.shape[-1]:
        raise ConfigError(
            f"feature dimensions differ: {features_a.shape[-1]} and {features_b.shape[-1]}"
        )


def bootstrap_interval(
    features_a: Tensor,
    features_b: Tensor,
    *,
    samples: int = 200,
    level: float = 0.95,
    generator: torch.Generator,
) -> tuple[float, float]:
    """A bootstrap interval (low, high) of the Frechet distance over the choice of generated images.

    features_a: (n, d) generated features, resampled with replacement `samples` times.
    features_b: (m, d) reference features, not resampled.
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
    _check_dimensions(features_a, features_b)
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
    """The share in [0, 1] of rows whose most probable class has a probability above `threshold`.

    logits: (n, classes), n >= 1. Raises ConfigError for other shapes.
    """
    if logits.dim() != 2 or logits.numel() == 0:
        raise ConfigError(f"logits must be (n >= 1, classes), got {tuple(logits.shape)}")
    largest = logits.detach().double().softmax(1).amax(1)
    return float((largest > threshold).double().mean())


_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def ssim(reference: Tensor, images: Tensor) -> Tensor:
    """The mean structural similarity of each pair of images, float64 (n,); exactly 1 where equal.

    reference, images: (n, channels, height, width) of one shape and any real dtype, in [-1, 1];
    both are moved to [0, 1] first, for the luminance term compares ratios of means. Wang et al.
    2004 with their constants: Gaussian windows of 11x11 pixels and deviation 1.5, weights that sum
    to 1, K1 = 0.01, K2 = 0.03; all windows that lie inside the image, all channels alike (theirs
    had one). Images under 11 pixels take the largest odd window that fits. Everything is in
    float64; nan where an image has a nan.
    Raises ConfigError for unequal, empty or other shapes.
    """
    if reference.shape != images.shape:
        raise ConfigError(f"shapes differ: {tuple(reference.shape)} and {tuple(images.shape)}")
    if images.dim() != 4 or images.numel() == 0:
        raise ConfigError(
            f"images must be (n, channels, height, width), none of them 0, got "
            f"{tuple(images.shape)}"
        )
    x, y = ((each.detach().double() + 1) / 2 for each in (reference, images))
    weights = _gaussian(min(_WINDOW, *images.shape[2:])).to(x.device)
    mean_x, mean_y = _local_mean(x, weights), _local_mean(y, weights)
    variance_x = _local_mean(x * x, weights) - mean_x * mean_x
    variance_y = _local_mean(y * y, weights) - mean_y * mean_y
    covariance = _local_mean(x * y, weights) - mean_x * mean_y
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def _gaussian(size: int) -> Tensor:
    """Weights (k,) that sum to 1; k is `size`, or one less where that is even."""
    reach = (size - 1) // 2
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    return weights / weights.sum()


def _local_mean(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted means (n, c, h - k + 1, w - k + 1) of x (n, c, h, w) over windows of k by k."""
    rows = x.flatten(0, 1).unsqueeze(1)
    rows = F.conv2d(F.conv2d(rows, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return cast(Tensor, rows.squeeze(1).unflatten(0, x.shape[:2]))
