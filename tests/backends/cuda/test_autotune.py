"""Trials: the fastest is chosen, remembered, and what cannot run is passed over."""

import dataclasses
import json
import sys
import types

import pytest
import torch

from tfmq_fx.backends.codes.choice import Choice
from tfmq_fx.backends.codes.problem import Problem, Tile
from tfmq_fx.backends.cuda import autotune
from tfmq_fx.backends.cuda.autotune import TRIED, arguments, timed_chooser, untimed_choice
from tfmq_fx.backends.cuda.conv import conv2d_reference
from tfmq_fx.backends.cuda.tiles import candidates

CPU = torch.device("cpu")
LINEAR = Problem(2, 1, 40, 64, 32, (1, 1), (1, 1), (1, 1), "int8", 0)
CONV = Problem(2, 6, 6, 16, 8, (3, 3), (1, 1), (1, 1), "int8", 0)


class Clock:
    """A timer by list: the float layer first, then tiles, then torch's product. Calls are made, so
    that what is timed is known to run."""

    def __init__(self, *micros):
        self.micros, self.made = list(micros), []

    def __call__(self, call):
        self.made.append(call())
        return self.micros.pop(0)


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """The reference in place of the kernel, and what tiles it was called with."""
    tiles = []

    def stand_in(**given):
        tiles.append(given["tile"])
        return conv2d_reference(**given)

    monkeypatch.setattr(autotune, "conv2d", stand_in)
    return tiles


def count(problem):
    return min(TRIED, len(candidates(problem)))


def test_the_fastest_tile_is_chosen(tmp_path, kernel):
    times = [50.0] + [30.0] * count(CONV)
    times[2] = 20.0
    choose = timed_chooser(CPU, timer=Clock(*times), cache=tmp_path / "kernels.json")
    choice = choose(CONV, torch.float32)
    assert choice == Choice("triton", candidates(CONV)[1], {"float": 50.0, "triton": 20.0})
    assert kernel == candidates(CONV)[:TRIED]


def test_floating_point_wins_where_it_is_faster(tmp_path):
    clock = Clock(5.0, *[30.0] * count(CONV))
    choice = timed_chooser(CPU, timer=clock, cache=tmp_path / "k")(CONV, torch.bfloat16)
    assert choice.engine == "float" and choice.micros == {"float": 5.0, "triton": 30.0}
    in_float, by_kernel = clock.made[:2]
    assert all(r.dtype == torch.bfloat16 for r in clock.made)
    assert in_float.shape == (2, 8, 4, 4) and by_kernel.shape == (2, 4, 4, 8)


def test_linear_layers_are_tried_on_torch_as_well(tmp_path):
    clock = Clock(50.0, *[30.0] * count(LINEAR), 10.0)
    choice = timed_chooser(CPU, timer=clock, cache=tmp_path / "k")(LINEAR, torch.float32)
    assert choice.engine == "torch" and choice.micros["torch"] == 10.0
    assert clock.made[-1].shape == (80, 32)


def test_results_are_kept_for_the_next_start(tmp_path):
    path = tmp_path / "deep" / "kernels.json"
    first = timed_chooser(CPU, timer=Clock(50.0, *[30.0] * count(CONV)), cache=path)
    choice = first(CONV, torch.float32)
    assert first(CONV, torch.float32) is choice  # nothing is timed twice
    again = timed_chooser(CPU, timer=Clock(), cache=path)
    assert again(CONV, torch.float32) == choice
    with pytest.raises(IndexError):  # another dtype is another question
        again(CONV, torch.bfloat16)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": {}}', '{"x": 3}', '{"x": {"tile": 1}}'])
def test_a_damaged_file_counts_as_none(tmp_path, content):
    path = tmp_path / "kernels.json"
    path.write_text(content)
    choose = timed_chooser(CPU, timer=Clock(50.0, *[30.0] * count(CONV)), cache=path)
    assert choose(CONV, torch.float32).engine == "triton"
    assert len(json.loads(path.read_text())) == 1


def test_a_file_that_cannot_be_written_is_no_obstacle(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    clock = Clock(50.0, *[30.0] * count(CONV))
    choice = timed_chooser(CPU, timer=clock, cache=blocked / "kernels.json")(CONV, torch.float32)
    assert choice.engine == "triton" and "not kept" in caplog.text


def test_tiles_that_fail_are_passed_over(tmp_path, monkeypatch):
    def fails(**given):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(autotune, "conv2d", fails)
    choice = timed_chooser(CPU, timer=Clock(50.0), cache=tmp_path / "k")(CONV, torch.float32)
    assert choice.engine == "float" and choice.micros == {"float": 50.0}


@pytest.mark.parametrize("format, half", [("int8", 0), ("fp8", 0), ("int4", 32)])
def test_arguments_are_what_the_kernel_takes(format, half):
    p = dataclasses.replace(CONV, format=format, half=half)
    y = conv2d_reference(**arguments(p, CPU), dtype=torch.float32, tile=Tile())
    assert y.shape == (2, 4, 4, 8) and y.isfinite().all() and y.std() > 0


def test_without_a_device_the_likely_tile_is_taken():
    assert untimed_choice(CONV, torch.float32) == Choice("triton", candidates(CONV)[0], {})


def test_the_file_is_of_the_device_and_the_versions(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.6.0"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "one")
    monkeypatch.setenv("TFMQ_FX_CACHE", str(tmp_path))
    one = autotune.cache_file(CPU)
    assert one.parent == tmp_path and one.name.startswith("kernels-")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "two")
    assert autotune.cache_file(CPU) != one
    monkeypatch.delenv("TFMQ_FX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert autotune.cache_file(CPU).parent == tmp_path / "xdg" / "tfmq_fx"


def test_a_change_of_a_kernel_makes_earlier_choices_void(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.6.0"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "one")
    monkeypatch.setenv("TFMQ_FX_CACHE", str(tmp_path))
    found = autotune.sources()
    names = {f"{path.parent.name}/{path.name}" for path in found}
    kernels = {"kernels/conv.py", "kernels/norm.py", "kernels/rounding.py"}
    assert names >= kernels | {"cuda/tiles.py", "codes/problem.py"}
    one = autotune.cache_file(CPU)
    for path in found:
        changed = tmp_path / path.name
        changed.write_text(path.read_text() + "#")
        others = [changed if other == path else other for other in found]
        with monkeypatch.context() as patch:
            patch.setattr(autotune, "sources", lambda others=others: others)
            assert autotune.cache_file(CPU) != one
    assert autotune.cache_file(CPU) == one
