"""Layers that read the same codes run as one, and give the same bits."""

import dataclasses
import operator

import pytest
import torch
from torch import nn

from tests.backends.codes.nets import (
    EIGHT,
    LINEARS,
    C,
    apply,
    assert_same,
    conv,
    count,
    lowered,
    net,
    whole_sums,
)
from tfmq_fx.backends.codes.choice import Choice
from tfmq_fx.backends.codes.layers import CodesLayer
from tfmq_fx.core.layer_config import ActivationSpec, WeightSpec

BOTH = ("share_quantize", "join_siblings")
PACKED = dataclasses.replace(EIGHT, weights=WeightSpec(bits=4, search=1))
FP8 = dataclasses.replace(
    EIGHT, weights=WeightSpec(format="fp8"), activations=ActivationSpec(format="fp8")
)
STATIC = dataclasses.replace(EIGHT, activations=ActivationSpec(per_timestep=False))


def attention(m, x, row):
    tokens = x.flatten(2).transpose(1, 2)
    y = torch.tanh(m.q(tokens)) * m.k(tokens) + m.v(tokens)
    return y.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("layers", [EIGHT, PACKED, FP8, STATIC])
def test_queries_keys_and_values_are_one_product(monkeypatch, layers):
    base = lowered(net(attention, **LINEARS), monkeypatch, layers)
    done, counts = apply(base, *BOTH)
    assert counts == [2, 2]
    joint = done.get_submodule("q_k_v")
    assert isinstance(joint, CodesLayer) and joint.weight.shape[0] == 3 * C
    assert not any(hasattr(done, name) for name in "qkv")
    assert count(done, operator.getitem) > count(base, operator.getitem)
    assert_same(done, base)


def test_convolutions_too_and_biases_that_some_lack(monkeypatch):
    def function(m, x, row):
        return m.a(x) * m.b(x)

    layers = {"a": lambda: conv(bias=False), "b": lambda: conv(out=C)}
    done, counts = apply(base := lowered(net(function, **layers), monkeypatch), *BOTH)
    assert counts == [1, 1]
    joint = done.get_submodule("a_b")
    assert joint.bias.shape == (2 * C,) and not joint.bias[:C].any()
    assert_same(done, base)


def test_layers_of_unequal_width_are_cut_where_they_meet(monkeypatch):
    def function(m, x, row):
        wide, narrow = m.wide(x), m.narrow(x)
        return wide[:, :C] * narrow.mean(1, keepdim=True) + wide[:, C:]

    layers = {"wide": lambda: conv(out=2 * C), "narrow": lambda: conv(out=3)}
    base = lowered(net(function, **layers), monkeypatch)
    done, counts = apply(base, *BOTH)
    assert counts == [1, 1] and done.get_submodule("wide_narrow").weight.shape[0] == 2 * C + 3
    assert_same(done, base)


def other_input(m, x, row):
    return m.a(x) * m.b(torch.tanh(x))


def called_twice(m, x, row):
    return m.a(x) * m.b(x) + m.b(torch.tanh(x))


def other_kernel(m, x, row):
    return m.a(x) * m.c(x)


@pytest.mark.parametrize("function", [other_input, called_twice, other_kernel])
def test_others_stay_apart(monkeypatch, function):
    layers = {"a": conv, "b": conv, "c": lambda: nn.Conv2d(C, C, 1)}
    base = lowered(net(function, **layers), monkeypatch)
    assert apply(base, *BOTH)[1][1] == 0


def test_layers_that_add_to_their_sums_stay_apart(monkeypatch):
    def function(m, x, row):
        return m.a(x) * (m.b(x) + row[:, :, None, None])

    base = lowered(net(function, a=conv, b=conv), monkeypatch)
    assert apply(base, "share_quantize", "absorb_rows", "join_siblings")[1] == [1, 1, 0]


@pytest.mark.parametrize("joint, count", [(2.9, 2), (3.1, 0)])
def test_the_trial_decides_where_there_was_one(monkeypatch, joint, count):
    def choose(problem, dtype):
        micros = joint if problem.out_channels == 3 * C else 1.0
        tile = whole_sums(problem, dtype).tile
        return Choice("triton", tile, {"float": 9.0, "triton": micros})

    base = lowered(net(attention, **LINEARS), monkeypatch, choose=choose)
    done, counts = apply(base, *BOTH, choose=choose)
    assert counts == [2, count]
    assert_same(done, base)


def test_a_joint_layer_that_is_faster_in_float_is_not_made(monkeypatch):
    def choose(problem, dtype):
        return Choice("float", whole_sums(problem, dtype).tile, {"float": 1.0})

    base = lowered(net(attention, **LINEARS), monkeypatch)
    assert apply(base, *BOTH, choose=choose)[1] == [2, 0]
