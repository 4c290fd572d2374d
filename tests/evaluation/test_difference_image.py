"""The picture of a pair, read back pixel by pixel."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tfmq_fx.evaluation.difference_image import amplification, draw_pair


def panels(png: bytes, height: int, width: int) -> tuple[Image.Image, list[np.ndarray]]:
    """The file, and its three panels, one pixel for each of the images'."""
    picture = Image.open(io.BytesIO(png))
    scale = -(-160 // width)
    assert picture.size == (3 * (scale * width + 8) + 8, scale * height + 48)
    pixels = np.asarray(picture)
    found = []
    for i in range(3):
        left = 8 + i * (scale * width + 8)
        panel = pixels[40 : 40 + scale * height, left : left + scale * width]
        small = panel[::scale, ::scale]
        assert (panel == small.repeat(scale, 0).repeat(scale, 1)).all()
        found.append(small)
    return picture, found


@pytest.mark.parametrize("difference, factor", [(2.0, 1), (1.01, 1), (1.0, 2), (0.1, 16), (0, 1)])
def test_the_factor_is_the_largest_that_fits(difference: float, factor: int) -> None:
    x = torch.full((1, 4, 4), -1.0)
    y = x.clone()
    y[0, 1, 2] += difference
    assert amplification(x, y) == amplification(y, x) == factor


def test_three_panels() -> None:
    reference = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image = reference.clone()
    image[1, 2, 3] = (
        reference[1, 2, 3] - 0.1 if reference[1, 2, 3] > 0 else reference[1, 2, 3] + 0.1
    )
    picture, (left, middle, right) = panels(draw_pair(reference, image, "seed 3"), 6, 5)
    for panel, shown in ((left, reference), (middle, image)):
        expected = ((shown + 1) / 2 * 255).round().movedim(0, -1).numpy()
        assert (panel == expected).all()
    # A twentieth of the range, 16 times: 0.8 of white, in green alone.
    assert right[2, 3].tolist() == [0, 204, 0] and right.sum() == 204
    assert picture.text == {"amplification": "16", "title": "seed 3"}


def test_grey_images_many_channels_and_nan() -> None:
    grey = torch.zeros(1, 4, 200)
    broken = grey.clone()
    broken[0, 1, 2] = torch.nan
    picture, (left, middle, right) = panels(draw_pair(grey, broken, ""), 4, 200)
    assert (left == 128).all() and picture.text["amplification"] == "1"
    assert middle[1, 2].tolist() == [0, 0, 0] and right[1, 2].tolist() == [255, 255, 255]
    assert right.sum() == 3 * 255
    latents = torch.stack([torch.full((4, 4), v) for v in (-1.0, 1.0, 1.0, 1.0)])
    _, (left, _, _) = panels(draw_pair(latents, latents, ""), 4, 4)
    assert (left == 191).all()  # three quarters of white, 191.25


def test_without_pillow_the_error_tells_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError) as caught:
        draw_pair(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), "")
    assert caught.value.__notes__ == ['pictures need Pillow: pip install "tfmq_fx[demo]"']
