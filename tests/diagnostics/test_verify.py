"""verification: exact models are proved equal, planted faults are found and named first."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from tests.converted import lossy as converted
from tests.converted import spoil
from tests.diagnostics.test_random_inputs import Looks, looks_example
from tests.test_api import TIMES, data
from tests.toys import NestedOutput, ToyDiT, ToyUNet, seeded, tiny_unet2d
from tfmq_fx import ConfigError, compile, convert, fold_timesteps, prepare, verify
from tfmq_fx.api import bind_request
from tfmq_fx.conversion.models import Converted
from tfmq_fx.core.presets import resolve
from tfmq_fx.diagnostics.verification_result import EXACT_ELSEWHERE
from tfmq_fx.diagnostics.verify import graph_of


@pytest.fixture(scope="module")
def toy():
    return seeded(ToyUNet).eval()


@pytest.fixture(scope="module")
def folded(toy):
    return fold_timesteps(toy, TIMES, data(8)[0])


@pytest.fixture(scope="module")
def lossy():
    return converted()


@pytest.fixture(scope="module")
def lossy_check(toy, lossy):
    return verify(toy, lossy)


@pytest.fixture(scope="module")
def dit():
    return seeded(ToyDiT).eval()


@pytest.fixture(scope="module")
def folded_dit(dit):
    example = torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 4])
    return fold_timesteps(dit, 4, example)


def test_an_exact_model_passes_with_equality(toy, folded):
    found = verify(toy, folded)
    assert found.exact and found.equal and found.ok
    assert found.difference[0] == 0 and found.difference[1] <= EXACT_ELSEWHERE
    assert found.steps == dict.fromkeys(map(float, TIMES), math.inf) and found.pooled == math.inf
    assert all(mean == most == 0 for _, mean, most, _ in found.features)
    assert len(found.features) > 0 and found.sites == found.culprits == found.changed == []
    assert str(found).startswith("exact model, ok: batch 1 equal bit for bit")


def test_verifying_changes_nothing(toy, lossy):
    before = {k: v.clone() for k, v in lossy.state_dict().items()}
    code, random = lossy.gm.code, torch.get_rng_state()
    verify(toy, lossy)
    assert all(torch.equal(v, before[k]) for k, v in lossy.state_dict().items())
    assert list(before) == list(lossy.state_dict()) and lossy.gm.code == code
    assert torch.equal(random, torch.get_rng_state()) and lossy.gm.meta["timesteps"] is not None


# ---------------------------------------------------------------------------- planted faults


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
    (culprit,) = found.culprits
    assert (culprit.name, culprit.kind, culprit.timestep) == ("up2.time", "feature", 250.0)
    assert culprit.broken and culprit.note == "at t=250 it has the row of t=999"
    lines = str(found).splitlines()
    assert "NOT OK: batch 1 differs by" in lines[0]
    assert lines[1].startswith("output SQNR ") and "worst steps: t=250 " in lines[1]
    assert lines[3].split()[:3] == ["feature", "up2.time", "BROKEN"]
    assert lines[3].endswith("  at t=250 it has the row of t=999")


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
    assert len([1 for _, _, most, _ in found.features if most > 0]) == len(found.features) == 6
    assert {each.name for each in found.culprits[:6]} == {name for name, *_ in found.features}
    assert all("the row of t=250" in each.note for each in found.culprits[:6]) and not found.ok


@pytest.mark.parametrize("name", ["down2.conv1", "conv_out"])
def test_a_scale_off_by_two_is_caught_and_its_layer_named_first(toy, lossy, lossy_check, name):
    faulty = copy.deepcopy(lossy)
    faulty.gm.get_submodule(name).weight_scale.mul_(2)
    found = verify(toy, faulty)
    assert not found.ok and found.sites[0][0] == name
    # the product is doubled: the error is as large as the signal less its bias, around 0 dB
    assert found.sites[0][1] < 10 < found.sites[1][1]
    first = found.culprits[0]
    assert (
        first.name == name
        and first.broken
        and first.note == "its weights give 2 times what they should"
    )
    assert [each.name for each in found.culprits if each.broken] == [name]
    assert str(found).splitlines()[4].split()[:3] == ["layer", name, "BROKEN"]
    others = {n: v for n, v, _ in lossy_check.sites if n != name}
    # every layer is judged on the reference's inputs, so no other one is blamed
    assert {n: v for n, v, _ in found.sites if n != name} == others
    # as the model runs, what comes before is as it was, and all behind is worse
    before, after = ([(n, v) for n, v, _ in each.running] for each in (lossy_check, found))
    place = [n for n, _ in before].index(name)
    assert after[:place] == before[:place] and after[place][1] < before[place][1] - 10


def test_an_input_range_that_clips_is_caught_and_its_layer_named_first(toy, lossy):
    faulty = copy.deepcopy(lossy)
    spoil(faulty, "down2.conv1", "input", 1 / 16)
    found = verify(toy, faulty)
    assert not found.ok and [each.name for each in found.culprits if each.broken] == ["down2.conv1"]
    assert found.culprits[0].note.endswith("dB more noise than its rounding explains")


# ---------------------------------------------------------------------------- lossy models


def test_a_lossy_model_reports_finite_figures(lossy_check, lossy):
    found = lossy_check
    assert not found.exact and not found.equal and found.ok
    assert list(found.steps) == [0.0, 250.0, 999.0]
    assert all(15 < value < 60 for value in found.steps.values())
    assert min(found.steps.values()) <= found.pooled <= max(found.steps.values())
    assert len(found.sites) == 21 and found.sites == sorted(found.sites, key=lambda s: s[1])
    assert all(math.isfinite(value) and t in found.steps for _, value, t in found.sites)
    assert all(most == 0 for _, _, most, _ in found.features)  # exact tables
    assert len(found.culprits) == 10 and not any(each.broken for each in found.culprits)
    assert found.changed == [] and str(found).startswith("lossy model, ok")
    assert found.running[0][0] == "conv_in"
    assert {name for name, *_ in found.running} == {name for name, *_ in found.sites}
    alone = {name: value for name, value, _ in found.sites}
    name, value, t = found.running[-1]  # the output's own layer, with all errors before it
    assert name == "conv_out" and value == found.steps[t] < alone[name]


def test_a_threshold_decides(toy, lossy, lossy_check):
    threshold = lossy_check.pooled + 0.1
    found = verify(toy, lossy, threshold=threshold)
    assert not found.ok and found.pooled == lossy_check.pooled
    assert f"asked for {threshold:g}" in str(found)
    assert dataclasses.replace(found, threshold=threshold - 0.2).ok
    assert len(found.culprits) == 10


def test_inputs_may_be_given(toy, lossy):
    found = verify(toy, lossy, [(x[:3], t[:3]) for x, t in data(8)[:2]])
    assert list(found.steps) == [0.0, 250.0] and found.ok
    with torch.no_grad():
        x, t = data(8)[1]
        expected, value = toy(x[:3], t[:3]), lossy(x[:3], t[:3])
    power = (float(v.double().square().sum()) for v in (expected, expected - value))
    ratio = 10 * math.log10(next(power) / next(power))
    assert found.steps[250.0] == pytest.approx(ratio, abs=1e-4)  # float32 differences


def test_a_compiled_model_is_judged_by_its_outputs(toy, lossy, lossy_check):
    found = verify(toy, compile(lossy, "eager"))
    assert not found.exact and found.ok and found.sites == found.features == found.culprits == []
    assert found.steps == lossy_check.steps


def test_outputs_that_are_not_finite_are_not_ok(toy, lossy):
    faulty = copy.deepcopy(lossy)
    with torch.no_grad():
        faulty.gm.conv_out.bias[0] = math.nan
    found = verify(toy, faulty)
    assert not found.ok and found.culprits[0].name == "conv_out" and found.culprits[0].broken
    assert not dataclasses.replace(found, threshold=-1000.0).ok


def test_parameters_that_are_not_the_references_are_named(toy, lossy):
    other = copy.deepcopy(toy)
    with torch.no_grad():
        other.norm_out.weight.mul_(1.001)
        other.mid1.norm1.bias.add_(0.001)
    found = verify(other, lossy)
    assert found.changed == ["mid1.norm1.bias", "norm_out.weight"] and not found.ok
    assert "not the reference's: mid1.norm1.bias, norm_out.weight" in str(found)


# ---------------------------------------------------------------------------- conditions


def calls(model, monkeypatch, *args, **options):
    """Timesteps and labels of every call that `verify` makes of `model`."""
    seen = []
    run = type(model).run

    def watched(self, values):
        seen.append([v.tolist() for v in values[1:]])
        return run(self, values)

    monkeypatch.setattr(type(model), "run", watched)
    found = verify(*args, model, **options)
    return seen, found


def test_an_exact_model_sees_every_condition_at_every_timestep(dit, folded_dit, monkeypatch):
    seen, found = calls(folded_dit, monkeypatch, dit, conditions=3, seed=1)
    single = [(t[0], y[0]) for t, y in seen if len(t) == 1]
    labels = list(dict.fromkeys(y for _, y in single))
    assert found.ok and found.exact and len(labels) == 3 and max(labels) < 10
    assert single == [(t, y) for y in labels for t in range(4)]
    wide = [(t, y) for t, y in seen if len(t) == 8]
    assert len(wide) == 2 and any(len(set(t)) > 1 for t, _ in wide)  # mixed timesteps


def test_a_lossy_model_takes_conditions_in_turn(dit, monkeypatch):
    example = torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 4])
    recipe = resolve("w8a16")
    nearest = dataclasses.replace(recipe.reconstruction, rounding="nearest")
    recipe = dataclasses.replace(recipe, reconstruction=nearest)
    model = convert(prepare(dit, example, timesteps=4, config=recipe), progress=False)
    seen, found = calls(model, monkeypatch, dit, conditions=3, seed=1)
    ((steps, labels),) = seen  # all at once
    assert not found.exact and found.ok and steps == [0, 1, 2, 3]
    assert len(set(labels[:3])) == 3 and labels[3] == labels[0]


def test_an_error_that_only_some_conditions_meet_is_found(dit, folded_dit):
    faulty = copy.deepcopy(folded_dit)
    (name,) = [n for n, m in faulty.gm.named_modules() if isinstance(m, nn.Embedding)]
    weight = faulty.gm.get_submodule(name).weight
    faulty.gm.get_submodule(name).weight = nn.Parameter(weight.detach().clone(), False)
    with torch.no_grad():
        faulty.gm.get_submodule(name).weight[6] += 0.01
    assert verify(dit, faulty, conditions=1).equal  # another label is drawn
    found = verify(dit, faulty, conditions=40)
    assert not found.ok and found.changed == [f"{name}.weight"]


def test_inputs_without_a_batch_are_drawn_too():
    reference = seeded(Looks).eval()
    model = fold_timesteps(reference, 3, looks_example())
    assert [spec.shape[0] for spec in model.call.inputs if spec.name in ("flag", "scale")] == [1, 4]
    found = verify(reference, model, conditions=3)
    # such conditions cannot be joined: a larger batch has one of them
    assert found.ok and found.difference[1] <= EXACT_ELSEWHERE


def test_inputs_in_dicts_and_lists_are_drawn_too():
    reference = seeded(NestedOutput).eval()
    extra = {"shift": torch.randn(2, 4), "more": [torch.randn(2, 4)]}
    example = {"x": torch.randn(2, 4), "t": torch.tensor([1, 2]), "extra": extra, "scale": 2.0}
    model = fold_timesteps(reference, 3, example)
    assert [spec.path for spec in model.call.inputs] == ["x", "t", "extra.shift", "extra.more.0"]
    assert verify(reference, model).ok


# ---------------------------------------------------------------------------- bound models


def test_bound_models_are_verified_as_they_run(dit, folded_dit):
    example = torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 4])
    found = verify(dit, bind_request(dit, torch.arange(4), example, offload="disk"))
    assert found.ok and found.exact and list(found.steps) == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="no finite set of timesteps"):
        verify(dit, bind_request(dit, None, example))


def test_weights_that_are_away_are_looked_at_where_they_were(folded_dit):
    model = bind_request(folded_dit, torch.arange(4), offload="disk")
    with torch.no_grad():
        model(torch.randn(1, 3, 8, 8), torch.tensor([1]), torch.tensor([3]))
    assert model.prologue.offloaded.is_away
    assert graph_of(model) is model.gm and not model.prologue.offloaded.is_away
    assert graph_of(folded_dit) is folded_dit.gm and isinstance(folded_dit, Converted)


# ---------------------------------------------------------------------------- what is refused


def test_other_seeds_and_batches_are_possible(toy, folded):
    assert verify(toy, folded, batch=2, seed=5).ok
    for options in ({"batch": 0}, {"conditions": 0}):
        with pytest.raises(ConfigError, match="must be a whole number, at least 1, got 0"):
            verify(toy, folded, **options)


def test_a_model_of_other_inputs_is_refused(folded):
    with pytest.raises(ConfigError, match="forward has no 'x', 't'; it takes sample, timestep"):
        verify(tiny_unet2d(), folded)


def test_a_model_of_other_outputs_is_refused(folded):
    other = seeded(ToyUNet).eval()
    other.conv_out = nn.Conv2d(16, 5, 3, padding=1)
    with pytest.raises(
        ConfigError, match=r"outputs of shapes \[\(1, 5, 8, 8\)\], the model of \[\(1, 3, 8, 8\)\]"
    ):
        verify(other, folded)


def test_a_reference_that_gives_nothing_to_compare_with_is_refused(toy, folded):
    other = copy.deepcopy(toy)
    with torch.no_grad():
        other.conv_out.bias[0] = math.nan
    with pytest.raises(ConfigError, match="the reference itself gives NaN or Inf at t=0"):
        verify(other, folded)


def test_a_model_without_a_finite_set_is_refused(toy):
    bound = bind_request(toy, None, data(8)[0])
    with pytest.raises(ConfigError, match="no finite set of timesteps to verify over"):
        verify(toy, bound)
    with pytest.raises(ConfigError, match="not a Prepared"):
        verify(toy, prepare(toy, data(8)[0]))


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
