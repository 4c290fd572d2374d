"""Culprits: what is broken comes first, then the worst."""

import copy
import math

import pytest
import torch

from tests.converted import KEYS, captured, examples, lossy, spoil, toy
from tests.test_api import calibrated, fast
from tfmq_fx import LayerConfig, WeightSpec, convert
from tfmq_fx.core.layer_config import ActivationSpec
from tfmq_fx.diagnostics.culprits import MOST, find_culprits
from tfmq_fx.diagnostics.feature_errors import feature_errors
from tfmq_fx.diagnostics.layer_errors import site_errors


def culprits(model, sites=None):
    given = examples(model, 4)
    return find_culprits(
        site_errors(captured(), model.gm, given) if sites is None else sites,
        feature_errors(captured(), model.gm, KEYS),
        steps=torch.cat([t for _, t in given]),
        timesteps=KEYS,
    )


@pytest.fixture(scope="module")
def coarse():
    """A model with 8 bits everywhere but in one layer, whose weights have 3."""
    layer = LayerConfig(weights=WeightSpec(bits=3), activations=ActivationSpec(bits=8))
    prepared = calibrated(toy(), 8, fast("w8a8", mode="table"), overrides={"down2.conv1": layer})
    return convert(prepared, progress=False)


def test_a_layer_that_lacks_bits_comes_first_and_is_not_broken(coarse):
    found = culprits(coarse)
    assert len(found) == MOST and not any(each.broken for each in found)
    assert (found[0].name, found[0].kind, found[0].note) == ("down2.conv1", "site", "")
    assert found[0].sqnr < found[1].sqnr - 2


def test_nothing_is_changed_by_looking(coarse):
    before = {name: value.clone() for name, value in coarse.state_dict().items()}
    code = coarse.gm.code
    culprits(coarse)
    assert coarse.gm.code == code
    assert all(torch.equal(v, before[n]) for n, v in coarse.state_dict().items())
    assert list(before) == list(coarse.state_dict())


def test_what_is_broken_comes_first_by_its_noise():
    model = copy.deepcopy(lossy())
    spoil(model, "up1.conv2", "weight", 2.0)
    spoil(model, "attention.qkv", "weight", 2.0)
    (node,) = [n for n in model.gm.graph.nodes if n.meta.get("feature") == "up2.time"]
    place = node.args[1][1]
    model.gm.temporal_table[1, place] = lossy().gm.temporal_table[2, place]
    found = culprits(model)
    assert {each.name for each in found[:3]} == {"up1.conv2", "attention.qkv", "up2.time"}
    assert [each.broken for each in found[:4]] == [True, True, True, False]
    row = next(each for each in found if each.kind == "feature")
    assert row.timestep == 250 and row.note == "at t=250 it has the row of t=999"


def test_of_sound_layers_the_worst_come_first():
    found = culprits(lossy())
    errors = site_errors(captured(), lossy().gm, examples(lossy(), 4))
    expected = sorted(errors, key=lambda each: each.pooled)[:MOST]
    assert [each.name for each in found] == [each.name for each in expected]
    assert [each.sqnr for each in found] == [float(each.alone.min()) for each in expected]


def test_rows_of_few_bits_are_coarse_and_not_broken():
    recipe = fast("w8a16", mode="cache", cache_bits=(4,))
    model = convert(calibrated(toy(), 8, recipe), progress=False)
    found = [each for each in culprits(model) if each.kind == "feature"]
    assert found and not any(each.broken or each.note for each in found)
    for each in found:
        assert -20 * math.log10(0.2) < each.sqnr < -20 * math.log10(0.01)  # of 15 steps


def test_outputs_that_are_not_finite_are_broken():
    model = copy.deepcopy(lossy())
    model.gm.get_submodule("conv_out").bias[0] = math.nan
    first = culprits(model)[0]
    assert first.name == "conv_out" and first.broken and math.isnan(first.sqnr)
    assert first.note == "its output is not finite"
