"""verdict: what ok means, and the same findings as text and as JSON."""

import dataclasses
import json
import math

import pytest

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.diagnostics.culprits import Culprit
from tfmq_fx.diagnostics.verification_result import Verification


def check(**changes):
    good = Verification(
        exact=True,
        equal=True,
        difference=(0.0, 0.0),
        steps={0.0: math.inf},
        features=[],
        sites=[],
    )
    return dataclasses.replace(good, **changes)


SOUND = Culprit("up.conv", "site", 21.5, 250.0, False)
BROKEN = Culprit("up.time", "feature", 3.25, 999.0, True, note="why")


def test_what_ok_means():
    assert check().ok and check(difference=(0.0, 1e-5)).ok
    assert not check(equal=False).ok and not check(difference=(0.0, 1.1e-5)).ok
    assert not check(difference=(0.0, math.nan)).ok
    assert check(exact=False, equal=False, difference=(1.0, 1.0), steps={0.0: -3.0}).ok
    assert check(exact=False, steps={0.0: math.inf}).ok
    for value in (math.nan, -math.inf):  # NaN and infinite outputs
        assert not check(exact=False, steps={0.0: 30.0, 1.0: value}).ok


def test_what_a_lossy_model_must_be():
    assert check(exact=False, culprits=[SOUND]).ok
    assert not check(exact=False, culprits=[SOUND, BROKEN]).ok
    assert not check(exact=False, changed=["norm.weight"]).ok
    for pooled, ok in ((29.9, False), (30.0, True), (math.nan, False)):
        assert check(exact=False, pooled=pooled, threshold=30.0).ok is ok
        # what was asked for decides, whatever else there is
        assert check(exact=False, pooled=pooled, threshold=30.0, culprits=[BROKEN]).ok is ok
    assert not check(exact=False, steps={0.0: math.nan}, threshold=-100.0).ok
    # an exact model is to be equal, whatever was asked for
    assert not check(equal=False, pooled=80.0, threshold=30.0).ok


def everything():
    return check(
        exact=False,
        equal=False,
        difference=(0.25, 0.5),
        steps={0.0: 30.0, 250.0: -math.inf, 999.0: 12.0},
        features=[("up.time", 0.1, 0.5, 999.0)],
        sites=[("up.conv", math.nan, 250.0)],
        pooled=24.5,
        culprits=[BROKEN, SOUND],
        changed=["norm.weight"],
        threshold=30.0,
        running=[("up.conv", 18.0, 250.0), ("out", 14.0, 999.0)],
    )


def test_plain_data_is_json_with_names_for_what_is_not_finite():
    data = json.loads(json.dumps(everything().to_dict(), allow_nan=False))
    assert data == {
        "ok": False,
        "exact": False,
        "equal": False,
        "difference": {"absolute": 0.25, "relative": 0.5},
        "pooled": 24.5,
        "threshold": 30.0,
        "steps": [
            {"timestep": 0.0, "sqnr": 30.0},
            {"timestep": 250.0, "sqnr": "-inf"},
            {"timestep": 999.0, "sqnr": 12.0},
        ],
        "features": [{"name": "up.time", "mean": 0.1, "worst": 0.5, "timestep": 999.0}],
        "sites": [{"name": "up.conv", "sqnr": "nan", "timestep": 250.0}],
        "running": [
            {"name": "up.conv", "sqnr": 18.0, "timestep": 250.0},
            {"name": "out", "sqnr": 14.0, "timestep": 999.0},
        ],
        "culprits": [
            {
                "name": "up.time",
                "kind": "feature",
                "sqnr": 3.25,
                "timestep": 999.0,
                "broken": True,
                "note": "why",
            },
            {
                "name": "up.conv",
                "kind": "site",
                "sqnr": 21.5,
                "timestep": 250.0,
                "broken": False,
                "note": "",
            },
        ],
        "changed": ["norm.weight"],
    }
    assert check().to_dict()["threshold"] is None


def test_the_text_is_a_table_with_the_worst_first():
    assert str(everything()).splitlines() == [
        "lossy model, NOT OK: outputs within 0.25, 0.5 relative, 3 timesteps",
        "output SQNR 24.5 dB, asked for 30; worst steps: t=250 -inf, t=999 12.0, t=0 30.0",
        "as the model runs, out is furthest off: 14.0 dB at t=999",
        "parameters that are not the reference's: norm.weight",
        "culprits              SQNR dB  at t  why",
        "feature up.time BROKEN     3.2   999  why",
        "layer   up.conv           21.5   250",
    ]
    assert str(check()) == (
        "exact model, ok: batch 1 equal bit for bit, larger batch within 0 relative, 1 timestep"
    )


def test_the_file_appears_complete(tmp_path):
    path = tmp_path / "found.json"
    path.write_text("old")
    everything().save(path)
    assert json.loads(path.read_text()) == everything().to_dict()
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]
    with pytest.raises(ConfigError, match=r"found.json cannot be written: .*No such file"):
        everything().save(tmp_path / "nowhere" / "found.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="folder cannot be written"):
        everything().save(tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "found.json"]
