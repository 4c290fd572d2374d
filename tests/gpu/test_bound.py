"""Models bound to the request on the device: prologue weights wait on the host."""

import gc
import re

import pytest
import torch

from tests.gpu.models import DEVICE, calls, converted, moved, source, told
from tests.prologue.bound.toys import STEPS, conditional, draw
from tests.test_end_to_end import steps_of
from tfmq_fx import ConfigError, InputError, bind_request, convert, load, prepare, save
from tfmq_fx.core.config import PrologueSpec

elsewhere = pytest.mark.skipif(DEVICE == "cpu", reason="there is one device")
AWAY = "none" if DEVICE == "cpu" else "cpu"
NAME, DTYPE = "dit-xl-2", torch.bfloat16


def given(**options):
    return moved(draw(**options), DEVICE)


@pytest.mark.parametrize("on_miss", ["compute", "error"])
@pytest.mark.parametrize("schedule", [None, STEPS])
def test_answers_are_those_of_the_model_bit_for_bit(on_miss, schedule):
    model = conditional().to(DEVICE)
    found = bind_request(model, schedule, given(), offload=AWAY, on_miss=on_miss)
    for prompt in (0, 1, 0):
        conditions = given(seed=prompt)
        for step in STEPS:
            values = {**conditions, "t": torch.full_like(conditions["t"], step)}
            assert torch.equal(found(**values), model(**values))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_quantized_answers_are_the_same(batch):
    done = converted(NAME, DTYPE, "w8a8")
    expected = [(v, told(done, v)) for seed in (0, 1, 0) for v in calls(NAME, DTYPE, batch, seed)]
    found = bind_request(done, list(steps_of(NAME)), offload=AWAY, on_miss="error")
    try:
        for values, answer in expected:
            assert torch.equal(told(found, values), answer)
    finally:
        found.unbound()  # `converted` is shared: its weights return


@elsewhere
def test_weights_of_the_prologue_leave_the_device():
    model = source(NAME, DTYPE)
    prepared = prepare(model, next(calls(NAME, DTYPE)), config="w8a8-dynamic", timesteps=[999, 250])
    bound = bind_request(convert(prepared, progress=False), offload="cpu")
    values = next(calls(NAME, DTYPE, 2, seed=1))
    freed, every = bound.prologue.offloaded.nbytes(), bound.nbytes()
    assert freed > 0.2 * every  # 40 % of the published widths
    gc.collect()
    before = torch.cuda.memory_allocated()
    bound(**values)
    bound(**values)
    gc.collect()
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated()
    assert bound.prologue.offloaded.is_away
    assert {t.device.type for t in bound.prologue.offloaded.tensors.values()} == {"cpu"}
    assert {t.device.type for t in bound.step.buffers()} == {DEVICE}
    kept = bound.prologue.nbytes()
    slack = 512 * 200  # the allocator rounds each value kept up
    assert after <= before - freed + kept + slack
    assert bound.resident_bytes() == every - freed + kept
    bound.to("cpu")
    assert {t.device.type for t in bound.tensors()} == {"cpu"}


@elsewhere
def test_a_new_request_gets_its_own_values_with_weights_away():
    model = conditional().to(DEVICE)
    found = bind_request(model, STEPS, given(), offload="cpu", capacity=1)
    for seed in range(4):
        values = given(seed=seed)
        assert torch.equal(found(**values), model(**values))
        assert found.prologue.offloaded.is_away
    values["y"].add_(1).remainder_(10)  # in place: the same object, another label
    assert torch.equal(found(**values), model(**values))


@elsewhere
def test_what_is_for_the_host_is_refused():
    model = conditional().to(DEVICE)
    with pytest.raises(ConfigError, match="Use offload='cpu'"):
        bind_request(model, STEPS, given(), offload="disk")


def test_a_timestep_outside_the_schedule_never_passes_silently():
    model = conditional().to(DEVICE)
    found = bind_request(model, STEPS, given(), on_miss="error")
    values = given(t=3)
    try:
        answer = found(**values)
    except InputError as error:  # where the timestep is on the host
        told = rf"t: 3(\.0)? is not among the {len(STEPS)} timesteps of the schedule"
        assert re.match(told, str(error))
    else:  # where looking at it would make the device wait
        assert DEVICE != "cpu" and answer.isnan().all()
    values = given(t=STEPS[1])
    assert torch.equal(found(**values), model(**values))


def test_saved_with_its_prologue(tmp_path):
    done = converted(NAME, DTYPE, "w8a8")
    bound = bind_request(done, offload=AWAY, on_miss="error")
    save(bound, tmp_path / "model")
    expected = [(v, told(done, v)) for v in calls(NAME, DTYPE, 2, seed=3)]
    loaded = load(tmp_path / "model").to(DEVICE)
    assert loaded.spec == PrologueSpec(offload=AWAY, on_miss="error")
    loaded.set_timesteps(list(steps_of(NAME)))
    for values, answer in expected:
        assert torch.equal(told(loaded, values), answer)
    assert loaded.prologue.offloaded.is_away == (DEVICE != "cpu")
