"""cells: results are found by what they are of, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from tfmq_fx.core.config import Config
from tfmq_fx.evaluation.result_store import Cell, Cells, machine

CELL = Cell(
    model="tiny",
    recipe="best",
    bits="w4a8",
    config=Config(name="best-w4a8"),
    contents="0" * 16,
    reference="48 random images",
    seed=0,
    samples=16,
    steps=2,
    batch=8,
    backend="eager",
    device="cpu",
)
DONE = {"status": "done", "figures": {"sqnr": math.inf}}
FAILED = {"status": "failed", "error": "RuntimeError: no"}


@pytest.fixture
def cells(tmp_path):
    return Cells(tmp_path / "cells")


def test_a_result_comes_back_with_its_images(cells):
    assert cells.read(CELL) is None and cells.images(CELL) is None
    images = torch.linspace(-1.5, 1.5, 96).view(2, 3, 4, 4)
    cells.write(CELL, DONE, images)
    found = cells.read(CELL)
    assert found["status"] == "done" and float(found["figures"]["sqnr"]) == math.inf
    assert (cells.images(CELL) - images.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6
    assert sorted(p.suffix for p in cells.folder.iterdir()) == [".json", ".safetensors"]


def test_a_failure_needs_no_images(cells):
    cells.write(CELL, FAILED)
    assert cells.read(CELL)["error"] == "RuntimeError: no" and cells.images(CELL) is None


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"config": Config(name="best-w4a8", correction="bias")},
        {"config": None},
        {"contents": "1" * 16},
        {"reference": "other images"},
        {"seed": 1},
        {"samples": 24},
        {"steps": 3},
        {"batch": 16},
        {"backend": "inductor"},
        {"device": "cuda"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_differs_in_anything_is_another_result(cells, change):
    cells.write(CELL, FAILED)
    assert cells.read(dataclasses.replace(CELL, **change)) is None


def test_another_version_is_another_result(cells, monkeypatch):
    cells.write(CELL, FAILED)
    monkeypatch.setattr("tfmq_fx.evaluation.result_store.__version__", "99")
    assert cells.read(CELL) is None


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "{}", '{"subject": 1, "status": "done"}'], ids=repr
)
def test_a_damaged_result_is_none(cells, damage):
    cells.write(CELL, DONE, torch.zeros(2, 3, 4, 4))
    (cells.folder / f"{CELL.key}.json").write_text(damage)
    assert cells.read(CELL) is None


def test_a_result_whose_images_are_damaged_is_none(cells):
    cells.write(CELL, DONE, torch.zeros(2, 3, 4, 4))
    path = cells.folder / f"{CELL.key}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert cells.read(CELL) is None
    path.unlink()
    assert cells.read(CELL) is None


def test_a_result_under_the_name_of_another_is_none(cells):
    cells.write(CELL, FAILED)
    other = dataclasses.replace(CELL, seed=1)
    text = (cells.folder / f"{CELL.key}.json").read_text()
    (cells.folder / f"{other.key}.json").write_text(text)
    assert cells.read(other) is None


def test_titles_name_the_width_once():
    assert CELL.title == "tiny best-w4a8 seed 0"
    assert dataclasses.replace(CELL, recipe="own", bits="").title == "tiny own seed 0"


def test_the_machine_is_named():
    found = machine()
    assert found["threads"] == torch.get_num_threads() and found["torch"] == torch.__version__
    assert found["cpu"] and json.dumps(found)
