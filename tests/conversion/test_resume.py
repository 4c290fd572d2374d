"""A conversion that was killed goes on where it was and ends with the bits it would have had."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.test_traps import batches, calibrated, recipe
from tests.toys import ToyUNet, seeded
from tfmq_fx import convert
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.passes import reconstruct_blocks, reconstruct_tib, round_weights


def prepared(seed=0, **reconstruction):
    """A toy whose temporal block, layers and blocks are all rounded, for a second or two."""
    config = recipe("w4a8", mode="tib", **{"iters": 30} | reconstruction)
    return calibrated(seeded(ToyUNet, seed=seed).eval(), config)


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())
    with torch.no_grad():
        assert all(torch.equal(a(*batch), b(*batch)) for batch in batches())
    return True


def taken(model):
    passes = {p["name"]: p["details"] for p in model.record["passes"]}
    return {name: d["checkpoint"]["taken"] for name, d in passes.items() if "checkpoint" in d}


@pytest.fixture(scope="module")
def uninterrupted():
    return convert(prepared(), progress=False)


@pytest.fixture
def made(monkeypatch):
    """The parts that were really computed, by pass."""
    names = []

    def counting(module, function, name):
        original = getattr(module, function)

        def call(*args, **kwargs):
            names.append(name(*args))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, call)

    counting(sys.modules[reconstruct_tib.__name__], "_learnt", lambda *a: "temporal block")
    counting(
        sys.modules[round_weights.__name__], "input_statistics", lambda *a: f"layer {a[0].name}"
    )
    counting(sys.modules[reconstruct_blocks.__name__], "_best", lambda *a: f"block {a[2].path}")
    return names


@pytest.mark.parametrize("group, count", [("round_weights", 3), ("reconstruct_blocks", 2)])
def test_a_killed_conversion_goes_on_and_ends_with_the_same_bits(
    tmp_path, uninterrupted, made, group, count
):
    command = [
        sys.executable,
        "-m",
        "tests.conversion.test_resume",
        tmp_path,
        str(torch.get_num_threads()),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob(f"{group}*.safetensors"))) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(list(tmp_path.glob("*.safetensors")))
    resumed = convert(prepared(), checkpoint=tmp_path, progress=False)
    assert same(resumed, uninterrupted)
    total = len(list(tmp_path.glob("*.safetensors")))
    names = taken(resumed)
    assert sum(map(len, names.values())) == done < total == done + len(made)
    assert names["reconstruct_tib"] == ["temporal block"] and "temporal block" not in made
    assert len(set(made)) == len(made)
    # and once more: nothing is left to do
    made.clear()
    assert same(convert(prepared(), checkpoint=tmp_path, progress=False), uninterrupted)
    assert not made


def test_with_a_checkpoint_or_without_one_the_bits_are_the_same(tmp_path, uninterrupted, made):
    whole = convert(prepared(), checkpoint=tmp_path / "own", progress=False)
    assert same(whole, uninterrupted) and not any(taken(whole).values())
    for damaged in list((tmp_path / "own").glob("*.safetensors"))[::3]:
        damaged.write_bytes(damaged.read_bytes()[:-3])
    made.clear()
    # room for the samples, and for nothing that becomes of them
    again = convert(
        prepared(memory=24 * (3 * 8 * 8 * 4 + 8)), checkpoint=tmp_path / "own", progress=False
    )
    assert 0 < len(made) < sum(map(len, taken(again).values()))
    assert same(again, uninterrupted)
    notes = [p["details"].get("checkpoint", {}).get("made again") for p in again.record["passes"]]
    assert sum(len(note) for note in notes if note) == len(made)


def test_other_models_data_and_recipes_are_refused(tmp_path):
    convert(prepared(iters=0), checkpoint=tmp_path, progress=False)
    for other, message in (
        (prepared(iters=1), r"recipe\.reconstruction\.iters: 0 there, 1 here"),
        (prepared(seed=1, iters=0), "another model"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert(other, checkpoint=tmp_path, progress=False)
    more = prepared(iters=0)
    more(torch.zeros(1, 3, 8, 8), torch.tensor([1]))
    with pytest.raises(ConfigError, match="another calibration"):
        convert(more, checkpoint=tmp_path, progress=False)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    convert(prepared(), checkpoint=sys.argv[1], progress=False)
