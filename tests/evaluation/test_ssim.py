"""Structural similarity against two other ways to compute it, closed forms, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import gaussian_filter

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.evaluation.image_metrics import ssim

C1, C2 = 0.01**2, 0.03**2
# Values are at most 1 and each is a sum of up to 121 products: rounding leaves some 1e-15 in a
# variance, which the quotient divides by C2 = 9e-4 at least, and the mean over windows averages.
ROUNDING = 2e-12


def images(*shape: int, seed: int) -> torch.Tensor:
    """Smooth images in [-1, 1] with some noise."""
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.normal(size=shape), (0, 0, 2, 2)) * 4
    return torch.from_numpy(np.clip(smooth + 0.1 * rng.normal(size=shape), -1, 1))


def by_windows(x: np.ndarray, y: np.ndarray, size: int) -> float:
    """One channel in [0, 1], window by window, moments about the means."""
    near = np.arange(size) - size // 2
    weights = np.exp(-(near[:, None] ** 2 + near[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    found = []
    windows = (sliding_window_view(v, (size, size)).reshape(-1, size, size) for v in (x, y))
    for a, b in zip(*windows, strict=True):
        ma, mb = (weights * a).sum(), (weights * b).sum()
        va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
        both = (weights * (a - ma) * (b - mb)).sum()
        found.append((2 * ma * mb + C1) * (2 * both + C2) / ((ma**2 + mb**2 + C1) * (va + vb + C2)))
    return float(np.mean(found))


def by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    """One channel in [0, 1], by scipy's filter, of which the windows inside the image are kept."""

    def mean(v: np.ndarray) -> np.ndarray:
        return gaussian_filter(v, 1.5, radius=5)[5:-5, 5:-5]

    a, b = mean(x), mean(y)
    va, vb, both = mean(x * x) - a * a, mean(y * y) - b * b, mean(x * y) - a * b
    top = (2 * a * b + C1) * (2 * both + C2)
    return float((top / ((a**2 + b**2 + C1) * (va + vb + C2))).mean())


@pytest.mark.parametrize(
    "height, width, window", [(17, 23, 11), (11, 11, 11), (8, 30, 7), (3, 4, 3)]
)
def test_it_is_the_mean_over_windows_and_channels(height: int, width: int, window: int) -> None:
    x = images(3, 2, height, width, seed=0)
    y = (0.9 * x + 0.2 * images(3, 2, height, width, seed=1)).clamp(-1, 1)
    found = ssim(x, y)
    assert found.shape == (3,) and found.dtype == torch.float64
    for i in range(3):
        a, b = (((v[i] + 1) / 2).numpy() for v in (x, y))
        expected = np.mean([by_windows(a[c], b[c], window) for c in range(2)])
        assert float(found[i]) == pytest.approx(expected, abs=ROUNDING)
        assert 0.1 < expected < 0.999  # neither nothing nor everything in common


def test_scipys_filter_agrees() -> None:
    x, y = images(2, 1, 40, 29, seed=2), images(2, 1, 40, 29, seed=3)
    expected = [by_scipy(*(((v[i, 0] + 1) / 2).numpy() for v in (x, y))) for i in range(2)]
    assert ssim(x, y).tolist() == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (2, 1, 1, 1), (1, 4, 10, 200)])
def test_equal_images_have_exactly_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = images(*shape, seed=4).to(dtype)
    assert ssim(x, x.clone()).tolist() == [1.0] * shape[0]


def test_flat_images_differ_by_their_means_alone() -> None:
    x, y = torch.full((1, 1, 12, 12), -0.4), torch.full((1, 1, 12, 12), 0.6)
    a, b = 0.3, 0.8  # of 0 to 1
    # -0.4 and 0.6 in float32 are off by 3e-8 relative.
    expected = (2 * a * b + C1) / (a * a + b * b + C1)
    assert float(ssim(x, y)) == pytest.approx(expected, abs=1e-7)


def test_a_negative_has_its_structure_reversed() -> None:
    x = images(1, 1, 32, 32, seed=5)
    assert float(ssim(x, -x)) < -0.5


def test_symmetric_and_each_image_on_its_own() -> None:
    x, y = images(4, 1, 16, 16, seed=8), images(4, 1, 16, 16, seed=9)
    y[2, 0, 3, 3] = torch.nan
    found = ssim(x, y)
    assert found.isnan().tolist() == [False, False, True, False]
    assert torch.equal(found[[0, 1, 3]], ssim(y, x)[[0, 1, 3]])
    assert float(ssim(x[3:], y[3:])) == pytest.approx(float(found[3]), abs=ROUNDING)


@pytest.mark.parametrize(
    "shapes, message",
    [
        (((1, 1, 4, 4), (1, 1, 4, 5)), r"shapes differ: \(1, 1, 4, 4\) and \(1, 1, 4, 5\)"),
        (((4, 4), (4, 4)), r"must be \(n, channels, height, width\).*got \(4, 4\)"),
        (((0, 1, 4, 4), (0, 1, 4, 4)), r"none of them 0, got \(0, 1, 4, 4\)"),
    ],
)
def test_what_is_no_pair_of_images_is_refused(shapes, message) -> None:
    x, y = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ConfigError, match=message):
        ssim(x, y)
