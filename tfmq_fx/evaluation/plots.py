"""Draw pictures of results: images side by side, and error curves.

matplotlib is imported when first needed; it comes with `pip install "tfmq_fx[demo]"`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tfmq_fx.core.files import write_whole

from .digits import demo_module


def draw_grid(pictures: Mapping[str, Tensor], path: Path, columns: int = 16) -> None:
    """Draw a PNG with one row of images per name, the same seeds in the same columns.

    pictures: (n, channels, height, width) each, in [-1, 1]; one channel is grey, three are colours.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(
        len(pictures), columns, figsize=(columns * 0.75, len(pictures) * 0.95), squeeze=False
    )
    for line_of_axes, (name, images) in zip(axes, pictures.items(), strict=True):
        for axis in line_of_axes:
            axis.set_axis_off()
        for axis, image in zip(line_of_axes, images, strict=False):
            shown = (image.clamp(-1, 1).movedim(0, -1) + 1) / 2
            pixels = (shown[..., 0] if len(image) == 1 else shown).numpy()
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=1)
        line_of_axes[0].set_title(name, loc="left", fontsize=9)
    figure.tight_layout(pad=0.3)
    _save(figure, path)


def draw_curves(steps: Sequence[int], curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw a PNG of temporal-feature error against timestep, one line per variant."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, values in curves.items():
        if max(values) > 0:
            axis.semilogy(steps, values, marker=".", label=name)
    exact = [name for name, values in curves.items() if max(values) == 0]
    axis.set_xlabel("timestep")
    axis.set_ylabel("relative error of temporal features (mean)")
    axis.set_title(f"exact: {', '.join(exact)}" if exact else "", fontsize=9)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the curves
    figure.tight_layout()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib as PNG and close it. The file appears complete."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_whole(path, picture.getvalue())
    _pyplot().close(figure)


def _pyplot() -> Any:
    return demo_module("matplotlib.pyplot")
