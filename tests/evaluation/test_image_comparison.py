"""The figures of pairs of images, as numbers, text, JSON and files."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.evaluation.image_comparison import Comparison, ImageComparison, measure, quality
from tfmq_fx.evaluation.image_metrics import psnr, ssim


def images(n: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def comparison(*figures: tuple[float, float, float | None], floor: float = math.inf) -> Comparison:
    each = [
        ImageComparison(seed=7 + i, psnr=a, ssim=b, feature_distance=c)
        for i, (a, b, c) in enumerate(figures)
    ]
    worst = min(range(len(each)), key=lambda i: quality(each[i]))
    x = images(2)
    return Comparison(per_image=each, floor=floor, worst=worst, pair=(x[0], x[1]))


def test_each_image_is_measured_on_its_own() -> None:
    expected = images()
    found = expected.clone()
    found[1] *= 0.9
    found[2] += 0.01
    rows = measure(expected, found, [3, 4, 5, 6], lambda x: x.flatten(1))
    assert [row.seed for row in rows] == [3, 4, 5, 6]
    assert [row.psnr for row in rows] == psnr(expected, found).tolist()
    assert [row.ssim for row in rows] == ssim(expected, found).tolist()
    assert [row.psnr for row in (rows[0], rows[3])] == [math.inf] * 2
    # A tenth of every value is gone. Values of float32 times 0.9 are off by 6e-8 relative.
    distances = [row.feature_distance for row in rows]
    assert distances[1] == pytest.approx(0.1, abs=1e-6)
    assert distances[0] == distances[3] == 0 and distances[2] not in (0, None)
    assert {row.feature_distance for row in measure(expected, found, range(4), None)} == {None}


def test_features_of_zero_and_nan() -> None:
    rows = torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([[0.0], [2.0], [math.nan]])
    answers = iter(rows)
    found = measure(images(3), images(3, 1), range(3), lambda x: next(answers))
    distances = [each.feature_distance for each in found]
    assert distances[:2] == [0, math.inf] and math.isnan(distances[2])


@pytest.mark.parametrize(
    "answer, message",
    [
        (torch.zeros(4), r"features must answer \(n, d\) for 4 images, got \(4,\)"),
        (torch.zeros(3, 2), r"got \(3, 2\)"),
        ([1, 2, 3, 4], "got list"),
    ],
)
def test_features_of_another_form_are_refused(answer, message) -> None:
    with pytest.raises(ConfigError, match=message):
        measure(images(), images(), range(4), lambda x: answer)


@pytest.mark.parametrize(
    "figures, worst",
    [
        ([(30, 0.9, None), (20, 0.95, None)], 0),  # SSIM first
        ([(30, 0.9, None), (20, 0.9, None)], 1),
        ([(30, 0.9, None), (30, 0.9, None)], 0),
        ([(math.inf, 1.0, None), (50, 1.0, None)], 1),
        ([(5, 0.1, None), (math.nan, math.nan, None), (math.nan, math.nan, None)], 1),
    ],
)
def test_which_image_is_worst(figures, worst) -> None:
    assert comparison(*figures).worst == worst


def test_the_summary() -> None:
    found = comparison((20, 0.5, 0.1), (30, 0.75, 0.2), (46, 1.0, 0.6)).summary
    assert found == {
        "psnr": {"mean": 32, "median": 30, "worst": 20},
        "ssim": {"mean": 0.75, "median": 0.75, "worst": 0.5},
        "feature_distance": {"mean": pytest.approx(0.3), "median": 0.2, "worst": 0.6},
    }
    found = comparison((math.inf, 1.0, None), (30, 0.5, None)).summary
    assert found["psnr"] == {"mean": math.inf, "median": math.inf, "worst": 30}
    assert found["feature_distance"] is None
    found = comparison((math.nan, math.nan, None), (30, 0.5, None)).summary
    assert all(math.isnan(value) for value in [*found["psnr"].values(), *found["ssim"].values()])


def test_the_text() -> None:
    figures = [(20 + i, 0.9 - 0.01 * i, 0.1) for i in range(7)]
    text = str(comparison(*figures))
    assert text.splitlines() == [
        "7 images, seeds 7 to 13, 0 equal bit for bit",
        "the reference repeats itself bit for bit",
        "            PSNR dB      SSIM  features",
        "mean           23.0    0.8700    0.1000",
        "median         23.0    0.8700    0.1000",
        "worst          20.0    0.8400    0.1000",
        "worst images, lowest SSIM first:",
        "seed 13        26.0    0.8400    0.1000",
        "seed 12        25.0    0.8500    0.1000",
        "seed 11        24.0    0.8600    0.1000",
        "seed 10        23.0    0.8700    0.1000",
        "seed 9         22.0    0.8800    0.1000",
    ]
    text = str(comparison((math.inf, 1.0, None), (30, 0.5, None), floor=41.26))
    assert "2 images, seeds 7 to 8, 1 equal bit for bit" in text
    assert "the reference does NOT repeat itself: 41.3 dB apart on the same seeds" in text
    assert "seed 7        equal    1.0000         -" in text
    assert text.endswith("no feature distance: compare() was given no features")


def test_json_holds_every_figure() -> None:
    found = comparison((math.inf, 1.0, 0.0), (30.5, 0.5, 0.25), (math.nan, math.nan, math.nan))
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["samples"] == 3 and data["worst"] == 2 and data["deterministic"] is True
    assert data["floor"] == "inf" and data["amplification"] in (1, 2)
    assert data["per_image"][1] == {
        "seed": 8,
        "psnr": 30.5,
        "ssim": 0.5,
        "feature_distance": 0.25,
    }
    assert data["per_image"][0]["psnr"] == "inf" and data["per_image"][2]["ssim"] == "nan"
    assert math.isnan(float(data["summary"]["psnr"]["mean"]))
    assert comparison((1, 1, None), floor=40.0).to_dict()["deterministic"] is False


def test_the_files(tmp_path: Path) -> None:
    found = comparison((30, 0.5, None), (40, 0.9, None))
    for _ in range(2):  # the second time over the first files
        found.save(tmp_path / "a" / "b")
        assert sorted(os.listdir(tmp_path / "a" / "b")) == ["comparison.json", "worst.png"]
    data = json.loads((tmp_path / "a" / "b" / "comparison.json").read_text())
    assert data == found.to_dict()
    with Image.open(tmp_path / "a" / "b" / "worst.png") as picture:
        assert picture.text["title"] == "seed 7: PSNR 30.0 dB, SSIM 0.5000"
        assert picture.text["amplification"] == str(data["amplification"])


def test_what_cannot_be_written_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = comparison((30, 0.5, None))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file cannot be written"):
        found.save(tmp_path / "file")
    folder = tmp_path / "out"
    comparison((10, 0.1, None)).save(folder)
    old = (folder / "comparison.json").read_text(), (folder / "worst.png").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="out cannot be written: no space left"):
        found.save(folder)
    assert ((folder / "comparison.json").read_text(), (folder / "worst.png").read_bytes()) == old
    assert sorted(os.listdir(folder)) == ["comparison.json", "worst.png"]
