"""Schedules hold the timesteps that the model receives, and follow a scheduler."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.prologue.bound.toys import check, conditional, draw
from tfmq_fx import Bound, ConfigError, Converted, InputError, bind_request
from tfmq_fx.prologue.timestep_schedule import Schedule

# of diffusers itself
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
FLOW = diffusers.FlowMatchEulerDiscreteScheduler


def karras() -> Any:
    return diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)


def received(scheduler: Any, dtype: torch.dtype, divide: bool = False) -> list[float]:
    """What a model gets at each step from a pipeline that casts first."""
    steps = scheduler.timesteps.to(dtype)
    found: list[float] = (steps / 1000 if divide else steps).tolist()
    return found


# ---------------------------------------------------------------- given values


@pytest.mark.parametrize(
    "source, dtype, expected",
    [
        (4, torch.int64, [3, 2, 1, 0]),
        ([1, 5, 3], torch.int64, [5, 3, 1]),
        (torch.tensor([1, 5, 3]), torch.float32, [5.0, 3.0, 1.0]),
        (np.array([0.25, 0.5]), torch.float64, [0.5, 0.25]),
        ([5, 5, 3], torch.int64, [5, 3]),
        ([0.1], torch.float32, [torch.tensor(0.1).item()]),
        ([981, 982], torch.bfloat16, [984.0, 980.0]),
        ([993, 992], torch.bfloat16, [992.0]),
        (None, torch.int64, []),
    ],
)
def test_values_as_the_model_receives_them(source: Any, dtype: Any, expected: list[float]) -> None:
    found = Schedule(source, dtype)
    assert found.values() == found.values(meeting=[3]) == expected
    assert bool(found) == bool(expected)
    assert all(type(value) is type(expected[0]) for value in found.values())


@pytest.mark.parametrize(
    "source, dtype, message",
    [
        ([], torch.int64, "empty"),
        (0, torch.int64, "empty"),
        ([1.5], torch.int64, "cannot hold"),
        ([float("nan"), 1.0], torch.float32, "NaN or Inf"),
        ([float("inf")], torch.float32, "NaN or Inf"),
        ([1e6], torch.float16, "overflow"),
        (torch.ones(2, 2), torch.float32, "one-dimensional"),
        (True, torch.int64, "not a bool"),
        ("steps", torch.int64, "must be a number"),
        (torch.tensor([True]), torch.int64, "integers or floats"),
    ],
)
def test_values_that_cannot_be_used(source: Any, dtype: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(source, dtype)


# ---------------------------------------------------------------- schedulers


@pytest.mark.parametrize(
    "make",
    [
        diffusers.DDIMScheduler,
        diffusers.DDPMScheduler,
        diffusers.PNDMScheduler,
        diffusers.EulerDiscreteScheduler,
        karras,
        diffusers.EulerAncestralDiscreteScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.UniPCMultistepScheduler,
        diffusers.HeunDiscreteScheduler,
        diffusers.LCMScheduler,
        diffusers.TCDScheduler,
        diffusers.IPNDMScheduler,
        FLOW,
        diffusers.FlowMatchHeunDiscreteScheduler,
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_any_scheduler_is_followed(make: Any, dtype: torch.dtype) -> None:
    scheduler = make()
    followed = None
    for n in (8, 20, 5):
        scheduler.set_timesteps(n)
        steps = received(scheduler, dtype)
        if dtype is torch.int64 and steps != scheduler.timesteps.tolist():
            with pytest.raises(ConfigError, match=r"cannot be received as torch\.int64"):
                Schedule(scheduler, dtype)
            return
        followed = followed or Schedule(scheduler, dtype)
        assert followed.values() == sorted(set(steps), reverse=True)
    Schedule(make(), dtype if dtype is not torch.int64 else torch.float32)  # not set by anybody


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["raw", "share", "cast share", "from the end", "sigma"])
def test_the_form_in_which_timesteps_arrive_is_found(form: str, dtype: torch.dtype) -> None:
    scheduler = FLOW(shift=3.0)
    scheduler.set_timesteps(28)
    followed = Schedule(scheduler, dtype)

    def arriving() -> Tensor:
        raw = scheduler.timesteps
        return {
            "raw": raw.to(dtype),
            "share": (raw / 1000).to(dtype),
            "cast share": raw.to(dtype) / 1000,
            "from the end": ((1000 - raw) / 1000).to(dtype),
            "sigma": scheduler.sigmas[:-1].to(dtype),
        }[form]

    for n in (28, 4):
        scheduler.set_timesteps(n)
        steps = arriving().tolist()
        for step in steps:  # one after the other, as they are met
            assert step in followed.values(meeting=[step])
        last = {*followed.values()}
        # in short dtypes forms share values; the one that is right holds the last one met
        assert steps[-1] in last and len(last) <= n
        if form in ("raw", "cast share"):
            assert last == {*steps}
    assert followed.values(meeting=[12345.0]) == followed.values()


def test_a_scheduler_without_timesteps_is_no_set_yet() -> None:
    scheduler = diffusers.PNDMScheduler()
    assert scheduler.timesteps is None
    followed = Schedule(scheduler, torch.int64)
    assert not followed and followed.values(meeting=[3]) == []
    scheduler.set_timesteps(5)
    assert len(followed.values()) == len(set(scheduler.timesteps.tolist()))


def test_copies_and_pickles() -> None:
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(4)
    followed = Schedule(scheduler, torch.int64)
    for made in (copy.deepcopy(followed), pickle.loads(pickle.dumps(followed))):
        assert made.values() == followed.values()
    both = copy.deepcopy({"scheduler": scheduler, "schedule": followed})  # as in a pipeline
    both["scheduler"].set_timesteps(2)
    assert len(both["schedule"].values()) == 2 and len(followed.values()) == 4


# ---------------------------------------------------------------- in a bound model


def counted(found: Bound) -> int:
    return sum(p.computed for p in found.prologue.parts if p.part.conditions == ("y",))


@functools.cache
def captured(dtype: torch.dtype) -> tuple[torch.nn.Module, Converted]:
    model = conditional()
    example = draw() | {"t": torch.tensor([5, 5]).to(dtype)}
    return model, bind_request(model, example_inputs=example).unbound()


def bound(dtype: torch.dtype = torch.int64, **options: Any) -> tuple[torch.nn.Module, Bound]:
    model, source = captured(dtype)
    return model, bind_request(source, **options)


def sample(found: Bound, model: torch.nn.Module, steps: Tensor, seed: int = 0) -> None:
    for step in steps:
        with torch.no_grad():
            check(found, draw(seed=seed) | {"t": step.expand(2)}, model)


@pytest.mark.parametrize("on_miss", ["compute", "error"])
def test_a_followed_scheduler_set_anew(on_miss: Any) -> None:
    model, found = bound(on_miss=on_miss)
    scheduler = diffusers.DDIMScheduler()
    found.set_timesteps(scheduler)
    total = 0
    for n, seed in ((10, 0), (10, 1), (4, 1), (7, 2)):
        scheduler.set_timesteps(n)
        sample(found, model, scheduler.timesteps, seed)
        rows = len({*scheduler.timesteps.tolist()})
        if seed == 1 and n == 4:  # the prompt stays: 4 of its rows at most are new
            rows = len({*scheduler.timesteps.tolist()} - {*range(0, 1000, 100)})
        total += rows
        assert counted(found) == total
    if on_miss == "error":
        with pytest.raises(InputError, match="t: 998 is not among the 7 timesteps"):
            found(**draw(t=998))


def test_shares_of_1000_in_bfloat16_are_computed_at_once() -> None:
    """As FLUX's pipeline passes them: cast, then divided."""
    model, found = bound(torch.bfloat16, on_miss="error")
    scheduler = FLOW(shift=3.0)
    found.set_timesteps(scheduler)  # as it is: 1000 timesteps, of which bfloat16 makes fewer
    scheduler.set_timesteps(12)
    for seed in (0, 1):
        sample(found, model, scheduler.timesteps.to(torch.bfloat16) / 1000, seed)
        assert counted(found) == 12 * (seed + 1)
    scheduler.set_timesteps(6)
    sample(found, model, scheduler.timesteps.to(torch.bfloat16) / 1000, 3)
    assert counted(found) == 24 + 6


def test_karras_timesteps_are_floats() -> None:
    model, found = bound(torch.float32)
    scheduler = karras()
    scheduler.set_timesteps(6)
    found.set_timesteps(scheduler)
    sample(found, model, scheduler.timesteps)
    assert counted(found) == 6


def test_a_timestep_is_known_by_its_bits() -> None:
    """The next float is another timestep, never a neighbour's row."""
    model, found = bound(torch.float32, on_miss="error")
    t = torch.tensor([856.2857])
    found.set_timesteps(t)
    sample(found, model, t)
    with pytest.raises(InputError, match="is not among the 1 timesteps"):
        found(**draw() | {"t": torch.nextafter(t, torch.tensor(1e9)).expand(2)})
    found.set_timesteps(None)
    sample(found, model, torch.nextafter(t, torch.tensor(1e9)))
