"""Models between devices: they move alone, and what does not fit is told."""

import copy

import pytest
import torch

from tests.converted import KEYS, lossy, toy
from tests.gpu.models import DEVICE, check_near, converted, moved, source
from tests.test_api import data
from tfmq_fx import ConfigError, InputError, prepare
from tfmq_fx.quant.timestep_lookup import timestep_row

elsewhere = pytest.mark.skipif(DEVICE == "cpu", reason="there is one device")


def placed(model):
    """Where everything of a model lies."""
    named = [*model.gm.named_parameters(), *model.gm.named_buffers()]
    return {t.device.type for _, t in named} | {model.timesteps.device.type}


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "fp8", "best", "q-diffusion"])
def test_a_converted_model_moves_alone_and_back(recipe):
    done = copy.deepcopy(lossy(recipe))
    before = {name: value.clone() for name, value in done.gm.state_dict().items()}
    expected = [toy()(x, t) for x, t in data(8, seed=3)]
    reference = [done(x, t) for x, t in data(8, seed=3)]
    assert done.to(DEVICE) is done and placed(done) == {DEVICE}
    assert {t.device.type for t in (*toy().parameters(), *toy().buffers())} == {"cpu"}
    assert placed(lossy(recipe)) == {"cpu"}
    found = [done(x.to(DEVICE), t.to(DEVICE)) for x, t in data(8, seed=3)]
    for full, quantized, here in zip(expected, reference, found, strict=True):
        assert here.device.type == DEVICE
        check_near(full, quantized, here.cpu(), dtype=torch.float32, recipe=recipe)
    done.to("cpu")
    after = done.gm.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for (x, t), given in zip(data(8, seed=3), reference, strict=True):
        assert torch.equal(done(x, t), given)


def test_timesteps_may_come_from_anywhere():
    done = copy.deepcopy(lossy()).to(DEVICE)
    (x, t), *_ = data(8)
    x = x.to(DEVICE)
    expected = done(x, t.to(DEVICE))
    for form in (t, t[0], t[:1], int(t[0])):
        assert torch.equal(done(x, form), expected)


@elsewhere
def test_inputs_on_another_device_are_refused():
    done = copy.deepcopy(lossy()).to(DEVICE)
    (x, t), *_ = data(8)
    with pytest.raises(InputError, match="Move the input or the model"):
        done(x, t)


@elsewhere
def test_a_prepared_model_stays_where_it_is():
    prepared = prepare(toy(), data(8)[0], config="w8a8")
    with pytest.raises(ConfigError, match="stays as it was captured"):
        prepared.to(DEVICE)


def test_an_unknown_timestep_never_passes_silently():
    done = copy.deepcopy(lossy()).to(DEVICE)
    (x, t), *_ = data(8)
    done.forget_source()
    with pytest.raises(InputError, match="7 is not among"):
        done(x.to(DEVICE), torch.full_like(t, 7).to(DEVICE))
    if DEVICE == "cpu":
        return
    table = torch.randn(len(KEYS), 5, device=DEVICE)
    keys = KEYS.sort().values.to(DEVICE)
    rows = timestep_row(table, keys, torch.tensor([7, int(keys[1])], device=DEVICE))
    assert rows[0].isnan().all() and torch.equal(rows[1], table[1])


@elsewhere
def test_a_model_converted_on_the_device_runs_on_the_cpu():
    done = converted("dit-xl-2", torch.float32, "w8a8")
    copied = copy.deepcopy(done).to("cpu")
    assert placed(copied) == {"cpu"} and placed(done) == {DEVICE}
    first = next(iter(done.call.inputs))
    assert first.device == DEVICE and next(iter(copied.call.inputs)).device == "cpu"
    assert {p.device.type for p in source("dit-xl-2", torch.float32).parameters()} == {DEVICE}


def test_inputs_are_moved_by_the_helpers_as_they_say():
    given = {"a": torch.zeros(1, dtype=torch.bfloat16), "b": {"c": torch.zeros(1).long()}, "d": 3}
    found = moved(given, "cpu", torch.float32)
    assert found["a"].dtype == torch.float32 and found["b"]["c"].dtype == torch.int64
    assert found["d"] == 3
