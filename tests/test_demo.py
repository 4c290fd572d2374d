"""demo: the whole of it on a tiny model, uncompiled, and what it says, writes and computes."""

import dataclasses
import json
import math
import warnings
from pathlib import Path

import pytest

from tests.toys import tiny_unet2d
from tfmq_fx import BackendError, demo, temporal
from tfmq_fx.capture import capture

pytestmark = [pytest.mark.slow, pytest.mark.sample]
NAMES = ["full precision", "tables only", "W8A8", "W4A8 nearest", "W4A8 everything"]


@dataclasses.dataclass
class Ran:
    rows: list[demo.Row]
    said: list[str]
    warned: list[warnings.WarningMessage]
    learnt: list[int]  # steps of each temporal block that was to be learnt
    out: Path


def unet():
    return tiny_unet2d(
        sample_size=demo.digits.IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    def cannot(name):
        raise BackendError("no compiler here")

    steps = []
    reconstruct = temporal.reconstruct_tib

    def counted(*args, iters, **options):
        steps.append(iters)
        return reconstruct(*args, iters=min(iters, 3), **options)

    captured = []

    def once(*args, **options):
        """Every variant is made from one model, and capturing it takes longest."""
        captured[:] = captured or [capture(*args, **options)]
        return captured[0]

    out, said = tmp_path_factory.mktemp("demo") / "out", []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for name, value in {"STEPS": 2, "PAIRS": 8, "BATCH": 8}.items():
            patch.setattr(demo, name, value)
        patch.setattr(demo.digits, "load_unet", unet)
        patch.setattr(demo.backends, "backend", cannot)
        patch.setattr(temporal, "reconstruct_tib", counted)
        patch.setattr(demo, "capture", once)
        patch.setattr(demo.api, "capture", once)
        everything = demo.everything()
        few = dataclasses.replace(everything.reconstruction, iters=2)
        short = dataclasses.replace(everything, reconstruction=few)
        patch.setattr(demo, "everything", lambda: short)
        rows = demo.run(out, samples=16, progress=False, say=said.append)
    return Ran(rows, said, warned, steps, out)


def test_every_variant_is_a_row_with_its_figures(ran):
    assert [row.name for row in ran.rows] == NAMES
    full, tables, eight, nearest, everything = ran.rows
    assert full.sqnr == full.psnr == math.inf and full.weights == 1
    # at a batch of many the sums of what became a table run in another order
    assert tables.sqnr > 100 and tables.weights == 0 and tables.feature_worst < 1e-6
    for row in (eight, nearest, everything):
        assert row.weights == row.activations == 1
    assert eight.sqnr > everything.sqnr > nearest.sqnr and eight.sqnr > nearest.sqnr + 6
    assert eight.feature_mean == everything.feature_mean == 0 < nearest.feature_mean
    for row in ran.rows:
        assert row.fid_low <= row.fid <= row.fid_high and 0 <= row.confident <= 1
        assert row.backend == "eager"


def test_the_table_the_pictures_and_the_models_are_written(ran):
    data = json.loads((ran.out / "table.json").read_text())
    assert data == json.loads(json.dumps([dataclasses.asdict(row) for row in ran.rows]))
    for name in ("samples.png", "temporal-error.png"):
        assert (ran.out / name).read_bytes().startswith(b"\x89PNG")
    folders = {path.name for path in ran.out.iterdir() if path.is_dir()}
    assert folders == {name.replace(" ", "-").lower() for name in NAMES[1:]}
    assert ran.said[0] == "Running eager: no compiler here"
    assert any(demo.table(ran.rows) in text for text in ran.said)


def test_no_block_is_learnt_that_an_exact_table_replaces(ran):
    # nearest rounding asks for no steps; the curve of the block after TIAR is the one that learns
    assert ran.learnt == [0, 1000]


def test_it_warns_of_nothing(ran):
    ours = str(Path(demo.__file__).parents[1])
    told = [str(w.message) for w in ran.warned if w.filename.startswith(ours)]
    assert told + [str(w.message) for w in ran.warned if "copy construct" in str(w.message)] == []
