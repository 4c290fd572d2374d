"""Choices: asked for once, kept in a file where they are worth it, and explained."""

import dataclasses
import json

import pytest
import torch

from tfmq_fx.backends.codes.choice import (
    Choice,
    cached_chooser,
    read_choices,
    runs_on_torch,
    slower,
    write_choices,
)
from tfmq_fx.backends.codes.problem import Problem, Tile

LINEAR = Problem(2, 1, 40, 64, 32, (1, 1), (1, 1), (1, 1), "int8", 0)
WIDE = dataclasses.replace(LINEAR, out_channels=64)
MEASURED = Choice("triton", Tile(split=2), {"float": 5.0, "triton": 2.5})


class Deciding:
    """A chooser that answers MEASURED, and counts how often it is asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, problem, dtype):
        self.asked.append((problem, dtype))
        return MEASURED


def test_a_question_is_asked_once_for_each_problem_and_dtype(tmp_path):
    decide = Deciding()
    choose = cached_chooser(decide, tmp_path / "choices.json")
    for _ in range(2):
        assert choose(LINEAR, torch.float32) is MEASURED
        assert choose(LINEAR, torch.bfloat16) is MEASURED
        assert choose(WIDE, torch.float32) is MEASURED
    assert len(decide.asked) == 3
    again = Deciding()
    assert cached_chooser(again, tmp_path / "choices.json")(WIDE, torch.float32) == MEASURED
    assert again.asked == []


def test_what_is_not_worth_keeping_is_asked_for_again_by_the_next_process(tmp_path):
    path = tmp_path / "choices.json"
    decide = Deciding()
    choose = cached_chooser(decide, path, keeps=lambda choice: False)
    assert choose(LINEAR, torch.float32) is choose(LINEAR, torch.float32) is MEASURED
    assert len(decide.asked) == 1 and not path.exists()


def test_choices_of_another_process_are_not_lost(tmp_path):
    path = tmp_path / "choices.json"
    write_choices(path, {"mine": MEASURED})
    write_choices(path, {"other": Choice("float", Tile())})
    assert read_choices(path) == {"mine": MEASURED, "other": Choice("float", Tile(), {})}
    assert len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": {}}', '{"x": 3}', '{"x": {"tile": 1}}'])
def test_a_damaged_or_missing_file_holds_none(tmp_path, content):
    path = tmp_path / "choices.json"
    assert read_choices(path) == {}
    path.write_text(content)
    assert read_choices(path) == {}


def test_the_reason_names_both_times():
    assert slower(MEASURED, "bf16", "int8") == "bf16 took 5.0 us, int8 2.5 us"
    none_ran = Choice("float", Tile(), {"float": 5.0})
    assert slower(none_ran, "float32", "the kernels") == "float32 took 5.0 us, the kernels inf us"


def test_what_torch_multiplies_on_cuda():
    assert runs_on_torch(LINEAR)
    for changes in ({"width": 16}, {"channels": 24}, {"out_channels": 40}, {"half": 32}):
        assert not runs_on_torch(dataclasses.replace(LINEAR, **changes))
