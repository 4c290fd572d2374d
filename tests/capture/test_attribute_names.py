"""attribute_names: names that a graph cannot have are told, with what to do."""

import pytest
import torch
from torch import nn

from tfmq_fx import fold_timesteps
from tfmq_fx.core.errors import CaptureError

EXAMPLE = (torch.randn(2, 6), torch.tensor([1, 0]))


class Named(nn.Module):
    """A layer, or a parameter of it, called `name`."""

    def __init__(self, name, *, parameter=False):
        super().__init__()
        self.name, self.parameter = name, parameter
        if parameter:
            self.register_parameter(name, nn.Parameter(torch.randn(6)))
        else:
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, x, t):
        held = (self._parameters if self.parameter else self._modules)[self.name]
        return (x * held if self.parameter else held(x)) * t[:, None]


class Holds(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t):
        return self.model(x, t)


@pytest.mark.parametrize("parameter", [False, True])
@pytest.mark.parametrize("name", ["graph", "code", "meta", "recompile", "print_readable"])
def test_names_of_a_graph_itself(name, parameter):
    model = Named(name, parameter=parameter).eval()
    with pytest.raises(CaptureError, match=f"^{name}: a graph has an attribute '{name}' of its"):
        fold_timesteps(model, [0, 1], EXAMPLE)
    held = fold_timesteps(Holds(model), [0, 1], EXAMPLE)  # the remedy
    assert torch.equal(held(EXAMPLE[0], 1), model(EXAMPLE[0], torch.tensor([1, 1])))


@pytest.mark.parametrize("name", ["class", "lambda", "None"])
def test_words_of_python(name):
    for model, path in ((Named(name), name), (Holds(Named(name)), f"model.{name}")):
        with pytest.raises(CaptureError, match=f"^{path}: '{name}' is a word of Python"):
            fold_timesteps(model.eval(), [0, 1], EXAMPLE)


@pytest.mark.parametrize("name", ["with space", "gm", "é", "a-b", "0", "type_", "model"])
def test_other_names_are_kept(name):
    model = Named(name).eval()
    folded = fold_timesteps(model, [0, 1], EXAMPLE)
    assert name in folded.gm._modules
    assert torch.equal(folded(EXAMPLE[0], 1), model(EXAMPLE[0], torch.tensor([1, 1])))


@pytest.mark.parametrize("name", ["slice", "torch", "getattr", "inf", "device", "float", "math"])
def test_inputs_called_like_what_code_uses(name):
    space = {}
    exec(f"def forward(self, {name}, t): return {name}[:, 1:].float() * t[:, None]", space)
    model = type("Model", (nn.Module,), space)().eval()
    folded = fold_timesteps(model, [0, 1], {name: EXAMPLE[0], "t": EXAMPLE[1]})
    assert torch.equal(folded(**{name: EXAMPLE[0], "t": 1}), EXAMPLE[0][:, 1:])
