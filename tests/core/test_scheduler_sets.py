"""What set of timesteps a scheduler stands for: its distinct values in its dtype, at every call."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.schedulers import NAMES, make
from tests.toys import seeded
from tfmq_fx import ConfigError, bind_request, fold_timesteps, prepare, refresh
from tfmq_fx.core.timesteps import as_received, distinct, float_dtype, timestep_values

# of diffusers itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `.*Scheduler` is deprecated:FutureWarning"),
]


class Net(nn.Module):
    """A timestep, a layer of it and of the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.enter = nn.Linear(1, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.enter(x) * self.time(t[:, None].float() / 1000).sin()
        return out


NET = seeded(Net).eval()
X, WHOLE = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([9])


def found(model: Any) -> list[float]:
    """The set of timesteps that a model has."""
    values: list[float] = model.timesteps.tolist()
    return values


def received(scheduler: Any) -> Tensor:
    return torch.as_tensor(scheduler.timesteps)


@pytest.mark.parametrize("name", NAMES)
def test_every_scheduler_is_one_set_at_every_entry_point(name: str) -> None:
    scheduler = make(name, 6)
    steps = received(scheduler)
    kind = steps.dtype if steps.is_floating_point() else torch.int64
    expected = sorted(set(steps.tolist()))
    folded = fold_timesteps(NET, scheduler, (X, WHOLE))  # as prepare() does
    bound = bind_request(NET, scheduler, (X, WHOLE))
    models = {
        "fold_timesteps": folded,
        "bind_request": bound,
        "refresh": refresh(folded, NET, timesteps=scheduler),
    }
    assert found(folded) == found(models["refresh"]) == expected
    assert bound.prologue.schedule.values() == expected[::-1]
    for where, model in models.items():
        assert model.call.inputs[1].dtype == kind, where
        with torch.no_grad():
            for step in steps:
                wanted = NET(X, step.reshape(1))
                assert torch.equal(model(X, step), wanted), where
                assert torch.equal(model(X, step.numpy()), wanted), where
                if kind != torch.int64:
                    assert torch.equal(model(X, step.double()), wanted), where


UNSET = [  # one of each kind: without timesteps, with whole or other ones, and what comes of them
    "DDIMScheduler",
    "DDPMWuerstchenScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMapEulerDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
    "PNDMScheduler",
    "PiflowScheduler",
    "SCMScheduler",
]


@pytest.mark.parametrize("name", UNSET)
def test_a_scheduler_that_nobody_has_set_is_a_set_or_says_what_to_do(name: str) -> None:
    bound = bind_request(NET, make(name), (X, WHOLE))  # which follows what is set later
    try:
        prepared = prepare(NET, (X, WHOLE), timesteps=make(name))
        assert len(found(prepared)) == len(set(received(make(name)).tolist()))
    except ConfigError as error:
        assert "has no timesteps yet: call its set_timesteps(num_inference_steps)" in str(error)
    scheduler = make(name, 4)
    if name == "SCMScheduler":  # whole numbers until it is set, by more than their number
        with pytest.raises(ConfigError, match=r"or bind_request\(\) of the model itself"):
            bound.set_timesteps(scheduler)
        bound = bind_request(NET, scheduler, (X, WHOLE))
    bound.set_timesteps(scheduler)
    for step in received(scheduler):
        with torch.no_grad():
            assert torch.equal(bound(X, step), NET(X, step.reshape(1)))


@pytest.mark.parametrize(
    ("steps", "example"),
    [
        (torch.tensor([0.3, 7.5], dtype=torch.float64), WHOLE),
        (np.array([0.3, 7.5]), 9),
        (np.array([0.3, 7.5], dtype=np.float32), np.int32(9)),
        ([np.float64(0.3), np.float32(7.5)], np.array([9])),
        ([0.3, 7.5], np.array(9)),
        (types.SimpleNamespace(timesteps=np.array([7.5, 0.3, 7.5])), WHOLE),
    ],
)
def test_doubles_arrays_and_numbers_are_accepted_everywhere(steps: Any, example: Any) -> None:
    folded = fold_timesteps(NET, steps, (X, example))
    bound = bind_request(NET, steps, (X, example))
    for made in (folded, refresh(folded, NET, timesteps=steps), bound):
        for t in (0.3, np.float64(0.3), np.array([0.3]), torch.tensor(0.3).double(), 7.5):
            wanted = NET(X, torch.as_tensor(t).reshape(-1).float())
            assert torch.equal(made(X, t), wanted)
        assert torch.equal(made(X, torch.tensor(7.5)), NET(X, torch.tensor([7.5])))


def test_the_dtype_in_which_a_set_arrives() -> None:
    euler, pndm = make("EulerDiscreteScheduler", 4), make("PNDMScheduler", 4)
    assert float_dtype(euler) == float_dtype([0.5, 2]) == float_dtype(np.zeros(2)) == torch.float32
    assert float_dtype(torch.zeros(2, dtype=torch.float64)) == torch.float64
    assert float_dtype(pndm) is float_dtype([1, 2]) is float_dtype(None) is float_dtype(5) is None
    # not set yet: a copy shows it
    unset = make("LTXEulerAncestralRFScheduler")
    assert float_dtype(unset) == torch.float32 and unset.timesteps is None
    assert float_dtype(make("PNDMScheduler")) is None


def test_a_float_example_keeps_its_dtype() -> None:
    example = (X, torch.tensor([0.5], dtype=torch.bfloat16))
    folded = fold_timesteps(NET, make("FlowMatchEulerDiscreteScheduler", 400), example)
    assert folded.call.inputs[1].dtype == torch.bfloat16
    steps = make("FlowMatchEulerDiscreteScheduler", 400).timesteps.bfloat16()
    assert folded.timesteps is not None  # of neighbours that bfloat16 cannot tell apart, one
    assert folded.timesteps.tolist() == sorted(set(steps.tolist())) and len(folded.timesteps) < 400


def test_repetitions_count_once_where_a_scheduler_may_have_made_them() -> None:
    twice = torch.tensor([7, 3, 7, 1])
    for given in (twice, twice.numpy(), types.SimpleNamespace(timesteps=[7, 3, 7, 1])):
        values = timestep_values(given)
        assert values is not None and values.tolist() == [7, 3, 1]
    listed = timestep_values([7, 3, 7])
    assert listed is not None and listed.tolist() == [7, 3, 7]  # by hand: refused by prepare
    with pytest.raises(ConfigError, match="duplicate timesteps"):
        prepare(NET, (X, WHOLE), timesteps=[7, 3, 7])
    assert distinct(torch.ones(2, 2)).shape == (2, 2)
    close = torch.tensor([993, 992, 8])
    assert as_received(close, torch.bfloat16).tolist() == [993, 8]
    assert as_received(close, torch.int64).tolist() == [993, 992, 8]


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_a_graph_of_whole_timesteps_says_how_to_follow_floats(name: str) -> None:
    whole = fold_timesteps(NET, 5, (X, WHOLE))
    with pytest.raises(ConfigError, match=r"cannot be received as torch\.int64: 999\.0, .*Capture"):
        bind_request(whole, make(name, 20))
    with pytest.raises(ConfigError, match="cannot hold"):
        refresh(whole, NET, timesteps=make(name, 20))
