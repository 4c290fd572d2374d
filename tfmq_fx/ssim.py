"""Structural similarity of images: how much of the local contrast and structure two share."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import ConfigError

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def ssim(reference: Tensor, images: Tensor, *, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Mean structural similarity of each pair of images, float64 (n,); exactly 1 where equal.

    reference, images: (n, channels, height, width) of one shape and any real dtype, in units in
    which `low` is the darkest and `high` the brightest value; both are moved to [0, 1] first, for
    the luminance term compares ratios of means. Wang et al. 2004 with their constants: Gaussian
    windows of 11x11 pixels and deviation 1.5, weights that sum to 1, K1 = 0.01, K2 = 0.03; all
    windows that lie inside the image, all channels alike (theirs had one). Images under 11 pixels
    take the largest odd window that fits. Everything is in float64; nan where an image has a nan.
    Raises ConfigError for unequal, empty or other shapes and for high <= low.
    """
    if reference.shape != images.shape:
        raise ConfigError(f"shapes differ: {tuple(reference.shape)} and {tuple(images.shape)}")
    if images.dim() != 4 or images.numel() == 0:
        raise ConfigError(
            f"images must be (n, channels, height, width), none of them 0, got "
            f"{tuple(images.shape)}"
        )
    if not high > low:
        raise ConfigError(f"high must be above low, got {high} and {low}")
    x, y = ((each.detach().double() - low) / (high - low) for each in (reference, images))
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
