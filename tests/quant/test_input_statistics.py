"""gram: rows are what a layer's weight is multiplied with, statistics are sums over them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.quant.test_modules import LAYERS, make, quantized
from tfmq_fx.quant.input_statistics import InputStatistics, input_rows, row_count
from tfmq_fx.quant.modules import QuantConv


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


def statistics(weights=None, seed=0, groups=2, width=4, out=3, rows=30):
    """Statistics of random rows added in two parts, with the rows and the weight (double)."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(groups, rows, width, generator=generator) + 1
    f = q + 0.3 * torch.randn(groups, rows, width, generator=generator)
    weight = torch.randn(groups, out, width, generator=generator)
    found = InputStatistics.empty(weight)
    for part in (slice(0, 10), slice(10, None)):
        some = None if weights is None else weights[part]
        found.add_sums(found.sums(q[:, part], f[:, part], some))
    return found, q.double(), f.double(), weight.double()


# float32 sums of up to 30 products of |W| |q| below 4 * 5 each, weights below 9
NEAR = {"rtol": 0, "atol": 30 * 30 * 4 * 5 * 9 * 2**-24}


@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_are_weighted_sums_over_rows(weighted):
    weights = torch.arange(30) % 3 * 4.0 + 0.5 if weighted else None
    found, q, f, w = statistics(weights)
    d = torch.ones(30, 1).double() if weights is None else weights.double()[:, None]
    assert found.rows == float(d.sum())
    torch.testing.assert_close(found.gram, q.mT @ (d * q), **NEAR)
    torch.testing.assert_close(found.gap, ((f - q) @ w.mT).mT @ (d * q), **NEAR)
    torch.testing.assert_close(found.sum_q, (d * q).sum(1), **NEAR)
    torch.testing.assert_close(found.sum_f, (d * f).sum(1), **NEAR)
    total = found.rows
    found.center_()
    dq, df = (v - (d * v).sum(1, keepdim=True) / total for v in (q, f))
    torch.testing.assert_close(found.gram, dq.mT @ (d * dq), **NEAR)
    torch.testing.assert_close(found.gap, ((df - dq) @ w.mT).mT @ (d * dq), **NEAR)


def test_weights_of_one_change_nothing():
    plain, *_ = statistics()
    same, *_ = statistics(torch.ones(30))
    for name in ("gram", "gap", "sum_q", "sum_f", "rows"):
        a, b = getattr(plain, name), getattr(same, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_the_aligned_weight_is_the_damped_least_squares_solution(damping):
    found, q, f, w = statistics()
    gram = found.gram.clone()
    aligned = found.aligned_weight(damping)
    assert torch.equal(found.gram, gram)  # whose diagonal was damped in place
    ridge = max(damping, 1e-8) * gram.diagonal(dim1=1, dim2=2).mean(1)
    for i in range(2):
        # rows that say What = W with the root of the damping for a weight
        rows = torch.cat([q[i], ridge[i].sqrt() * torch.eye(4).double()])
        wanted = torch.cat([f[i] @ w[i].T, ridge[i].sqrt() * w[i].T])
        expected = torch.linalg.lstsq(rows, wanted).solution.T
        # conditions below 100, on sums good to NEAR of some 30
        torch.testing.assert_close(aligned[i].double(), expected, rtol=1e-4, atol=1e-4)


def test_the_aligned_weight_is_the_weight_where_both_inputs_agree():
    _, q, _, w = statistics()
    same = InputStatistics.empty(w.float())
    same.add_sums(same.sums(q.float(), q.float()))
    assert torch.equal(same.aligned_weight(0.01), w.float())
    nothing = InputStatistics.empty(w.float())
    nothing.add_sums(nothing.sums(torch.zeros(2, 5, 4), torch.zeros(2, 5, 4)))
    assert torch.equal(nothing.aligned_weight(0.0), w.float())


def test_squares_beyond_float32_are_summed_in_float64():
    found = InputStatistics.empty(torch.ones(1, 1, 2))
    large = torch.full((1, 3, 2), 1e25)
    found.add_sums(found.sums(large, large))
    expected = 3 * float(torch.tensor(1e25)) ** 2
    torch.testing.assert_close(found.gram, torch.full((1, 2, 2), expected, dtype=torch.float64))
