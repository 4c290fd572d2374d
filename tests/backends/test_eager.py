"""eager: the graph as it stands, with every layer declined and no gradients."""

import pytest
import torch
from torch import nn

from tests.toys import seeded
from tfmq_fx import ConfigError, calibrate, convert, prepare
from tfmq_fx.backends import BACKENDS, backend, backend_module
from tfmq_fx.backends.eager import compile_graph, unavailable
from tfmq_fx.core.errors import BackendError
from tfmq_fx.quant.quant_layer import QuantLayer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x, t):
        return self.leave(torch.tanh(self.enter(x) + t[:, None].float()))


@pytest.fixture(scope="module")
def model():
    calls = [(torch.randn(4, 4), torch.full((4,), t)) for t in range(3)]
    prepared = prepare(seeded(Net).eval(), calls[0], timesteps=3, config="w8a8")
    return convert(calibrate(prepared, calls, progress=False), progress=False)


def test_it_runs_everywhere():
    assert unavailable() is None


def test_the_graph_is_unchanged_and_every_layer_declined(model):
    runner, lowering = compile_graph(model.gm)
    x, t = torch.randn(2, 4), torch.tensor([0, 2])
    assert torch.equal(runner(x, t)[0], model(x, t))
    assert not runner(x.requires_grad_(), t)[0].requires_grad
    assert lowering.gm is model.gm and lowering.changed == 0
    layers = [n for n, m in model.gm.named_modules() if isinstance(m, QuantLayer)]
    assert [d.site for d in lowering.declined] == layers == ["enter", "leave"]
    assert {d.reason for d in lowering.declined} == {"eager computes in floating point"}


def test_options_are_refused(model):
    with pytest.raises(ConfigError, match="'eager' takes no options, got mode, dynamic"):
        compile_graph(model.gm, mode="x", dynamic=True)


def test_backends_are_found_by_name():
    assert all(hasattr(backend("eager"), n) for n in ("unavailable", "compile_graph"))
    assert list(BACKENDS) == sorted(BACKENDS)
    for name in BACKENDS:
        assert all(isinstance(option, str) for option in backend_module(name).OPTIONS)
    known = "auto, eager, float, inductor, openvino"
    with pytest.raises(BackendError, match=f"unknown backend 'x'; there are {known}"):
        backend("x")
