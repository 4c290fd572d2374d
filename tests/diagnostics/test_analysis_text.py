"""summary: the words are those of the data."""

import copy

import pytest
import torch

from tests.toys import ToyDiT, seeded
from tfmq_fx.diagnostics.analysis_text import summary
from tfmq_fx.diagnostics.analyze import analyze


@pytest.fixture(scope="module")
def data():
    inputs = (torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 4]))
    found = analyze(seeded(ToyDiT).eval(), inputs).data
    found["capture_seconds"] = 0.25
    return found


def test_text_of_a_conditional_model(data):
    assert (
        summary(data)
        == """\
ToyDiT: 33,324 parameters, 110 nodes, captured in 0.2 s
inputs:
  x (batch, 3, 8, 8): x
  t (batch,): t
  y (batch,): c
binding time   nodes       parameters     share         FLOPs     share
  constant         6                0    0.00 %             0    0.00 %
  t                9            2,112    6.34 %        8.19 k    0.64 %
  c                1              320    0.96 %             0    0.00 %
  (t, c)          24           12,672   38.03 %        49.2 k    3.82 %
  x               65           18,220   54.68 %        1.23 M   95.54 %
  one call with a batch of 2: 1.29 MFLOPs, two for each multiply-add
temporal information block: 1 feature, 2,112 parameters
  128 bytes a timestep, 6.2 KiB for 50 steps, in place of 8.2 KiB of weights; saves 410 kFLOPs in \
50 steps
  time.2 (32,), with time.0
fixed for a request: y
  from these and the timestep: 2 values, 768 bytes in fp16 for each step and request, 37.5 KiB \
for 50 steps
    blocks.*.modulation (192,), 2 times
  with these stored, a step does without 15,104 parameters (45.32 %) and 57.3 kFLOPs"""
    )


def test_what_there_is_none_of_is_said(data):
    empty = copy.deepcopy(data)
    empty["block"] |= {"features": [], "shared": [], "declined": [["a.b", "it holds int64"]]}
    for row in empty["conditioned"]["rows"].values():
        row["features"] = []
    empty["unused_parameters"] = 1200
    text = summary(empty)
    assert "temporal information block: none, no layer depends on the timestep alone" in text
    assert "  not tabled: a.b: it holds int64" in text
    assert "  parameters that no call uses: 1,200" in text
    assert text.endswith(
        "fixed for a request: y\n  no layer depends on them and the timestep alone"
    )


def test_many_features_are_counted_by_kind_and_small_shares_are_no_zero(data):
    many = copy.deepcopy(data)
    names = [f"blocks.{i}.linear" for i in range(30)]
    many["block"]["features"] = [[name, [8 + (i == 3)], "f"] for i, name in enumerate(names)]
    many["block"] |= {"table_bytes": 3 << 20, "shared": ["time.0"]}
    many["bindings"]["t"]["flops"] = 3
    text = summary(many)
    assert "  blocks.*.linear (8,), 29 times\n  blocks.*.linear (9,)\n" in text
    assert "blocks.3.linear" not in text and "3.00 MiB for 50 steps" in text
    assert "  shared by several: time.0" in text
    assert "2e-04 %" in text
