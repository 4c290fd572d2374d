"""Load the denoisers of glyphs and their classifier, and generate the images of their training.

32x32 colour images of ten glyphs in ten fonts, turned, shaded, and set on a darker, cluttered
background, made by code from a seed; a `diffusers.DiTTransformer2DModel` (adaLN-Zero) and a
`diffusers.UNet2DModel` that draw more of them, by class; and a classifier whose features serve the
Frechet distance. The weights ship with the package and the fonts with matplotlib, so everything
here works offline.

Pillow, matplotlib, diffusers and safetensors are imported when first needed; they come with
`pip install "tfmq_fx[demo]"`.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from tfmq_fx.core.errors import ConfigError

from . import digits
from .digits import ASSETS, ImageClassifier, demo_module, load_model, load_weights
from .digits import CLASSES as CLASSES

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

DIT_FOLDER = ASSETS / "glyphs-dit"
UNET_FOLDER = ASSETS / "glyphs-unet"
CLASSIFIER_FILE = ASSETS / "glyphs-classifier.safetensors"

IMAGE_SIZE = 32
GLYPHS = "AHOSTX24?&"
NO_CLASS = CLASSES
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "STIXGeneralBol",
    "cmb10",
    "cmss10",
    "cmtt10",
)
_CANVAS = 2 * IMAGE_SIZE  # glyphs are drawn at twice the size, then averaged
_LARGEST = 44  # pixels of the canvas, the longer side of an unscaled glyph
_BLOBS, _STROKES = 3, 1
# Uniform numbers an image is made of: font, placement, two gradients, blobs, strokes.
_NUMBERS = 1 + 4 + 2 * 7 + _BLOBS * 7 + _STROKES * 6


@functools.cache
def _template(glyph: str, font: str) -> Any:
    """The glyph in white on black, a grey PIL image of 64x64, near its centre."""
    folder = Path(demo_module("matplotlib").get_data_path()) / "fonts" / "ttf"
    image_font = demo_module("PIL.ImageFont")
    file = str(folder / f"{font}.ttf")
    left, top, right, bottom = image_font.truetype(file, 100).getbbox(glyph)
    fitted = image_font.truetype(file, round(100 * _LARGEST / max(right - left, bottom - top)))
    left, top, right, bottom = fitted.getbbox(glyph)
    image = demo_module("PIL.Image").new("L", (_CANVAS, _CANVAS))
    corner = ((_CANVAS - left - right) / 2, (_CANVAS - top - bottom) / 2)
    demo_module("PIL.ImageDraw").Draw(image).text(corner, glyph, fill=255, font=fitted)
    return image


def _mask(glyph: str, font: str, turn: float, size: float, right: float, down: float) -> Array:
    """Ink coverage in [0, 1], (32, 32): turned by radians, scaled, and moved by pixels."""
    image = demo_module("PIL.Image")
    centre = _CANVAS / 2
    cos, sin = math.cos(turn) / size, math.sin(turn) / size
    x, y = centre + 2 * right, centre + 2 * down  # where the centre of the glyph goes
    back = (cos, sin, centre - cos * x - sin * y, -sin, cos, centre + sin * x - cos * y)
    placed = _template(glyph, font).transform(
        (_CANVAS, _CANVAS), image.Transform.AFFINE, back, image.Resampling.BILINEAR
    )
    return np.asarray(placed.reduce(2), dtype=np.float32) / np.float32(255)


def _ramp(angle: Array) -> Array:
    """Gradients from 0 to 1, (n, 32, 32, 1), in the directions `angle` (n,), in turns."""
    axis = np.linspace(-0.5, 0.5, IMAGE_SIZE, dtype=np.float32)
    radians = (2 * np.pi * angle)[:, None, None]
    across = np.cos(radians) * axis[None, None, :] + np.sin(radians) * axis[None, :, None]
    return cast("Array", np.clip(0.5 + across, 0, 1)[..., None])


def _draw(numbers: Array, masks: Array) -> Array:
    """Images (n, 32, 32, 3) in [-1, 1] from uniform numbers (n, _) and coverage (n, 32, 32)."""
    n = len(numbers)
    columns = iter(np.moveaxis(numbers, 1, 0))

    def take(count: int) -> Array:
        return np.stack([next(columns) for _ in range(count)], 1)

    def colour(low: float, high: float) -> Array:
        return (low + (high - low) * take(3))[:, None, None, :]

    ramp = _ramp(take(1)[:, 0])
    image = colour(-1, 0) * (1 - ramp) + colour(-1, 0) * ramp

    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE].astype(np.float32)[:, None]
    for _ in range(_BLOBS):
        cx, cy, width, strength = (v[:, None, None] for v in take(4).T)
        spread = 2 + 5 * width
        apart = (x - IMAGE_SIZE * cx) ** 2 + (y - IMAGE_SIZE * cy) ** 2
        alpha = (0.3 + 0.6 * strength) * np.exp(-apart / (2 * spread**2))
        image += alpha[..., None] * (colour(-1, 0.2) - image)
    for _ in range(_STROKES):
        cx, cy, angle = (v[:, None, None] for v in take(3).T)
        radians = np.pi * angle
        apart = (x - IMAGE_SIZE * cx) * np.sin(radians) - (y - IMAGE_SIZE * cy) * np.cos(radians)
        image += 0.5 * np.exp(-(apart**2) / 2)[..., None] * (colour(-1, 0.2) - image)

    ramp = _ramp(take(1)[:, 0])
    ink = colour(0.2, 1) * (1 - ramp) + colour(0.2, 1) * ramp
    image += masks[..., None] * (ink - image)
    assert image.shape == (n, IMAGE_SIZE, IMAGE_SIZE, 3)
    return cast("Array", np.clip(image, -1, 1))


def make_images(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 32, 32), float32 in [-1, 1], and labels (count,), int64 in [0, 9].

    Image i shows GLYPHS[i % 10]. The same seed always gives the same images, and the first images
    of a larger count are those of a smaller one; another version of Pillow, matplotlib or numpy
    may draw some pixels differently. About 0.3 ms each. Raises ConfigError for count < 1 or
    seed < 0, and ImportError without Pillow or matplotlib.
    """
    if count < 1 or seed < 0:
        raise ConfigError(f"count must be at least 1 and seed at least 0, got {count} and {seed}")
    numbers = np.random.default_rng(seed).random((count, _NUMBERS), dtype=np.float32)
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    for first in range(0, count, 256):
        rows = slice(first, first + 256)
        masks = [
            _mask(
                GLYPHS[(first + i) % CLASSES],
                FONTS[int(font * len(FONTS))],
                turn=math.radians(24 * turn - 12),
                size=0.9 + 0.2 * size,
                right=3 * right - 1.5,
                down=3 * down - 1.5,
            )
            for i, (font, turn, size, right, down) in enumerate(numbers[rows, :5].tolist())
        ]
        images[rows] = _draw(numbers[rows, 5:], np.stack(masks))
    labels = torch.arange(count) % CLASSES
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


class GlyphClassifier(ImageClassifier):
    """A classifier of glyphs (n, 3, 32, 32)."""

    def __init__(self) -> None:
        super().__init__(channels=3, size=IMAGE_SIZE, widths=(32, 64, 64))


def load_dit() -> DiTTransformer2DModel:
    """The shipped transformer, float32 and in eval mode, a `DiTTransformer2DModel`.

    model(x, timestep=t, class_labels=labels): x (n, 3, 32, 32); t (n,); labels (n,), int64 in
    [0, 9], or NO_CLASS (10) for any class, as classifier-free guidance needs. It predicts the
    velocity of the schedule in `make_scheduler`. The weights were rounded to fp16 once, on disk.
    Raises ImportError without diffusers.
    """
    return cast("DiTTransformer2DModel", load_model("DiTTransformer2DModel", DIT_FOLDER))


def load_unet() -> UNet2DModel:
    """The shipped UNet, with the inputs, output, weights and errors of `load_dit`."""
    return cast("UNet2DModel", load_model("UNet2DModel", UNET_FOLDER))


def load_classifier() -> GlyphClassifier:
    """The shipped classifier, float32 and in eval mode. Raises ImportError without safetensors."""
    return load_weights(GlyphClassifier(), CLASSIFIER_FILE)


def make_scheduler(num_inference_steps: int | None = None) -> DDIMScheduler:
    """A DDIM scheduler with the noise schedule of the digits, for a denoiser of velocities.

    The velocity is sqrt(abar) noise - sqrt(1 - abar) image: the image where there is almost only
    noise, so an error there stays small in the estimated image. num_inference_steps and errors
    as in `digits.make_scheduler`.
    """
    return digits.make_scheduler(num_inference_steps, prediction_type="v_prediction")
