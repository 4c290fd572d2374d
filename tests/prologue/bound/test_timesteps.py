"""Timesteps of any kind and number, and how much is computed for them."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from tests.adapters import Denoiser
from tests.prologue.bound.toys import STEPS, TC, C, T, bound, captured, check, computed, draw, of
from tests.toys import seeded
from tfmq_fx import (
    PRESETS,
    InputError,
    bind_request,
    calibrate,
    convert,
    fold_timesteps,
    prepare,
    refresh,
)
from tfmq_fx.prologue import prologue as prologue_module


def test_a_timestep_in_any_form() -> None:
    found = bound(STEPS)
    for t in (500, torch.tensor(500), torch.tensor([500]), torch.tensor([500, 500]), 500.0):
        assert torch.equal(found(**draw() | {"t": t}), of(draw()))
    assert computed(found)[TC] == len(STEPS)


def test_no_timestep_is_nan_and_infinity_is_one() -> None:
    model = captured()[0]
    found = bind_request(model, example_inputs=draw(t=[0.5, 0.5]))
    with pytest.raises(InputError, match="t: NaN is no timestep"):
        found(**draw(t=[0.5, float("nan")]))
    for t in ([float("inf")] * 2, [float("inf"), 0.5], [-float("inf")] * 2):
        values = draw(t=t)
        assert torch.allclose(found(**values), model(**values), rtol=0, atol=0, equal_nan=True)
    for t in ([0.5, 0.5], [0.1, 0.7], [-0.0, 0.0], [1e-45, 1e38]):
        check(found, draw(t=t))


@pytest.mark.parametrize("mix", [0.0, 0.02, 0.5])
def test_each_sample_at_its_own_timestep(mix: float) -> None:
    model, source = captured(mix=mix) if mix else captured()
    found = bind_request(source, STEPS)
    for t in ([500, 500, 500], [999, 0, 250], [0, 0, 999], [1, 2, 3], [999, 5, 999], [500, 500, 0]):
        values = draw(3, 0, t)
        check(found, values, model)
    mixes = {p.part.conditions: p.mixes for p in found.prologue.parts if p.part.stepped}
    assert mixes == {(): False, ("y",): bool(mix)}


def test_more_timesteps_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prologue_module, "_MOST_ROWS", 4)
    found = bound()
    for t in ([1, 2], [2, 3], [4, 1], [5, 4], [1, 1], [5, 6], [5, 5]):
        check(found, draw(t=t))
        assert all(len(p.entries[0].index) <= 4 for p in found.prologue.parts if p.part.stepped)
    found.set_timesteps(STEPS)  # longer than that: it counts as it is
    check(found, draw(t=0))
    check(found, draw(t=[1, 0]))


def test_rows_of_timesteps_that_never_repeat_do_not_outgrow_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prologue_module, "_FEW_ROWS", 1)
    found = bound()
    weights = found.prologue.offloaded.nbytes()
    most = [max(1, weights // (64 * p.part.step_bytes)) for p in found.prologue.parts]
    assert max(most) < 100
    for t in range(150):
        check(found, draw(64, t=t))
        for kept, room in zip(found.prologue.parts, most, strict=True):
            assert not kept.part.stepped or len(kept.entries[0].index) <= room
    found.set_timesteps(range(300))  # what was asked for is kept
    check(found, draw(64, t=299))
    assert {len(p.entries[0].index) for p in found.prologue.parts if p.part.stepped} == {300}


def test_without_waiting_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a schedule is all there is, timesteps stay on their device; one outside gives NaN."""
    monkeypatch.setattr(prologue_module, "_is_remote", lambda t: True)
    found = bound(STEPS, on_miss="error")
    for t in (500, 0, [999, 0], [250, 250]):
        check(found, draw(t=t))
    out = found(**draw(t=[999, 7]))
    assert out[1].isnan().all() and torch.equal(out[0], of(draw(t=[999, 0]))[0])
    model, source = captured(mix=0.5)
    found = bind_request(source, STEPS, on_miss="error")
    for t in (500, [999, 0]):
        check(found, draw(t=t), model)


def test_outside_the_schedule() -> None:
    found = bound(STEPS, on_miss="error")
    check(found, draw(t=500))
    with pytest.raises(InputError, match="t: 7 is not among the 5 timesteps of the schedule"):
        found(**draw(t=[500, 7]))
    with pytest.raises(InputError, match="t: 7 is not"):
        found(**draw(seed=3, t=7))
    check(found, draw(seed=3))
    found.set_timesteps([7])
    check(found, draw(t=7))
    found.set_timesteps(None)
    check(found, draw(t=8))
    check(bound(STEPS), draw(t=7))


def test_each_step_is_computed_once() -> None:
    found = bound(STEPS)
    assert computed(found) == {T: 0, TC: 0, C: 0}
    for prompt in (1, 2):
        for i, step in enumerate(STEPS):
            check(found, draw(seed=0, t=step) | {"y": torch.tensor([prompt, 3])})
            assert computed(found) == {T: len(STEPS), TC: prompt * len(STEPS), C: 1}, i


def test_the_second_request_takes_the_steps_of_the_first() -> None:
    found = bound()
    for i, step in enumerate(STEPS[:3]):
        found(**draw(seed=1, t=step))
        assert computed(found) == {T: i + 1, TC: i + 1, C: 1}
    for step in STEPS[:3]:
        found(**draw(seed=2, t=step))
        assert computed(found) == {T: 3, TC: 6, C: 2}


def test_a_condition_that_never_stays_costs_one_row_a_call() -> None:
    found = bound(50)
    for i in range(12):
        check(found, draw(t=i) | {"y": torch.tensor([i % 10, i // 10])})
    assert computed(found)[TC] <= 3 * 50 + 9
    for step in range(50):  # and one that does costs its rows again
        found(**draw(t=step))
    before = computed(found)[TC]
    found(**draw(seed=5, t=0))
    assert computed(found)[TC] == before + 50


def test_setting_the_schedule_computes_at_once() -> None:
    found = bound()
    check(found, draw(t=1))
    found.set_timesteps(STEPS)
    assert computed(found) == {T: 1 + len(STEPS), TC: 1 + len(STEPS), C: 1}
    check(found, draw(t=0))
    assert computed(found)[TC] == 1 + len(STEPS)


@pytest.mark.parametrize("recipe", ["fp", "w8a8-dynamic", "cache"])
def test_what_a_table_lacks_is_computed_from_the_source_or_refused(recipe: str) -> None:
    """Whatever part of the graph holds the table by now, no other timestep's row is read."""
    source = seeded(Denoiser).eval()
    x, steps = torch.randn(2, 4), [999.0, 500.0, 20.0, 1.0]
    temporal = dataclasses.replace(PRESETS["w8a8-dynamic"].temporal, mode="cache")
    config = dataclasses.replace(PRESETS["w8a8-dynamic"], temporal=temporal)
    example = (x, torch.tensor(steps[:2]))
    prepared = prepare(
        source, example, timesteps=steps, config=config if recipe == "cache" else recipe
    )
    model = convert(calibrate(prepared, [example], progress=False), progress=False)
    others = (500.5, 19.0, 1000.0)
    known = model(x, 500.0)
    found, living = copy.deepcopy(model), bind_request(model, steps)
    made = refresh(model, source, timesteps=[*steps, *others])
    found.forget_source()
    found = bind_request(found, steps)
    for step in others:
        t = torch.full((2,), step)
        assert torch.equal(living(x, t), made(x, t))
        living.set_timesteps([*steps, step])
        with pytest.raises(InputError, match=rf"t: {step} is not among .*refresh\(model, source"):
            found(x, t)
        with pytest.raises(InputError, match=r"temporal features .* not known here"):
            found.set_timesteps([*steps, step])
        assert torch.equal(found(x, torch.full((2,), 500.0)), known)  # and stays as it was
        assert torch.equal(living(x, torch.full((2,), 500.0)), known)
    made = refresh(found, source, timesteps=[*steps, 500.5])  # what the message says to do
    t = torch.full((2,), 500.5)
    exact = fold_timesteps(source, [500.5], example)(x, t)
    if recipe == "fp":
        assert torch.equal(made(x, t), exact)
    else:
        assert (made(x, t) - exact).norm() <= 0.03 * exact.norm()  # 30 dB: of 8-bit codes
