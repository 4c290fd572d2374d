"""Pictures of results: images side by side, curves, and quality against what it costs.

matplotlib is imported when first needed; it comes with `pip install "tfmq_fx[demo]"`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tfmq_fx.core.files import write_whole

from .digits import demo_module

_MARKERS = "osD^vP*Xhd<>"
_NAMED = 16  # points that are few enough to be named where they are


def draw_grid(pictures: Mapping[str, Tensor], path: Path, columns: int = 16) -> None:
    """A PNG with one row of images per name, the same seeds in the same columns.

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
    save_figure(figure, path)
    plt.close(figure)


def draw_curves(steps: Sequence[int], curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """A PNG of temporal-feature error against timestep, one line per variant."""
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
    save_figure(figure, path)
    plt.close(figure)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One recipe at some bits: Frechet distance, output SQNR in dB, KiB, seconds; None where
    unknown. Each is (mean, lowest, highest)."""

    recipe: str
    bits: str
    fid: tuple[float, float, float]
    sqnr: tuple[float, float, float]
    kib: float
    seconds: float


def draw_quality(title: str, points: Sequence[Point], best_fid: float | None, path: Path) -> None:
    """A PNG: FID and output SQNR against bytes and against seconds of quantization.

    best_fid: full precision's, drawn as a line.
    """
    plt = _pyplot()
    recipes = list(dict.fromkeys(p.recipe for p in points))
    widths = list(dict.fromkeys(p.bits for p in points))
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex="col", sharey="row")
    for p in points:
        colour = f"C{recipes.index(p.recipe) % 10}"
        marker = _MARKERS[widths.index(p.bits) % len(_MARKERS)]
        for column, cost in enumerate((p.kib, p.seconds)):
            for row, (mean, low, high) in enumerate((p.fid, p.sqnr)):
                axes[row][column].errorbar(
                    [cost],
                    [mean],
                    yerr=[[max(mean - low, 0)], [max(high - mean, 0)]],
                    color=colour,
                    marker=marker,
                    capsize=2,
                    alpha=0.85,
                )
                if len(points) <= _NAMED:
                    axes[row][column].annotate(
                        f"{p.recipe} {p.bits}",
                        (cost, mean),
                        xytext=(5, _side(p, points, row)),
                        textcoords="offset points",
                        fontsize=7,
                    )
    for column, name in enumerate(("KiB saved", "seconds of quantization")):
        axes[1][column].set_xlabel(name)
        axes[0][column].margins(0.25, 0.16)
        axes[1][column].margins(0.25, 0.16)
        if best_fid is not None:
            axes[0][column].axhline(best_fid, color="gray", linestyle="--", linewidth=1)
    for axis in axes[0]:
        _log_where_wide(axis.yaxis, axis.set_yscale, [p.fid[0] for p in points])
    _log_where_wide(axes[1][1].xaxis, axes[1][1].set_xscale, [p.seconds for p in points])
    axes[0][0].set_ylabel("FID (dashed: full precision), lower is better")
    axes[1][0].set_ylabel("output SQNR in dB, higher is better")
    colours = [
        plt.Line2D([], [], color=f"C{i % 10}", marker="s", linestyle="", label=name)
        for i, name in enumerate(recipes)
    ]
    markers = [
        plt.Line2D([], [], color="gray", marker=_MARKERS[i % len(_MARKERS)], linestyle="", label=b)
        for i, b in enumerate(widths)
    ]
    figure.legend(handles=colours + markers, loc="center right", fontsize=8)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0, 0.87, 1))
    save_figure(figure, path)
    plt.close(figure)


def _side(point: Point, points: Sequence[Point], row: int) -> int:
    """Where a name goes, in points of text: below where the nearest value is above, and so apart
    from that one's name."""

    def value(p: Point) -> float:
        return (p.fid, p.sqnr)[row][0]

    others = [value(p) for p in points if p is not point]
    nearest = min(others, key=lambda v: abs(v - value(point)), default=-1.0)
    return -9 if nearest > value(point) else 3


def _log_where_wide(axis: Any, set_scale: Callable[[str], None], values: Sequence[float]) -> None:
    """A logarithmic scale in plain numbers where values span a factor of more than 8."""
    if min(values) > 0 and max(values) > 8 * min(values):
        ticker = demo_module("matplotlib.ticker")
        set_scale("log")
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(ticker.NullFormatter())


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib as PNG. The file appears complete."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_whole(path, picture.getvalue())


def _pyplot() -> Any:
    return demo_module("matplotlib.pyplot")
