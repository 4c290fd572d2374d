"""casts: a graph goes to another dtype only where nothing in it is of the old one on purpose."""

import copy

import pytest
import torch
from torch import nn

from tests.adapters import Denoiser
from tests.toys import seeded
from tfmq_fx import ConfigError, InputError, bind_request, fold_timesteps
from tfmq_fx.ir.dtype_casts import cast_obstacle

X, T = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 1])


class Layer(nn.Module):
    """Two linear layers with `kind` of arithmetic between them, and a timestep beside."""

    def __init__(self, kind):
        super().__init__()
        self.enter, self.time, self.leave = nn.Linear(4, 4), nn.Linear(1, 4), nn.Linear(4, 4)
        self.kind, self.rates = kind, torch.tensor([0.1, 0.2, 0.3, 0.7])
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x, t):
        h = self.enter(x) + self.time((t[:, None] / 10).to(self.time.weight.dtype))
        if self.kind == "up":  # as norms and softmax do
            h = torch.softmax(h.to(torch.float32), -1).to(h.dtype)
        elif self.kind == "made":
            h = h * torch.linspace(0, 1, 4, dtype=torch.float32).to(h.dtype)
        elif self.kind == "held":  # no buffer: a cast of the model leaves it in float32
            h = (h * self.rates.sin()).to(self.leave.weight.dtype)
        elif self.kind == "buffer":
            h = h * self.shift
        return self.leave(h)


def net(kind):
    return seeded(Layer, kind).eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["up", "made", "held", "buffer"])
def test_arithmetic_of_the_old_dtype_is_refused_and_nothing_changes(kind, dtype):
    source = net(kind)
    model = fold_timesteps(source, 3, (X, T))
    expected = model(X, T)
    low = copy.deepcopy(source).to(dtype)
    one = (X[:1].to(dtype), T[:1])
    with torch.no_grad():  # as long as the source is there, it is captured in the other dtype
        assert torch.equal(copy.deepcopy(model).to(dtype)(*one), low(*one))
    model.forget_source()
    with pytest.raises(ConfigError) as caught:
        model.to(dtype)
    text = str(caught.value)
    assert f"captured in torch.float32 and cannot be cast to {dtype}" in text
    assert f"model.to({dtype}), then prepare(), fold_timesteps() or bind_request()" in text
    assert torch.equal(model(X, T), expected) and model.dtype == torch.float32
    made = fold_timesteps(low, 3, (X.to(dtype), T))  # what the message says
    with torch.no_grad():
        assert torch.equal(made(*one), low(*one))


def test_what_follows_the_model_is_cast_as_the_model_is():
    source = net("plain")
    model = fold_timesteps(source, [1], (X, T)).to(torch.bfloat16)
    low = copy.deepcopy(source).to(torch.bfloat16)
    x = X.bfloat16()
    with torch.no_grad():
        wanted, exact = low(x, T).float(), source(X, T)
        found = model(x, T).float()
    assert (found - exact).norm() <= 1.3 * (wanted - exact).norm()  # rows are rounded once only


def test_a_bound_model_is_refused_too_and_still_runs():
    source = net("plain")
    bound = bind_request(source, [1, 2], (X, T))
    bound.forget_source()
    with pytest.raises(ConfigError, match=r"asks for float32 \(test_dtype_casts\.py:\d+\)"):
        bound.half()
    with torch.no_grad():
        assert torch.equal(bound(X, T), source(X, T))
    assert torch.equal(bound.to("cpu")(X, T), bound(X, T))  # no cast


def test_a_float_timestep_that_is_computed_with_is_an_obstacle():
    class Scaled(Denoiser):
        def forward(self, x, t):
            return self.leave(self.enter(x) * t[:, None])

    bound = bind_request(seeded(Scaled).eval(), None, (X, T.float()))
    assert "computes with the timestep, t, which stays float32" in str(
        cast_obstacle(bound.gm, torch.float32)
    )
    with pytest.raises(ConfigError, match="which stays float32"):
        bound.half()
    low = bind_request(seeded(Scaled).eval().half(), None, (X.half(), T.half()))
    assert low(X.half(), T.half()).dtype == torch.float16
    with pytest.raises(InputError):
        low(X, T)
