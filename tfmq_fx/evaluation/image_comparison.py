"""Measure images pair by pair, and report the figures as text, JSON and a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.files import write_whole
from tfmq_fx.serialization.json_values import without_infinities

from .difference_image import amplification, draw_pair
from .image_metrics import psnr, ssim

_SHOWN = 5  # worst images that the text lists


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageComparison:
    """The figures of one candidate image against the reference's image of the same seed.

    psnr: dB, inf where they are equal.  ssim: at most 1.  feature_distance: of their features, the
    norm of the difference over the norm of the reference's; None where there are no features.
    All are nan where the candidate's image has a nan.
    """

    seed: int
    psnr: float
    ssim: float
    feature_distance: float | None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Comparison:
    """The result of `compare`. `str()` is for reading, `to_dict()` for programs.

    per_image: in the order of the seeds.
    floor: PSNR in dB of the reference against itself on the same seeds, over the first batch, the
    worst image; inf where it repeats itself bit for bit. Differences near it are not the
    candidate's.
    worst: index of the first image with a nan, else of the lowest SSIM; the lower PSNR breaks ties.
    pair: the reference's and the candidate's image of it, (channels, height, width) in [-1, 1].
    """

    per_image: list[ImageComparison]
    floor: float
    worst: int
    pair: tuple[Tensor, Tensor]

    @property
    def deterministic(self) -> bool:
        """Whether the reference repeated itself bit for bit."""
        return self.floor == math.inf

    @property
    def summary(self) -> dict[str, dict[str, float] | None]:
        """The mean, median and worst of psnr (its mean is inf if any image is equal), ssim and
        feature_distance (None without features); nan if any image has a nan."""
        distances = [d for each in self.per_image if (d := each.feature_distance) is not None]
        return {
            "psnr": _summary([each.psnr for each in self.per_image], min),
            "ssim": _summary([each.ssim for each in self.per_image], min),
            "feature_distance": _summary(distances, max) if distances else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """The figures, JSON-ready; inf and nan are strings, which float() reads."""
        data: dict[str, Any] = without_infinities(
            {
                "samples": len(self.per_image),
                "floor": self.floor,
                "deterministic": self.deterministic,
                "summary": self.summary,
                "worst": self.worst,
                "amplification": amplification(*self.pair),
                "per_image": [asdict(each) for each in self.per_image],
            }
        )
        return data

    def save(self, directory: str | Path) -> None:
        """Write comparison.json and worst.png: reference, candidate and their absolute difference,
        amplified by the power of two that both files state. Each file appears complete.

        Raises ConfigError where `directory` cannot be written, and ImportError without Pillow.
        """
        folder = Path(directory)
        worst = self.per_image[self.worst]
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        title = f"seed {worst.seed}: PSNR {worst.psnr:.1f} dB, SSIM {worst.ssim:.4f}"
        picture = draw_pair(*self.pair, title)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "worst.png", picture)
            write_whole(folder / "comparison.json", text)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written: {error}") from error

    def __str__(self) -> str:
        images, last = self.per_image, self.per_image[-1].seed
        equal = sum(each.psnr == math.inf for each in images)
        lines = [
            f"{len(images)} images, seeds {images[0].seed} to {last}, {equal} equal bit for bit",
            "the reference repeats itself bit for bit"
            if self.deterministic
            else f"the reference does NOT repeat itself: {self.floor:.1f} dB apart on the same "
            "seeds; differences near that are its own",
            f"{'':<9}{'PSNR dB':>10}{'SSIM':>10}{'features':>10}",
        ]
        columns = self.summary.values()
        for name in ("mean", "median", "worst"):
            lines.append(_line(name, *(column[name] if column else None for column in columns)))
        lines.append("worst images, lowest SSIM first:")
        for each in sorted(images, key=quality)[:_SHOWN]:
            lines.append(_line(f"seed {each.seed}", each.psnr, each.ssim, each.feature_distance))
        if images[0].feature_distance is None:
            lines.append("no feature distance: compare() was given no features")
        return "\n".join(lines)


def _summary(
    values: Sequence[float], worst: Callable[[Sequence[float]], float]
) -> dict[str, float]:
    if any(math.isnan(value) for value in values):
        return dict.fromkeys(("mean", "median", "worst"), math.nan)
    median = statistics.median(values)
    return {"mean": sum(values) / len(values), "median": median, "worst": worst(values)}


def _line(name: str, decibels: float | None, similar: float | None, distance: float | None) -> str:
    texts = [
        "equal" if decibels == math.inf else f"{decibels:.1f}",
        f"{similar:.4f}",
        "-" if distance is None else f"{distance:.4f}",
    ]
    return f"{name:<9}" + "".join(f"{text:>10}" for text in texts)


def quality(image: ImageComparison) -> tuple[float, float]:
    """The key by which `Comparison.worst` is chosen: lowest for the worst image."""
    if math.isnan(image.ssim) or math.isnan(image.psnr):
        return -math.inf, -math.inf
    return image.ssim, image.psnr


def measure(
    expected: Tensor,
    drawn: Tensor,
    seeds: Sequence[int],
    features: Callable[[Tensor], Tensor] | None,
) -> list[ImageComparison]:
    """The figures of each image of `drawn` against that of `expected`, both (n, channels, height,
    width) in [-1, 1], with the seeds (n,).

    features: images to features (n, d), which are compared too. Raises ConfigError where it answers
    with anything else.
    """
    distances = _distances(features, expected, drawn) if features else [None] * len(seeds)
    decibels, similar = psnr(expected, drawn).tolist(), ssim(expected, drawn).tolist()
    return [
        ImageComparison(seed=seed, psnr=a, ssim=b, feature_distance=c)
        for seed, a, b, c in zip(seeds, decibels, similar, distances, strict=True)
    ]


@torch.no_grad()
def _distances(
    features: Callable[[Tensor], Tensor], expected: Tensor, drawn: Tensor
) -> Sequence[float]:
    """The relative distance of the features of each image, 0 where they are equal."""
    both = []
    for images in (expected, drawn):
        values = features(images)
        if not isinstance(values, Tensor) or values.dim() != 2 or len(values) != len(images):
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ConfigError(f"features must answer (n, d) for {len(images)} images, got {shape}")
        both.append(values.double().cpu())
    apart = (both[0] - both[1]).norm(dim=1)
    distances: list[float] = torch.where(apart == 0, 0, apart / both[0].norm(dim=1)).tolist()
    return distances
