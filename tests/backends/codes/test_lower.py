"""What every engine's lowering has in common: layers are replaced by name, with reasons."""

import pytest
import torch
from torch import nn

from tests.backends.codes.nets import captured, conv, count, net, quantized, whole_sums
from tfmq_fx.backends.codes.layers import CodesLayer, problem_at, quantize_input
from tfmq_fx.backends.codes.lower import (
    Lowered,
    declined,
    dtype_obstacle,
    lower_layers,
    quantized_calls,
)
from tfmq_fx.backends.float_layers import FloatLayer
from tfmq_fx.ir.graph import fork
from tfmq_fx.quant.quant_layer import QuantLayer


class NoEngine(CodesLayer):
    """A layer on codes that nothing runs."""


def on_codes(layer, nodes):
    problem = problem_at(layer, nodes[0])
    return Lowered(NoEngine(layer, torch.float32, problem, whole_sums(problem, torch.float32)))


@pytest.fixture
def gm():
    def function(m, x, row):
        return m.a(m.a(x)) + m.b(x)

    return fork(quantized(captured(net(function, a=conv, b=conv))))


def test_calls_are_found_by_layer(gm):
    calls = quantized_calls(gm)
    assert {name: len(nodes) for name, nodes in calls.items()} == {
        "enter": 1, "a": 2, "b": 1, "leave": 1,
    }  # fmt: skip


def test_layers_on_codes_are_called_with_codes(gm):
    made = lower_layers(gm, on_codes, None)
    assert list(made) == ["enter", "a", "b", "leave"] and declined(made) == []
    assert not any(isinstance(module, QuantLayer) for module in gm.modules())
    assert count(gm, quantize_input) == 5  # one for each call
    for name, lowered in made.items():
        assert gm.get_submodule(name) is lowered.module
        for node in gm.graph.find_nodes(op="call_module", target=name):
            codes, scale = node.args
            assert codes.target is quantize_input and scale is codes.args[1] and not node.kwargs


def test_layers_in_floating_point_are_declined_with_the_reason(gm):
    def lower_one(layer, nodes):
        if len(nodes) > 1:
            return Lowered(FloatLayer(layer), "it is called twice", {"float": 1.0})
        return on_codes(layer, nodes)

    made = lower_layers(gm, lower_one, {"b": "its kernel is wrong"})
    assert [(d.site, d.reason) for d in declined(made)] == [
        ("a", "runs in floating point: it is called twice"),
        ("b", "runs in floating point: its kernel is wrong"),
    ]
    assert isinstance(gm.a, FloatLayer) and isinstance(gm.b, FloatLayer)
    assert made["a"].micros == {"float": 1.0} and count(gm, quantize_input) == 2


def test_kernels_write_some_dtypes(gm):
    (nodes,) = (quantized_calls(gm)["a"],)
    assert dtype_obstacle(nodes, (torch.float32, torch.bfloat16)) is None
    reason = dtype_obstacle(nodes, (torch.float16,))
    assert reason == "its results have dtypes torch.float32"


def test_a_layer_without_an_engine_says_what_it_lacks(gm):
    made = lower_layers(gm, on_codes, None)
    with pytest.raises(NotImplementedError, match="NoEngine defines no kernel: give it a `run`"):
        gm(torch.randn(4, 3, 6, 6), torch.zeros(4, dtype=torch.int64))
    assert isinstance(made["a"].module, nn.Module)
