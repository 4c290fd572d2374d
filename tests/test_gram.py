"""gram: rows are what a layer's weight is multiplied with, statistics are sums over them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.test_nn import LAYERS, make, quantized
from tfmq_fx.gram import InputStatistics, input_rows, row_count
from tfmq_fx.nn import QuantConv


def outputs_from_rows(layer, rows):
    """(n, out): rows (groups, n, in) times the weight of each group, plus the bias."""
    weight = layer.weight.flatten(1).view(len(rows), -1, rows.shape[-1])
    y = torch.cat([r.double() @ w.double().T for r, w in zip(rows, weight, strict=True)], 1)
    return y if layer.bias is None else y + layer.bias


def output_rows(layer, x):
    y = layer(x)
    return (y.movedim(1, -1) if isinstance(layer, QuantConv) else y).reshape(-1, len(layer.weight))


# Both sides sum at most 54 products of |x| |w| <= 4 * 0.5, one in float32 (2^-24 each), one in
# float64; the terms' partial sums stay below 54 * 2.
ROUNDED = 54 * 54 * 2 * 2**-24


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_weight_are_the_layers_output(name):
    layer, x = make(name)
    made = quantized(layer)
    rows = input_rows(made, x)
    assert rows.shape[1] == row_count(made, x)
    error = (outputs_from_rows(made, rows) - output_rows(made, x)).abs().max()
    assert float(error.detach()) <= ROUNDED


@pytest.mark.parametrize("name", LAYERS)
def test_picked_rows_are_those_of_the_output_positions(name):
    layer, x = make(name)
    made = quantized(layer)
    rows = input_rows(made, x)
    picks = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(0))[:5]
    assert torch.equal(input_rows(made, x, picks), rows[:, picks])


# torch warns that it pads unevenly, for its own layer as for ours
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_rows_for_any_convolution(data):
    dims = data.draw(st.integers(1, 3))
    each = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    groups = data.draw(st.sampled_from((1, 2)))
    mode = data.draw(st.sampled_from(("zeros", "circular", "replicate", "reflect")))
    padding = data.draw(st.one_of(st.just(each(0, 2)), st.sampled_from(("same", "valid"))))
    stride = (1,) * dims if padding == "same" else each(1, 3)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = kind(
        2 * groups,
        4,
        each(1, 3),
        stride=stride,
        padding=padding,
        dilation=each(1, 2),
        groups=groups,
        padding_mode=mode,
    )
    x = torch.randn(2, 2 * groups, *each(5, 7))
    made = quantized(layer)
    rows = input_rows(made, x)
    expected = output_rows(made, x).detach()
    assert rows.shape[1] == len(expected) == row_count(made, x)
    # at most 108 products here
    bound = 108 * 108 * float(x.abs().max() * made.weight.abs().max()) * 2**-24 + 1e-9
    assert float((outputs_from_rows(made, rows) - expected).abs().max().detach()) <= bound


def test_statistics_are_sums_over_rows():
    generator = torch.Generator().manual_seed(0)
    q, f = (torch.randn(2, 30, 4, generator=generator) for _ in range(2))
    found = InputStatistics.empty(2, 4, torch.device("cpu"))
    found.add(q[:, :10], f[:, :10])
    found.add(q[:, 10:], f[:, 10:])
    assert found.rows == 30
    # float32 sums of up to 20 products below 16 each
    near = {"rtol": 0, "atol": 20 * 20 * 16 * 2**-24}
    torch.testing.assert_close(found.gram, q.double().mT @ q.double(), **near)
    torch.testing.assert_close(found.cross, f.double().mT @ q.double(), **near)
    torch.testing.assert_close(found.sum_q, q.double().sum(1))
    torch.testing.assert_close(found.sum_f, f.double().sum(1))
    centered = found.centered()
    dq, df = (v.double() - v.double().mean(1, keepdim=True) for v in (q, f))
    torch.testing.assert_close(centered.gram, dq.mT @ dq, **near)
    torch.testing.assert_close(centered.cross, df.mT @ dq, **near)
