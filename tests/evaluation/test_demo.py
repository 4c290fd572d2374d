"""demo: the whole of it on a tiny model, uncompiled, and what it says, writes and computes."""

import dataclasses
import json
import math
import warnings
from pathlib import Path

import pytest

from tests.toys import tiny_unet2d
from tfmq_fx import BackendError, load
from tfmq_fx.capture.capture import capture
from tfmq_fx.conversion import temporal_forms
from tfmq_fx.evaluation import benchmark, demo
from tfmq_fx.evaluation.table import Row

pytestmark = [pytest.mark.slow, pytest.mark.sample]
NAMES = ["full precision", "tables only", "W8A8", "W4A8 nearest", "W4A8 everything"]


@dataclasses.dataclass
class Ran:
    rows: list[Row]
    said: list[str]
    warned: list[warnings.WarningMessage]
    learnt: list[int]  # steps of each temporal block that was to be learnt
    out: Path


def unet():
    return tiny_unet2d(
        sample_size=demo.SUBJECTS["digits"].shape[-1],
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    def cannot(*args):
        raise BackendError("no compiler here")

    steps = []
    reconstruct = temporal_forms.reconstruct_tib

    def counted(*args, iters, **options):
        steps.append(iters)
        return reconstruct(*args, iters=min(iters, 3), **options)

    captured = []

    def once(*args, **options):
        """Every variant is made from one model, and capturing it takes longest."""
        captured[:] = captured or [capture(*args, **options)]
        return captured[0]

    def few():
        """The recipes, calibrated with two batches; the last learns for two steps."""
        for config in recipes():
            spec = dataclasses.replace(config.reconstruction, samples=32)
            if spec.iters:
                spec = dataclasses.replace(spec, iters=2)
            yield dataclasses.replace(config, reconstruction=spec)

    recipes = demo.recipes
    out, said = tmp_path_factory.mktemp("demo") / "out", []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for name, value in {"STEPS": 2, "BATCH": 8, "recipes": few}.items():
            patch.setattr(demo, name, value)
        subject = dataclasses.replace(demo.SUBJECTS["digits"], load=unet)
        patch.setattr(demo, "SUBJECTS", {"digits": subject})
        patch.setattr(benchmark.backends, "backend", cannot)
        patch.setattr(benchmark.api, "compile", cannot)
        patch.setattr(temporal_forms, "reconstruct_tib", counted)
        patch.setattr(benchmark, "capture", once)
        patch.setattr(benchmark.api, "capture", once)
        rows = demo.run(out, samples=16, progress=False, say=said.append)
    return Ran(rows, said, warned, steps, out)


def test_every_variant_is_a_row_with_its_figures(ran):
    assert [row.recipe for row in ran.rows] == NAMES
    full, tables, eight, nearest, everything = (row.done[0]["figures"] for row in ran.rows)
    assert full["sqnr"] is None and full["pairs"] is None and full["weights"] is None
    # at a batch of many the sums of what became a table run in another order
    assert tables["sqnr"] > 100 and tables["weights"] == 0 and tables["temporal_worst"] < 1e-6
    for row in (eight, nearest, everything):
        assert row["weights"] == row["inputs"] == 1
    assert eight["sqnr"] > everything["sqnr"] > nearest["sqnr"]
    assert eight["sqnr"] > nearest["sqnr"] + 6
    assert eight["temporal_mean"] == everything["temporal_mean"] == 0 < nearest["temporal_mean"]
    for row in (full, tables, eight, nearest, everything):
        assert row["images"]["fid_low"] <= row["images"]["fid"] <= row["images"]["fid_high"]
        assert row["backend"] == "eager"
    notes = [row["backend_note"] for row in (full, tables, eight, nearest, everything)]
    refused = "BackendError: no compiler here"
    assert notes == [refused, None, refused, None, refused]


def test_the_table_the_pictures_and_the_models_are_written(ran):
    data = json.loads((ran.out / "table.json").read_text())
    assert [row["recipe"] for row in data["rows"]] == NAMES
    assert math.isfinite(data["rows"][2]["figures"]["sqnr"]["mean"])
    for name in ("samples.png", "temporal-error.png"):
        assert (ran.out / name).read_bytes().startswith(b"\x89PNG")
    folders = {path.name for path in ran.out.iterdir() if path.is_dir()}
    assert folders == {name.replace(" ", "-").lower() for name in NAMES[1:]}
    assert load(ran.out / "w8a8").timesteps is not None
    table = (ran.out / "table.md").read_text()
    (printed,) = (text for text in ran.said if "## digits" in text)
    assert printed.strip() in table
    assert "- full precision sampled in eager mode: BackendError: no compiler here" in printed
    assert [text.partition(":")[0] for text in ran.said[: len(NAMES)]] == NAMES


def test_no_block_is_learnt_that_an_exact_table_replaces(ran):
    # nearest rounding asks for no steps; the curve of the block after TIAR is the one that learns
    assert ran.learnt == [0, 1000]


def test_it_warns_of_nothing(ran):
    ours = str(Path(demo.__file__).parents[2])
    told = [str(w.message) for w in ran.warned if w.filename.startswith(ours)]
    assert told + [str(w.message) for w in ran.warned if "copy construct" in str(w.message)] == []
