"""Trials on the CPU: the fastest is chosen, ours unless another is clearly faster, and kept."""

import dataclasses
import json

import pytest
import torch

from tests.backends.cpu.cases import needs_kernels
from tfmq_fx.backends.codes.choice import Choice
from tfmq_fx.backends.codes.problem import Problem, Tile
from tfmq_fx.backends.cpu import kernels, library
from tfmq_fx.backends.cpu.autotune import MARGIN, cache_file, calls, timed_chooser
from tfmq_fx.backends.saturation import onednn_is_exact

LINEAR = Problem(2, 1, 40, 64, 32, (1, 1), (1, 1), (1, 1), "int8", 0)
CONV = Problem(2, 6, 6, 16, 8, (3, 3), (1, 1), (1, 1), "int8", 0)
STRIDED = dataclasses.replace(CONV, stride=(2, 1), dilation=(1, 2))
RGB = dataclasses.replace(CONV, channels=3)
PACKED = dataclasses.replace(CONV, format="int4", half=32)


class Clock:
    """A timer by list: float, oneDNN, ours. Calls are made: what is timed is known to run."""

    def __init__(self, *micros):
        self.micros, self.made = list(micros), []

    def __call__(self, call):
        self.made.append(call())
        return self.micros.pop(0)


@needs_kernels
@pytest.mark.parametrize("micros, engine", [
    ((50.0, 30.0, 20.0), "cpu"),
    ((50.0, 10.0, 20.0), "onednn"),
    ((5.0, 10.0, 20.0), "float"),
    ((100.0, 100 * MARGIN + 0.1, 100.0), "cpu"),
    ((100.0, 100 * MARGIN - 0.1, 100.0), "onednn"),
    ((100 * MARGIN - 0.1, 99.0, 100.0), "float"),
    ((50.0, 50.0, 50.0), "cpu"),
])  # fmt: skip
def test_another_kernel_must_be_clearly_faster(tmp_path, micros, engine):
    choice = timed_chooser(timer=Clock(*micros), cache=tmp_path / "k")(CONV, torch.float32)
    times = dict(zip(("float", "onednn", "cpu"), micros, strict=True))
    assert choice == Choice(engine, Tile(), times)


@needs_kernels
@pytest.mark.parametrize("problem", [LINEAR, CONV, STRIDED, PACKED])
def test_all_that_is_timed_computes_the_same_sizes(problem):
    made = {name: call() for name, call in calls(problem).items()}
    assert set(made) == {"float", "onednn", "cpu"}
    assert len({y.numel() for y in made.values()}) == 1
    (out,) = {y.numel() for y in made.values()}
    assert out % problem.out_channels == 0 and all(y.isfinite().all() for y in made.values())


@needs_kernels
@pytest.mark.parametrize("problem", [LINEAR, CONV, STRIDED])
def test_kernels_that_are_timed_agree(problem):
    """Both are given the same codes and weights: sums of integers, scaled by output."""
    if not onednn_is_exact():  # with weights of 8 bits: it is with those of 4
        problem = dataclasses.replace(problem, format="int4", half=32)
    made = calls(problem)
    ours, other = made["cpu"](), made["onednn"]()
    other = other.view(ours.shape) if other.dim() == 2 else other.permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, other, rtol=2**-22, atol=0)  # one product, scaled once


@pytest.mark.parametrize("problem", [RGB, LINEAR])
def test_without_kernels_the_others_are_tried(monkeypatch, tmp_path, problem):
    if problem is not RGB:
        monkeypatch.setattr(kernels, "unavailable", lambda: "no such instructions")
    clock = Clock(50.0, 30.0)
    choice = timed_chooser(timer=clock, cache=tmp_path / "k")(problem, torch.float32)
    assert choice == Choice("onednn", Tile(), {"float": 50.0, "onednn": 30.0})
    assert len(clock.made) == 2


@needs_kernels
def test_results_are_kept_for_the_next_start(tmp_path):
    path = tmp_path / "deep" / "cpu.json"
    first = timed_chooser(timer=Clock(50.0, 30.0, 20.0), cache=path)
    choice = first(CONV, torch.float32)
    assert first(CONV, torch.float32) is choice  # nothing is timed twice
    again = timed_chooser(timer=Clock(), cache=path)
    assert again(CONV, torch.float32) == choice
    with pytest.raises(IndexError):  # another dtype is another question
        again(CONV, torch.bfloat16)
    with pytest.raises(IndexError):  # as is another shape
        again(STRIDED, torch.float32)


@needs_kernels
@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": {}}', '{"x": 3}', '{"x": {"tile": 1}}'])
def test_a_damaged_file_counts_as_none(tmp_path, content):
    path = tmp_path / "cpu.json"
    path.write_text(content)
    choose = timed_chooser(timer=Clock(50.0, 30.0, 20.0), cache=path)
    assert choose(CONV, torch.float32).engine == "cpu"
    assert len(json.loads(path.read_text())) == 1


@needs_kernels
def test_a_file_that_cannot_be_written_is_no_obstacle(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    choose = timed_chooser(timer=Clock(50.0, 30.0, 20.0), cache=blocked / "cpu.json")
    assert choose(CONV, torch.float32).engine == "cpu" and "not kept" in caplog.text


def test_the_file_is_of_the_processor_the_threads_and_the_kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("TFMQ_FX_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "processor", lambda: "one")
    one = cache_file()
    assert one.parent == tmp_path and one == cache_file()
    source = tmp_path / "kernels.cpp"
    source.write_text("")
    for where, name, value in (
        (kernels, "processor", lambda: "two"),
        (library, "SOURCE", source),
        (torch, "get_num_threads", lambda: 77),
        (torch, "__version__", "1.0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert cache_file() != one
    assert cache_file() == one
