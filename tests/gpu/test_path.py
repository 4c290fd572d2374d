"""The whole way on the device: prepare, calibrate, convert, compile, save, load."""

import copy

import pytest
import torch

from tests import zoo
from tests.gpu.models import (
    DEVICE,
    DTYPES,
    NAMES,
    calibrated,
    calls,
    check_near,
    converted,
    exact,
    moved,
    source,
    told,
)
from tests.test_end_to_end import steps_of
from tfmq_fx import compile, fold_timesteps, load, report, save
from tfmq_fx.backends.cuda import autotune

RECIPES = ("w8a8", "w4a8", "fp8")
EVERY = [(name, dtype, recipe) for name in NAMES for dtype in DTYPES for recipe in RECIPES]
COMPILED = [case for case in EVERY if case[1] == torch.bfloat16 or case[2] == "w8a8"]


@pytest.fixture
def forced(monkeypatch):
    """Kernels run every layer that they can, whatever they take: tiny layers lose to floats."""
    monkeypatch.setattr(autotune, "timed_chooser", lambda device: autotune.untimed_choice)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_capture_answers_as_the_model(name, dtype):
    prepared = calibrated(name, dtype)
    assert prepared.device.type == DEVICE and prepared.dtype == dtype
    for given in calls(name, dtype, 3, seed=5):
        assert torch.equal(told(prepared, given), told(source(name, dtype), given))


@pytest.mark.parametrize("name, dtype, recipe", EVERY)
def test_eager_is_on_the_device_what_it_is_on_the_cpu(name, dtype, recipe):
    done = converted(name, dtype, recipe)
    facts = report(done)
    assert facts.weight_coverage == facts.activation_coverage == 1.0
    assert {t.device.type for t in done.tensors()} == {DEVICE}
    there = copy.deepcopy(done).to("cpu")
    assert {t.device.type for t in there.tensors()} == {"cpu"}
    for given in calls(name, dtype, 3, seed=7):
        reference = told(there, moved(given, "cpu"))
        found = told(done, given)
        check_near(exact(name, dtype, given), reference, found, dtype=dtype, recipe=recipe)


def check_compiled(name, dtype, recipe):
    done = converted(name, dtype, recipe)
    compiled = compile(done, "inductor")
    for given in calls(name, dtype, 2, seed=8):
        found = told(compiled, given)
        check_near(exact(name, dtype, given), told(done, given), found, dtype=dtype, recipe=recipe)
    return compiled


@pytest.mark.parametrize("name, dtype, recipe", COMPILED)
def test_kernels_answer_as_eager_does(name, dtype, recipe, forced, kernels):
    compiled = check_compiled(name, dtype, recipe)
    assert compiled.lowered > 0
    # the input of the first layer has 16 bits
    assert all("16 bits" in reason for _, reason in compiled.declined), compiled.declined
    assert len(compiled.declined) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_with_nan_in_an_input_is_nan(name, forced, kernels):
    compiled = compile(converted(name, torch.bfloat16, "w8a8"), "inductor")
    given = next(iter(calls(name, torch.bfloat16, 2, seed=8)))
    image = next(v for v in given.values() if isinstance(v, torch.Tensor) and v.dim() > 2)
    image[1].view(-1)[0] = float("nan")
    found = told(compiled, given)
    assert found[1].isnan().all() and found[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_chosen_by_trial_answers_as_eager_does(name, kernels):
    compiled = check_compiled(name, torch.bfloat16, "w8a8")
    for _, reason in compiled.declined:
        assert "16 bits" in reason or "us, the kernels" in reason


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_saved_and_loaded_models_are_the_same(name, recipe, tmp_path):
    done = converted(name, torch.bfloat16, recipe)
    save(done, tmp_path / "model")
    loaded = load(tmp_path / "model").to(DEVICE)
    before, after = done.gm.state_dict(), loaded.gm.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = value.dtype == after[key].dtype and torch.equal(value, after[key])
        assert same and after[key].device.type == DEVICE, key
    for given in calls(name, torch.bfloat16, 2, seed=9):
        assert torch.equal(told(loaded, given), told(done, given))


def test_a_loaded_model_compiles(tmp_path, forced, kernels):
    name, dtype, recipe = "dit-xl-2", torch.bfloat16, "w4a8"
    done = converted(name, dtype, recipe)
    save(done, tmp_path / "model")
    loaded = load(tmp_path / "model").to(DEVICE)
    compiled, expected = compile(loaded), compile(done)
    assert compiled.backend == "inductor" and compiled.lowered == expected.lowered > 0
    for given in calls(name, dtype, 2, seed=9):
        assert torch.equal(told(compiled, given), told(expected, given))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_are_exact_at_batch_1(name, dtype):
    model = source(name, dtype)
    steps = [int(step) for step in steps_of(name)]
    folded = fold_timesteps(model, steps, zoo.inputs(name, model))
    for given in calls(name, dtype, 1, seed=11):
        assert torch.equal(told(folded, given), told(model, given))
