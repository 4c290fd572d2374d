"""Sums of layers' results go to the kernels that compute them, and other sums do not."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.backends.codes.nets import (
    EIGHT,
    LINEARS,
    C,
    apply,
    assert_near,
    assert_same,
    conv,
    count,
    lowered,
    net,
    results,
)
from tfmq_fx.backends.codes.choice import Choice
from tfmq_fx.backends.codes.layers import ConcatLayer
from tfmq_fx.backends.cuda.autotune import untimed_choice
from tfmq_fx.core.layer_config import ActivationSpec


def shortcut(m, x, row):
    return m.a(torch.cat([x, torch.sin(x)], 1)) + m.b(x)


@pytest.mark.parametrize("size", [1, 3])
def test_parts_of_a_concatenation_run_as_one_kernel(monkeypatch, size):
    model = net(shortcut, a=lambda: conv(size, 2 * C), b=lambda: conv(1))
    base = lowered(model, monkeypatch)
    done, counts = apply(base, "skip_concat", "merge_concat", "absorb_residuals")
    assert counts == [2, 1, 1] and count(done, torch.cat) == 0
    assert isinstance(done.get_submodule("a.0_1"), ConcatLayer)
    assert not hasattr(done.a, "0")
    assert_near(done, base)


def test_linear_parts_and_static_ranges_merge_too(monkeypatch):
    def function(m, x, row):
        tokens = x.flatten(2).transpose(1, 2)
        y = m.a(torch.cat([tokens, tokens * 2], -1))
        return y.transpose(1, 2).reshape(x.shape)

    model = net(function, a=lambda: nn.Linear(2 * C, C))
    static = dataclasses.replace(EIGHT, activations=ActivationSpec(per_timestep=False))
    base = lowered(model, monkeypatch, plan={"a.0": static, "a.1": static})
    done, counts = apply(base, "skip_concat", "merge_concat")
    assert counts == [2, 1]
    assert_near(done, base)
    mixed = lowered(model, monkeypatch, plan={"a.1": static})  # ranges of one sample, and of all
    done, counts = apply(mixed, "merge_concat")
    assert counts == [1]
    assert_near(done, mixed)


def test_parts_that_are_called_twice_are_merged_once(monkeypatch):
    def function(m, x, row):
        y = m.a(torch.cat([x, torch.sin(x)], 1))
        return m.a(torch.cat([torch.sin(y), x], 1))

    base = lowered(net(function, a=lambda: conv(3, 2 * C)), monkeypatch)
    done, counts = apply(base, "skip_concat", "merge_concat")
    assert counts == [4, 2] and len(done.graph.find_nodes(op="call_module", target="a.0_1")) == 2
    assert [name for name, _ in done.a.named_children()] == ["0_1"]
    assert_near(done, base)


def test_the_sum_of_two_parts_takes_a_third(monkeypatch):
    def function(m, x, row):
        return m.a(torch.cat([x, torch.sin(x), torch.cos(x)], 1))

    base = lowered(net(function, a=lambda: conv(3, 3 * C)), monkeypatch)
    done, counts = apply(base, "skip_concat", "merge_concat", "absorb_residuals")
    assert counts == [3, 1, 1]
    (both,) = done.graph.find_nodes(op="call_module", target="a.0_1")
    assert both.kwargs["residual"].target == "a.2"
    assert_near(done, base)


def test_layers_that_one_kernel_cannot_run_stay_apart(monkeypatch):
    def function(m, x, row):
        y = m.a(x)
        one = m.b(x) + m.c(x)  # two biases
        two = y + m.d(x)  # y is read again
        three = m.d(one) + m.e(one)  # other taps
        return one + two + three + y

    layers = {"a": conv, "b": conv, "c": conv, "d": lambda: conv(bias=False), "e": lambda: conv(1)}
    base = lowered(net(function, **layers), monkeypatch)
    assert apply(base, "merge_concat")[1] == [0]

    def shared(problem, dtype):
        return Choice("triton", untimed_choice(problem, dtype).tile._replace(split=2))

    base = lowered(net(shortcut, a=lambda: conv(3, 2 * C), b=conv), monkeypatch, choose=shared)
    assert apply(base, "merge_concat")[1] == [0]


ROWS = {
    "index": lambda m, x, row: m.a(x) + row[:, :, None, None],
    "other order": lambda m, x, row: torch.add(row.unsqueeze(-1).unsqueeze(-1), m.a(x)),
    "method": lambda m, x, row: m.a(x).add(row.reshape(-1, C, 1, 1)),
    "linear": lambda m, x, row: (m.b(x.flatten(2).mT) + row[:, None]).mT.reshape(x.shape),
}


@pytest.mark.parametrize("function", ROWS.values(), ids=ROWS)
def test_rows_of_a_sample_are_added_by_the_layer(monkeypatch, function):
    base = lowered(net(function, a=conv, b=lambda: nn.Linear(C, C)), monkeypatch)
    done, counts = apply(base, "absorb_rows")
    assert counts == [1]
    assert_same(done, base)


OTHER_ROWS = {
    "of all samples": lambda m, x, row: m.a(x) + m.fixed,
    "of places": lambda m, x, row: m.a(x) + x.mean(1, keepdim=True),
    "scaled": lambda m, x, row: torch.add(m.a(x), row[:, :, None, None], alpha=2),
    "read twice": lambda m, x, row: (y := m.a(x)) + row[:, :, None, None] + torch.sin(y),
    "of another dtype": lambda m, x, row: (m.a(x) + row.double()[:, :, None, None]).float(),
    "of channels": lambda m, x, row: (
        m.b(x.flatten(2).mT).mT.reshape(x.shape) + row[:, :, None, None]
    ),
}


@pytest.mark.parametrize("function", OTHER_ROWS.values(), ids=OTHER_ROWS)
def test_other_sums_are_no_rows(monkeypatch, function):
    model = net(function, a=conv, b=lambda: nn.Linear(C, C))
    model.fixed = nn.Parameter(torch.ones(1, C, 1, 1))
    assert apply(lowered(model, monkeypatch), "absorb_rows")[1] == [0]


RESIDUALS = {
    "block": lambda m, x, row: x + m.a(m.drop(torch.tanh(m.a(x)))),
    "row before": lambda m, x, row: (m.a(x) + row[:, :, None, None]) + x,
    "row after": lambda m, x, row: (m.a(x) + x) + row[:, :, None, None],
    "tokens": lambda m, x, row: (
        x + m.b(torch.tanh(x).flatten(2).transpose(1, 2)).transpose(-1, -2).reshape(x.shape)
    ),
    "tokens of an image": lambda m, x, row: (
        m.b(torch.tanh(x).permute(0, 2, 3, 1).reshape(-1, 36, C))
        .reshape(-1, 6, 6, C)
        .permute(0, 3, 1, 2)
        .contiguous()
        + x
    ),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_residuals_are_added_by_the_layer(monkeypatch, name):
    layers = {"a": conv, "b": lambda: nn.Linear(C, C), "drop": lambda: nn.Dropout(0.1)}
    base = lowered(net(RESIDUALS[name], **layers), monkeypatch)
    done, counts = apply(base, "absorb_rows", "absorb_residuals", "absorb_rows")
    expected = {"row before": [1, 1, 0], "row after": [0, 1, 1]}
    assert counts == expected.get(name, [0, 1, 0])
    assert_same(done, base)


def test_of_two_layers_the_later_one_takes_the_other(monkeypatch):
    base = lowered(net(lambda m, x, row: m.a(x) + m.b(x), a=conv, b=lambda: conv(1)), monkeypatch)
    done, counts = apply(base, "absorb_residuals")
    (later,) = done.graph.find_nodes(op="call_module", target="b")
    assert counts == [1] and later.kwargs["residual"].target == "a"
    assert_same(done, base)


def test_other_sums_are_no_residuals(monkeypatch):
    def function(m, x, row):
        y = m.a(x)
        z = torch.add(m.a(y), x, alpha=2)
        z = m.a(z) + z.mean(0, keepdim=True)
        z = torch.sin(z)
        z[:, :4] += m.a(x)[:, :4]
        z = z + m.b(x.flatten(2).mT).reshape(x.shape)  # no image: tokens as channels
        return ((y + z) * y.double()).float()

    layers = {"a": conv, "b": lambda: nn.Linear(C, C)}
    base = lowered(net(function, **layers), monkeypatch)
    assert apply(base, "absorb_residuals")[1] == [0]


def test_layers_that_follow_each_other_pass_codes_on(monkeypatch):
    def function(m, x, row):
        y = m.c(m.b(m.a(x) + x))  # a needs no border, c does
        tokens = y.flatten(2).transpose(1, 2)
        return m.v(m.q(tokens) + row[:, None]).mT.reshape(x.shape)

    layers = {"a": conv, "b": lambda: conv(1), "c": conv} | LINEARS
    base = lowered(net(function, **layers), monkeypatch)
    expected = results(base)  # the layers that give codes belong to both graphs
    done, counts = apply(base, "absorb_rows", "absorb_residuals", "requantize")
    assert counts == [1, 1, 2]
    for found, value in zip(results(done), expected, strict=True):
        assert torch.equal(found, value)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, row: m.c(y := m.b(torch.sin(x))) + torch.sin(y),
        lambda m, x, row: m.c(m.c(torch.sin(x))),
        lambda m, x, row: m.a(m.c(torch.sin(x))),
    ],
    ids=["read twice", "called twice", "border"],
)
def test_other_layers_give_no_codes(monkeypatch, function):
    layers = {"a": conv, "b": lambda: conv(1), "c": lambda: conv(1)}
    base = lowered(net(function, **layers), monkeypatch)
    assert apply(base, "requantize")[1] == [0]
