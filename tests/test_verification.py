"""verification: exact models are proved equal, planted faults are found and named first."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from tests.test_api import TIMES, calibrated, data, fast
from tests.toys import ToyUNet, seeded, tiny_unet2d
from tfmq_fx import ConfigError, Verification, compile, convert, fold_timesteps, prepare, verify
from tfmq_fx.capture import capture
from tfmq_fx.verification import EXACT_ELSEWHERE, temporal_errors


@pytest.fixture(scope="module")
def toy():
    return seeded(ToyUNet).eval()


@pytest.fixture(scope="module")
def folded(toy):
    return fold_timesteps(toy, TIMES, data(8)[0])


@pytest.fixture(scope="module")
def lossy(toy):
    return convert(calibrated(toy, 8, fast("w8a8", mode="table")), progress=False)


@pytest.fixture(scope="module")
def lossy_check(toy, lossy):
    return verify(toy, lossy)


@pytest.mark.parametrize("kind", ["toy", "unet"])
def test_an_exact_model_passes_with_equality(kind, toy, folded):
    reference = toy if kind == "toy" else tiny_unet2d()
    model = folded if kind == "toy" else fold_timesteps(reference, TIMES)
    found = verify(reference, model)
    assert found.exact and found.equal and found.ok
    assert found.difference[0] == 0 and found.difference[1] <= EXACT_ELSEWHERE
    assert found.steps == dict.fromkeys(map(float, TIMES), math.inf)
    assert all(mean == most == 0 for _, mean, most, _ in found.features)
    assert len(found.features) > 0 and found.sites == []
    assert str(found).startswith("exact model, ok: batch 1 equal bit for bit")


def test_verifying_changes_nothing(toy, folded):
    before = {k: v.clone() for k, v in folded.state_dict().items()}
    random = torch.get_rng_state()
    verify(toy, folded)
    assert all(torch.equal(v, before[k]) for k, v in folded.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and folded.gm.meta["timesteps"] is not None


def test_a_row_of_another_timestep_is_caught_and_its_feature_named_first(toy, folded):
    faulty = copy.deepcopy(folded)
    (start, stop) = _columns(faulty, "up2.time")
    with torch.no_grad():
        faulty.gm.temporal_table[1, start:stop] = folded.gm.temporal_table[2, start:stop]
    found = verify(toy, faulty)
    assert found.exact and not found.equal and not found.ok
    assert [t for t, value in found.steps.items() if value < math.inf] == [250.0]
    wrong = [(name, t) for name, _, most, t in found.features if most > 0]
    assert wrong == [("up2.time", 250.0)]
    lines = str(found).splitlines()
    assert "NOT OK: batch 1 differs by" in lines[0]
    assert lines[1].startswith("output SQNR, worst steps: t=250 ")
    assert lines[2].startswith("feature up2.time: error ") and lines[2].endswith("at t=250")


def _columns(model, feature):
    (node,) = [n for n in model.gm.graph.nodes if n.meta.get("feature") == feature]
    columns = node.args[1][1]
    return columns.start, columns.stop


def test_a_whole_row_of_another_timestep_is_caught(toy, lossy):
    faulty = copy.deepcopy(lossy)
    with torch.no_grad():
        faulty.gm.temporal_table[0] = lossy.gm.temporal_table[1]
    found = verify(toy, faulty)
    assert {t for _, _, most, t in found.features if most > 0} == {0.0}
    assert len([1 for _, _, most, _ in found.features if most > 0]) == len(found.features)


@pytest.mark.parametrize("name", ["down2.conv1", "attention.qkv", "conv_out"])
def test_a_scale_off_by_two_is_caught_and_its_layer_named_first(toy, lossy, lossy_check, name):
    faulty = copy.deepcopy(lossy)
    faulty.gm.get_submodule(name).weight_scale.mul_(2)
    found = verify(toy, faulty)
    assert found.sites[0][0] == name
    # the product is doubled: the error is as large as the signal less its bias, around 0 dB
    assert found.sites[0][1] < 10 < found.sites[1][1]
    assert f"layer {name}: " in str(found).splitlines()[2]
    others = {n: v for n, v, _ in lossy_check.sites if n != name}
    # every layer is judged on the reference's inputs, so no other one is blamed
    assert {n: v for n, v, _ in found.sites if n != name} == others


def test_a_lossy_model_reports_finite_figures(lossy_check, lossy):
    found = lossy_check
    assert not found.exact and not found.equal and found.ok
    assert list(found.steps) == [0.0, 250.0, 999.0]
    assert all(15 < value < 60 for value in found.steps.values())
    assert len(found.sites) == 21 and found.sites == sorted(found.sites, key=lambda s: s[1])
    assert all(math.isfinite(value) and t in found.steps for _, value, t in found.sites)
    assert all(most == 0 for _, _, most, _ in found.features)  # exact tables
    assert str(found).startswith("lossy model, ok")


def test_inputs_may_be_given(toy, lossy, lossy_check):
    inputs = [(x[:1], t[:1]) for x, t in data(8)[:2]]
    found = verify(toy, lossy, inputs)
    assert list(found.steps) == [0.0, 250.0]
    assert min(found.steps.values()) > min(lossy_check.steps.values())  # data it was made for


def test_a_compiled_model_is_judged_by_its_outputs(toy, lossy, lossy_check):
    found = verify(toy, compile(lossy, "eager"))
    assert not found.exact and found.ok and found.sites == [] and found.features == []
    assert found.steps == lossy_check.steps


def test_other_seeds_and_batches_are_possible(toy, folded):
    assert verify(toy, folded, batch=2, seed=5).ok


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


def test_what_ok_means():
    assert check().ok and check(difference=(0.0, 1e-5)).ok
    assert not check(equal=False).ok and not check(difference=(0.0, 1.1e-5)).ok
    assert not check(difference=(0.0, math.nan)).ok
    assert check(exact=False, equal=False, difference=(1.0, 1.0), steps={0.0: -3.0}).ok
    assert check(exact=False, steps={0.0: math.inf}).ok
    for value in (math.nan, -math.inf):  # NaN and infinite outputs
        assert not check(exact=False, steps={0.0: 30.0, 1.0: value}).ok


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_not_ok(toy, lossy, value):
    faulty = copy.deepcopy(lossy)
    with torch.no_grad():
        faulty.gm.conv_out.bias[0] = value
    assert not verify(toy, faulty).ok


def test_a_model_of_other_inputs_is_refused(folded):
    with pytest.raises(ConfigError, match="forward has no 'x', 't'; it takes sample, timestep"):
        verify(tiny_unet2d(), folded)


def test_a_model_without_a_finite_set_is_refused(toy):
    prepared = prepare(toy, data(8)[0])
    with pytest.raises(ConfigError, match="no finite set of timesteps to verify over"):
        verify(toy, prepared)


def test_temporal_errors_are_told_by_feature_and_timestep(toy, lossy):
    gm = capture(toy, dict(zip(("x", "t"), data(8)[0], strict=True)), timestep="t").gm
    names, errors = temporal_errors(gm, lossy.gm, lossy.timesteps)
    assert errors.shape == (len(names), 3) and not errors.any()
    cached = convert(calibrated(toy, 8, fast("w8a8", mode="cache")), progress=False)
    names, errors = temporal_errors(gm, cached.gm, cached.timesteps)
    # cached at 8 bits: half a step of a range that is at most 10 times the norm's mean
    assert (errors > 0).all() and (errors < 10 / 2**8).all()


def test_models_without_a_temporal_block_have_no_errors():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, t):
            return self.linear(x)

    model = seeded(Plain).eval()
    x, t = torch.randn(2, 4), torch.tensor([1, 1])
    folded = fold_timesteps(model, 3, (x, t))
    found = verify(model, folded)
    assert found.ok and found.features == []
