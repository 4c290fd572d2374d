"""feature_errors: rows are compared with the reference's, and told apart by how they are held."""

import copy

import pytest
import torch
from torch import nn

from tests.converted import KEYS, captured, lossy
from tests.ir.test_sites import graph_of
from tests.toys import seeded
from tfmq_fx.diagnostics.feature_errors import feature_errors, temporal_errors
from tfmq_fx.ir.subgraphs import compute_rows
from tfmq_fx.ir.temporal_block import temporal_block
from tfmq_fx.passes.fold_timesteps import fold_timesteps
from tfmq_fx.quant.timestep_table import cache_error

FEATURES = 6


def errors(model):
    return {each.name: each for each in feature_errors(captured(), model.gm, KEYS)}


def columns(model, feature):
    """Where an exact table holds a feature."""
    (node,) = [n for n in model.gm.graph.nodes if n.meta.get("feature") == feature]
    return node.args[1][1]


def test_exact_rows_have_no_error():
    found = errors(lossy())
    block = temporal_block(captured())
    assert list(found) == [f.name for f in block.features] and len(found) == FEATURES
    for each, row in zip(found.values(), compute_rows(block.graph, KEYS), strict=True):
        assert not each.broken and each.note(KEYS) == ""
        assert torch.equal(each.rows, row) and torch.equal(each.actual, row)
        assert each.errors.tolist() == [0, 0, 0] and each.stored is each.rows


def test_cached_rows_have_the_error_of_their_bits():
    for each in errors(lossy("w8a8", "cache")).values():
        bits = 8 if each.errors.max() < 0.02 else 4  # half a step of 15 or 255
        assert not each.broken
        torch.testing.assert_close(each.errors, cache_error(each.rows.flatten(1), bits))
        assert torch.equal(each.actual, each.stored)


def test_what_layers_compute_is_judged_by_the_layers():
    model = copy.deepcopy(lossy("w8a8", "tib"))
    model.gm.get_submodule("time_mlp.0").weight_scale.mul_(2)
    for each in errors(model).values():
        assert each.stored is None and each.errors.max() > 0.05 and not each.broken


@pytest.mark.parametrize("mode", ["table", "cache"])
@pytest.mark.parametrize("swapped", [False, True])
def test_the_row_of_another_timestep_is_wrong_and_told(mode, swapped):
    model = copy.deepcopy(lossy("w8a8", mode))
    held = model.gm
    if mode == "table":
        place, rows = columns(model, "up2.time"), held.temporal_table
        changes = [(rows[:, place], lossy("w8a8", mode).gm.temporal_table[:, place])]
    else:
        (table,) = [m for n, m in held.named_children() if n.startswith("temporal_cache")]
        i = [e.name for e in errors(model).values()].index("up2.time")
        start = sum(table.widths[:i])
        place = slice(start, start + table.widths[i])
        first = copy.deepcopy(table)
        changes = [
            (table.codes[:, place], first.codes[:, place]),
            (table.scale[:, i], first.scale[:, i]),
            (table.zero[:, i], first.zero[:, i]),
        ]
    for new, old in changes:
        new[1] = old[2]
        if swapped:
            new[2] = old[1]
    found = errors(model)
    assert [name for name, each in found.items() if each.broken] == ["up2.time"]
    each = found["up2.time"]
    assert each.wrong.tolist() == [False, True, swapped]
    assert each.worst in ((1, 2) if swapped else (1,))
    told = {1: "at t=250 it has the row of t=999", 2: "at t=999 it has the row of t=250"}[
        each.worst
    ]
    assert each.note(KEYS) == ("wrong at 2 of 3 timesteps; " if swapped else "") + told


def test_rounding_of_another_machine_is_no_fault():
    model = copy.deepcopy(lossy())
    model.gm.temporal_table.mul_(1 + 2e-7)
    for each in errors(model).values():
        assert 0 < each.errors.max() < 1e-6 and not each.broken
    model.gm.temporal_table.mul_(1 + 1e-5)
    assert all(each.broken for each in errors(model).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_wrong(value):
    model = copy.deepcopy(lossy())
    model.gm.temporal_table[0, columns(model, "mid1.time")] = value
    found = errors(model)
    assert [n for n, each in found.items() if each.broken] == ["mid1.time"]
    assert found["mid1.time"].wrong.tolist() == [True, False, False]


class Wide(nn.Module):
    """A temporal feature of two dimensions."""

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(1, 8)

    def forward(self, x, t):
        return x * torch.softmax(self.time(t[:, None].float()).view(-1, 2, 4), -1)


def test_features_of_more_dimensions_are_compared_too():
    gm = graph_of(seeded(Wide).eval(), 2, 4)
    folded = fold_timesteps(gm, timesteps=KEYS).gm
    for held in (gm, folded):
        (each,) = feature_errors(gm, held, KEYS)
        assert each.rows.shape == (3, 8) or each.rows.shape == (3, 2, 4)
        assert torch.equal(each.actual, each.rows) and each.worst == 0 and not each.broken
    assert feature_errors(captured(), gm, KEYS) == []  # a model that has none of the features


def test_temporal_errors_are_told_by_feature_and_timestep():
    names, found = temporal_errors(captured(), lossy().gm, KEYS)
    assert found.shape == (len(names), len(KEYS)) == (FEATURES, 3) and not found.any()
    names, found = temporal_errors(captured(), lossy("w8a8", "cache").gm, KEYS)
    # cached at 8 bits: half a step of a range that is at most 10 times the norm's mean
    assert (found > 0).all() and (found < 10 / 2**8).all()
    names, found = temporal_errors(captured(), graph_of(seeded(Wide).eval(), 2, 4), KEYS)
    assert names == [] and found.shape == (0, 3)
