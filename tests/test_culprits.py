"""culprits: what is broken comes first, and gains are what the change makes of the output."""

import copy
import dataclasses
import math

import pytest
import torch

from tests.converted import KEYS, captured, examples, lossy, spoil, toy
from tests.test_api import calibrated, fast
from tfmq_fx import LayerConfig, WeightSpec, convert
from tfmq_fx.config import ActivationSpec
from tfmq_fx.culprits import AGAIN, MOST, find_culprits
from tfmq_fx.feature_errors import feature_errors
from tfmq_fx.noise import energies, pooled
from tfmq_fx.site_errors import site_errors

ACTS = ActivationSpec(bits=8)


def measure(gm):
    batches = examples(lossy(), 4)
    with torch.no_grad():
        pairs = [(captured()(*v)[0], gm(*v)[0]) for v in batches]
    return pooled(torch.cat([energies(a, b, 1) for a, b in pairs], 1))


def culprits(model, *, fixes=True, asked=None):
    given = examples(model, 4)
    steps = torch.cat([t for _, t in given])

    def at(timesteps):
        if asked is not None:
            asked.append(list(timesteps))
        return measure

    return find_culprits(
        model.gm,
        site_errors(captured(), model.gm, given, KEYS),
        feature_errors(captured(), model.gm, KEYS),
        steps=steps,
        timesteps=KEYS,
        measure_at=at if fixes else None,
    )


@pytest.fixture(scope="module")
def coarse():
    """A model with 8 bits everywhere but in one layer, whose weights have 3."""
    plan = {"down2.conv1": LayerConfig(weights=WeightSpec(bits=3), activations=ACTS)}
    prepared = calibrated(toy(), 8, fast("w8a8", mode="table"), overrides=plan)
    return convert(prepared, progress=False)


def test_bits_that_a_layer_lacks_are_named_with_what_they_bring(coarse):
    found = culprits(coarse)
    assert len(found) == MOST and not any(each.broken for each in found)
    first = found[0]
    assert first.name == "down2.conv1" and first.kind == "site"
    assert [what for what, _ in first.fixes] == [
        AGAIN,
        "weights at 8 bits",
        "input in float",
        "weights in float",
    ]
    gains = dict(first.fixes)
    assert first.fix == ("weights at 8 bits", gains["weights at 8 bits"])
    assert gains["weights at 8 bits"] > 2 > 0.5 > abs(gains["input in float"])
    # the others have their 8 bits already
    assert all(what != "weights at 8 bits" for each in found[1:] for what, _ in each.fixes)
    assert str(first) == f"weights at 8 bits: {first.gain:+.1f} dB"


def test_a_gain_is_what_the_change_makes_of_the_output(coarse):
    gains = dict(culprits(coarse)[0].fixes)
    changed = copy.deepcopy(coarse)
    layer = changed.gm.get_submodule("down2.conv1")
    float_layer = toy().down2.conv1

    def forward(x, scale):
        seen = layer.quantized_input(x, scale)
        return layer.apply_op(seen, float_layer.weight, float_layer.bias)

    layer.forward = forward
    expected = measure(changed.gm) - measure(coarse.gm)
    assert gains["weights in float"] == pytest.approx(expected, abs=1e-6)


def test_nothing_is_changed_by_looking(coarse):
    before = {name: value.clone() for name, value in coarse.state_dict().items()}
    code = coarse.gm.code
    culprits(coarse)
    assert coarse.gm.code == code
    assert all(torch.equal(v, before[n]) for n, v in coarse.state_dict().items())
    assert list(before) == list(coarse.state_dict())


def test_what_is_broken_comes_first_by_its_effect_then_ranges_that_stand_out():
    model = copy.deepcopy(lossy())
    spoil(model, "up1.conv2", "weight", 2.0)
    spoil(model, "attention.qkv", "weight", 2.0)
    spoil(model, "mid1.conv1", "input", 2.0)
    (node,) = [n for n in model.gm.graph.nodes if n.meta.get("feature") == "up2.time"]
    place = node.args[1][1]
    model.gm.temporal_table[1, place] = lossy().gm.temporal_table[2, place]
    asked = []
    found = culprits(model, asked=asked)
    assert {each.name for each in found[:3]} == {"up1.conv2", "attention.qkv", "up2.time"}
    assert [each.broken for each in found[:4]] == [True, True, True, False]
    gains = [each.gain for each in found[:3]]
    assert gains == sorted(gains, reverse=True)
    assert found[3].name == "mid1.conv1" and found[3].suspect
    row = next(each for each in found if each.kind == "feature")
    assert row.timestep == 250 and row.fixes[0][0] == "rows from the reference"
    assert row.note == "at t=250 it has the row of t=999"
    # outputs are measured where each of them is worst
    assert set(asked[0]) == {each.timestep for each in found}
    assert all(
        each.fix is not None and each.fix[0] == AGAIN for each in found[:3] if each is not row
    )


def test_without_fixes_the_worst_come_first():
    found = culprits(lossy(), fixes=False)
    assert len(found) == MOST and all(each.fixes == () for each in found)
    errors = site_errors(captured(), lossy().gm, examples(lossy(), 4), KEYS)
    expected = sorted(errors, key=lambda each: each.pooled)[:MOST]
    assert [each.name for each in found] == [each.part.name for each in expected]
    assert [each.sqnr for each in found] == [float(each.found.min()) for each in expected]


def test_rows_of_integers_gain_by_more_bits():
    recipe = fast("w8a16", mode="cache", cache_bits=(4,))
    model = convert(calibrated(toy(), 8, recipe), progress=False)
    found = [each for each in culprits(model) if each.kind == "feature"]
    assert found and not any(each.broken for each in found)
    for each in found:
        gains = dict(each.fixes)
        assert list(gains) == ["rows at 8 bits", "exact rows"]
        assert -20 * math.log10(0.2) < each.sqnr < -20 * math.log10(0.01)  # of 15 steps
    # 4 bits of what every block adds weigh more than 8 bits of its layers' weights
    best = max(found, key=lambda each: each.gain)
    assert best.fix is not None and best.fix[0] == "rows at 8 bits" and best.gain > 0.1


def test_products_and_layers_without_a_known_weight_get_the_fixes_that_can_be_built():
    model = lossy("q-diffusion-w8a8")
    given = examples(model, 1)
    errors = site_errors(captured(), model.gm, given, KEYS)
    kept = [e for e in errors if e.part.name in ("einsum", "conv_out")]
    kept[1] = dataclasses.replace(kept[1], rebuilt=False, note="no fix can be built: n")
    found = find_culprits(
        model.gm,
        kept,
        [],
        steps=torch.cat([t for _, t in given]),
        timesteps=KEYS,
        measure_at=lambda _: measure,
    )
    fixes = {each.name: [what for what, _ in each.fixes] for each in found}
    assert fixes == {"einsum": ["operands in float"], "conv_out": ["input in float"]}
    assert next(e for e in found if e.name == "conv_out").note == "no fix can be built: n"


def test_outputs_that_are_not_finite_count_as_noise():
    model = copy.deepcopy(lossy())
    model.gm.get_submodule("conv_out").bias[0] = math.nan
    first = culprits(model)[0]
    assert first.name == "conv_out" and first.broken
    assert first.fix == (AGAIN, math.inf)
    assert dict(first.fixes)["input in float"] == 0  # which leaves the bias
