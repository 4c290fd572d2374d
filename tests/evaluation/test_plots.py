"""Pictures of results are drawn and whole."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from tfmq_fx.evaluation.plots import draw_curves, draw_grid


def picture(path):
    image = Image.open(io.BytesIO(path.read_bytes()))
    image.load()
    return image


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_has_a_row_for_each_name_and_may_have_few_images(tmp_path, channels):
    rows = {"one": torch.zeros(4, channels, 8, 8), "two": torch.ones(2, channels, 8, 8) * 2}
    draw_grid(rows, tmp_path / "a.png")
    draw_grid({**rows, "three": rows["one"]}, tmp_path / "b.png")
    two, three = picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    assert two.width == three.width and two.height < three.height


def test_curves_of_exact_variants_are_named_and_not_drawn(tmp_path):
    draw_curves([0, 50], {"exact": [0.0, 0.0], "rough": [0.1, 0.2]}, tmp_path / "curves.png")
    assert picture(tmp_path / "curves.png").width > 500
