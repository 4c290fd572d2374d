"""Draw two images and their difference as PNG.

Pillow is imported when first needed; diffusers brings it, and so does `pip install
"tfmq_fx[demo]"`.
"""

from __future__ import annotations

import importlib
import io
import math
from typing import Any

import torch
from torch import Tensor

_GAP, _HEAD = 8, 20  # pixels between panels, and above them for text
_PANEL = 160  # pixels; smaller images are enlarged by whole numbers to at least this width


def pillow(name: str) -> Any:
    """The module `name` of Pillow; the ImportError without it says how to install it."""
    try:
        return importlib.import_module(f"PIL.{name}")
    except ImportError as error:
        error.add_note('pictures need Pillow: pip install "tfmq_fx[demo]"')
        raise


def amplification(reference: Tensor, image: Tensor) -> int:
    """The largest power of two that keeps the absolute difference of two images in [-1, 1], halved
    and multiplied by it, within [0, 1]; 1 where they are equal or not finite."""
    most = float((reference - image).abs().max()) / 2
    return 2 ** math.floor(-math.log2(most)) if 0 < most <= 1 else 1


def draw_pair(reference: Tensor, image: Tensor, title: str) -> bytes:
    """A PNG file: reference, image, absolute difference times `amplification`, and the title.

    reference, image: (channels, height, width) in [-1, 1]; one channel is grey, three are colours,
    and of other numbers their mean is shown. A nan in the image is black there and white in the
    difference. The factor is written above the difference and in the PNG's text as
    "amplification". Raises ImportError without Pillow.
    """
    factor = amplification(reference, image)
    difference = ((reference - image).abs() / 2 * factor).nan_to_num(1.0)
    panels = {
        "reference": (reference + 1) / 2,
        "candidate": ((image + 1) / 2).nan_to_num(0.0),
        f"difference x{factor}": difference,
    }
    height, width = reference.shape[1:]
    scale = max(1, math.ceil(_PANEL / width))
    across = scale * width + _GAP
    size = (3 * across + _GAP, scale * height + 2 * _HEAD + _GAP)
    canvas = pillow("Image").new("RGB", size, "white")
    pen = pillow("ImageDraw").Draw(canvas)
    pen.text((_GAP, 4), title, fill="black")
    for i, (name, values) in enumerate(panels.items()):
        left = _GAP + i * across
        pen.text((left, _HEAD + 2), name, fill="black")
        canvas.paste(_panel(values, scale), (left, 2 * _HEAD))
    facts = pillow("PngImagePlugin").PngInfo()
    facts.add_text("amplification", str(factor))
    facts.add_text("title", title)
    file = io.BytesIO()
    canvas.save(file, "png", pnginfo=facts)
    return file.getvalue()


def _panel(values: Tensor, scale: int) -> Any:
    """A picture of values (channels, height, width) in [0, 1], each pixel `scale` wide and high."""
    colours = values if len(values) in (1, 3) else values.mean(0, keepdim=True)
    levels = (colours.clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1)
    pixels = levels.expand(-1, -1, 3).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return pillow("Image").fromarray(pixels.numpy())
