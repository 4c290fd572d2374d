"""evaluation: cells that go on where they stopped, failures that stay, and what is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests.evaluation.test_benchmark import BATCH, STEPS, quick
from tests.subjects import tiny_subject
from tfmq_fx.core.errors import CalibrationError
from tfmq_fx.evaluation import evaluate as evaluation
from tfmq_fx.evaluation import output_files
from tfmq_fx.evaluation.benchmark import Benchmark
from tfmq_fx.evaluation.cli import main
from tfmq_fx.evaluation.evaluate import evaluate
from tfmq_fx.evaluation.plots import draw_grid
from tfmq_fx.evaluation.recipes import recipe
from tfmq_fx.evaluation.result_store import FULL_PRECISION

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def bench():
    return Benchmark(tiny_subject(), steps=STEPS, batch=BATCH)


@pytest.fixture(scope="module")
def coarse(bench):
    return bench.quantize(quick("w4a8"), 0)[0]


@pytest.fixture
def quick_figures(monkeypatch, bench):
    """Without what takes long and is tested by itself or cannot be seen: intervals, captures,
    pictures, and the collection of garbage."""
    monkeypatch.setattr("tfmq_fx.evaluation.run_cell.free_memory", lambda: None)
    monkeypatch.setattr(
        "tfmq_fx.evaluation.image_quality.bootstrap_interval", lambda *args, **options: (0.5, 1.5)
    )
    monkeypatch.setattr(Benchmark, "graph", bench.graph)
    monkeypatch.setattr(output_files, "draw_grid", lambda *args: None)


class Given(list):
    """Configurations; `budgets` of each."""


@pytest.fixture
def clock(monkeypatch, coarse, quick_figures):
    """Quantization that takes no time. The configurations it was given, in order."""
    given, budgets = Given(), []
    given.budgets = budgets

    def quantize(self, config, seed, *, budget=None):
        given.append(config)
        budgets.append(budget)
        if config.name.startswith("ptq4dm"):
            raise RuntimeError("svd did not converge\nat all")
        return coarse, 30.0

    monkeypatch.setattr(Benchmark, "quantize", quantize)
    return given


def run(out, recipes=("nearest", "best"), bits=("w4a8",), subject=None, **options):
    usual = {"samples": 16, "seeds": [0], "steps": STEPS, "batch": BATCH, "backend": "eager"}
    return evaluate(
        [subject or tiny_subject()],
        list(recipes),
        list(bits),
        out=out,
        progress=False,
        **{"say": lambda text: None, **usual, **options},
    )


def names(given):
    return [config.name for config in given]


def test_mixed_bits_get_the_bytes_of_the_same_recipe_with_uniform_ones(tmp_path, clock, coarse):
    run(tmp_path, ["best", "mixed"])
    assert names(clock) == ["best-w4a8", "mixed-w4a8", "mixed-w4a8"]
    assert clock.budgets == [None, None, coarse.nbytes()]
    assert clock[1].reconstruction.rounding == "nearest" and clock[1].reconstruction.refine == 0
    assert dataclasses.replace(clock[2], name="best-w4a8") == clock[0]


def test_a_second_run_computes_nothing(clock, tmp_path):
    first = run(tmp_path)
    assert names(clock) == ["nearest-w4a8", "best-w4a8"]
    assert [row.recipe for row in first] == [FULL_PRECISION, "nearest", "best"]
    assert [row.status for row in first] == ["done"] * 3
    table = (tmp_path / "table.md").read_text()
    again = run(tmp_path)
    assert len(clock) == 2 and again == first and (tmp_path / "table.md").read_text() == table


def test_cells_that_are_gone_or_damaged_are_computed_again(clock, tmp_path):
    run(tmp_path)
    cells = {
        json.loads(path.read_text())["subject"]["recipe"]: path
        for path in (tmp_path / "cells").glob("*.json")
    }
    cells["best"].unlink()
    cells["nearest"].write_text(cells["nearest"].read_text()[:-20])
    rows = run(tmp_path)
    assert names(clock)[2:] == ["nearest-w4a8", "best-w4a8"]
    assert [row.status for row in rows] == ["done"] * 3


def test_changed_recipes_models_and_protocols_take_no_stale_cell(clock, tmp_path, monkeypatch):
    run(tmp_path, ["nearest"])
    for change in (
        {"subject": tiny_subject(scale=2.0)},
        {"seeds": [1]},
        {"samples": 24},
        {"steps": 3},
    ):
        before = len(clock)
        try:
            run(tmp_path, ["nearest"], **change)
        finally:
            assert len(clock) == before + 1
    own = quick("w4a8")
    run(tmp_path, [own])
    spec = dataclasses.replace(own.reconstruction, samples=24)
    run(tmp_path, [dataclasses.replace(own, reconstruction=spec)])
    assert len(clock) == 7


def test_a_failure_is_a_row_with_its_error_and_is_retried_when_asked(clock, tmp_path):
    rows = run(tmp_path, ["ptq4dm", "nearest"])
    failed = rows[1]
    assert failed.status == "failed" and rows[2].status == "done"
    assert failed.failed == {0: "RuntimeError: svd did not converge"}
    table = (tmp_path / "table.md").read_text()
    assert (
        "| ptq4dm | w4a8 |" in table and "**failed: RuntimeError: svd did not converge**" in table
    )
    run(tmp_path, ["ptq4dm", "nearest"])
    assert len(clock) == 2
    run(tmp_path, ["ptq4dm", "nearest"], retry=True)
    assert names(clock)[2:] == ["ptq4dm-w4a8"]


def test_some_seeds_may_fail(clock, tmp_path, monkeypatch):
    quantize = Benchmark.quantize

    def sometimes(self, config, seed, *, budget=None):
        if seed == 2:
            raise CalibrationError("nan in conv_in")
        return quantize(self, config, seed, budget=budget)

    monkeypatch.setattr(Benchmark, "quantize", sometimes)
    rows = run(tmp_path, ["nearest"], seeds=[0, 1])
    assert rows[0].status == "done" and rows[1].status == "1 done, 1 failed"
    assert rows[1].failed == {1: "CalibrationError: nan in conv_in"}
    assert rows[1].spread("fid") is not None
    assert "**1 done, 1 failed: CalibrationError" in (tmp_path / "table.md").read_text()


def test_a_missing_package_ends_the_run(clock, tmp_path, monkeypatch):
    def missing(*args):
        raise ImportError("no torchmetrics")

    monkeypatch.setattr("tfmq_fx.evaluation.benchmark.image_figures", missing)
    with pytest.raises(ImportError, match="no torchmetrics"):
        run(tmp_path)
    assert list((tmp_path / "cells").glob("*.json")) == []


def test_what_was_not_run_is_marked_and_an_interrupted_run_goes_on(clock, tmp_path, monkeypatch):
    rows = run(tmp_path, compute=False)
    assert [row.status for row in rows] == ["not run"] * 3 and clock == []
    assert (tmp_path / "table.md").read_text().count("**not run**") == 3
    quantize = Benchmark.quantize

    def interrupted(self, config, seed, *, budget=None):
        if clock:
            raise KeyboardInterrupt
        return quantize(self, config, seed, budget=budget)

    monkeypatch.setattr(Benchmark, "quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert (tmp_path / "table.md").read_text().count("**not run**") == 1
    data = json.loads((tmp_path / "table.json").read_text())
    assert [row["status"] for row in data["rows"]] == ["done", "done", "not run"]
    monkeypatch.setattr(Benchmark, "quantize", quantize)
    assert [row.status for row in run(tmp_path)] == ["done"] * 3
    assert names(clock) == ["nearest-w4a8", "best-w4a8"]


def test_learning_steps_are_capped_or_as_published(clock, tmp_path):
    (row,) = run(tmp_path, ["brecq"])[1:]
    assert clock[0].reconstruction.iters == 100 and row.done[0]["steps"] == 100
    run(tmp_path, ["brecq"], learning="published")
    assert clock[1] == recipe("brecq", "w4a8")
    run(tmp_path, ["brecq"], learning=60)
    assert clock[2].reconstruction.iters == 60 and len(clock) == 3
    run(tmp_path, ["nearest"], learning=60)
    run(tmp_path, ["nearest"], learning="published")
    assert len(clock) == 4  # it learns nothing: one cell whatever the rule
    own = dataclasses.replace(recipe("brecq", "w4a8"), name="own")
    (row,) = run(tmp_path, [own], learning=60)[1:]
    assert row.done and clock[-1].reconstruction.iters == 60


def test_everything_is_written(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(output_files, "draw_grid", draw_grid)
    said = []
    run(tmp_path, ["nearest", "best"], ["w4a8", "w8a8"], samples=10, seeds=[0, 1], say=said.append)
    assert said[0] == "10 samples are rounded up to 16, whole batches of 8"
    assert len(said) == 11 and said[1].startswith("tiny full precision seed 0: FID ")
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["cells", "grid-tiny.png", "table.json", "table.md"]
    assert (tmp_path / "grid-tiny.png").read_bytes().startswith(PNG)
    table = (tmp_path / "table.md").read_text()
    for fact in (
        "tfmq_fx.evaluation.evaluate.evaluate",
        torch.__version__,
        "16 images a seed",
        "seeds 0, 1",
    ):
        assert fact in table
    assert table.count("| best | w8a8 |") == 2 and "class asked for" in table
    data = json.loads((tmp_path / "table.json").read_text())
    assert [(r["recipe"], r["bits"]) for r in data["rows"][:2]] == [
        (FULL_PRECISION, ""),
        ("nearest", "w4a8"),
    ]
    fid = data["rows"][1]["figures"]["fid"]
    assert fid["low"] < fid["mean"] < fid["high"]
    assert set(data["rows"][1]["seeds"]) == {"0", "1"}
    assert len(data["rows"][1]["seeds"]["0"]["figures"]["sqnr_by_step"]) == STEPS


def test_a_real_recipe_from_end_to_end(tmp_path):
    own = [quick("w8a8"), quick("w4a8")]
    rows = run(tmp_path, own, subject=tiny_subject(classes=None))
    assert [row.recipe for row in rows] == [FULL_PRECISION, "nearest-w8a8", "nearest-w4a8"]
    fine, rough = (row.spread("sqnr").mean for row in rows[1:])
    assert fine > rough + 10
    assert rows[1].spread("class_agreement") is None and rows[0].spread("psnr") is None
    assert rows[1].spread("bytes").mean > rows[2].spread("bytes").mean
    assert "class asked for" not in (tmp_path / "table.md").read_text()
    eight, four = (row.done[0]["figures"] for row in rows[1:])
    # 4 bits more of the weights are 24 dB less noise of theirs; that of 8-bit inputs stays
    assert eight["pairs"]["psnr"] > four["pairs"]["psnr"] + 6 and four["sqnr"] > 0


def test_a_cell_that_another_run_finished_meanwhile_is_not_computed(clock, tmp_path, monkeypatch):
    quantize, computed = Benchmark.quantize, []

    def other_run_first(self, config, seed, *, budget=None):
        if not computed:
            computed.append(config.name)
            run(tmp_path)
        return quantize(self, config, seed, budget=budget)

    monkeypatch.setattr(Benchmark, "quantize", other_run_first)
    assert [row.status for row in run(tmp_path)] == ["done"] * 3
    assert names(clock) == ["nearest-w4a8", "best-w4a8", "nearest-w4a8"]


@pytest.mark.slow
@pytest.mark.sample
def test_a_recipe_samples_compiled(tmp_path):
    rows = run(tmp_path, [quick("w8a8")], backend="inductor")
    assert [row.status for row in rows] == ["done", "done"]
    for row in rows:
        (result,) = row.done
        figures = result["figures"]
        assert (figures["backend"], figures["backend_note"]) == ("inductor", None)
    assert rows[1].spread("psnr").mean > 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "cats"], "unknown model 'cats'; there are digits, glyphs-dit, glyphs-unet"),
        (["--recipes", "bst"], "unknown recipe 'bst'; there are nearest, brecq"),
        (["--bits", "4-8"], "bits are written as in 'w4a8', got '4-8'; usual: w8a8, w4a8"),
        (["--samples", "1"], "samples must be a whole number, at least 2, got 1"),
        (["--steps", "0"], "steps must be a whole number, at least 1, got 0"),
        (["--seeds", "1", "1"], "seeds must be different numbers of at least 0, got [1, 1]"),
        (["--learning", "fast"], "learning must be 'published' or a whole number of steps"),
        (["--learning", "equal-time"], "learning must be 'published' or a whole number of steps"),
        (["--backend", "openvino"], "backend must be one of inductor, eager, got 'openvino'"),
        (["--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["--small", "--out", __file__], "out must be a directory that can be made"),
    ],
)
def test_bad_arguments_are_told(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"tfmq-fx: {message}")
    assert list(tmp_path.iterdir()) == []


def test_the_command_passes_its_arguments_on_and_prints_the_table(tmp_path, monkeypatch, capsys):
    seen = []

    def instead(*, out, **options):
        seen.append(options)
        Path(out).mkdir(exist_ok=True)
        (Path(out) / "table.md").write_text("the table\n")
        if options["retry"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", instead)
    out = str(tmp_path / "out")
    assert main(["evaluate", "--out", out, "--quiet"]) == 0
    assert seen[0] == {
        "compute": True,
        "retry": False,
        "progress": False,
        "command": f"tfmq-fx evaluate --out {out} --quiet",
    }
    assert "the table" in capsys.readouterr().out
    assert main(["evaluate", "--small", "--samples", "128", "--table", "--out", out]) == 0
    small = {**evaluation.SMALL, "samples": 128}
    assert seen[1] | small == seen[1] and seen[1]["compute"] is False
    assert main(["evaluate", "--models", "digits", "--retry", "--out", out]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert seen[2]["models"] == ["digits"]
