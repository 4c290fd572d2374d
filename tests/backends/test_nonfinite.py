"""nonfinite: a compiled model answers NaN and Inf in its inputs as the model does."""

import gc
import math

import pytest
import torch

from tests.backends.test_inductor import data
from tests.backends.test_self_check import deep
from tfmq_fx import compile
from tfmq_fx.backends.nonfinite import is_finite, with_nan
from tfmq_fx.backends.saturation import openvino_is_exact

X, T = data(seed=1)[0]


def spoiled(value, dtype=torch.float32):
    x = X.clone().to(dtype)
    x[1, 2, 3, 3] = value
    return x


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", ["openvino", "eager"])
def test_the_answer_is_the_models(backend, value):
    model = deep()
    compiled = compile(model, backend, check=False)
    expected, found = model(spoiled(value), T), compiled(spoiled(value), T)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert expected.isnan().any() or not math.isnan(value)
    others = [0, 2, 3]
    step = model.gm.activation_scales.max() * model.gm.leave.weight.abs().max()
    if openvino_is_exact():
        apart = (compiled(X, T)[others] - found[others]).abs().max()
        assert apart <= 30 * float(step)


def test_without_the_model_samples_with_nan_are_nan():
    import copy

    model = copy.deepcopy(deep())
    compiled = compile(model, "openvino", check=False)
    expected = compiled(X, T)
    del model
    gc.collect()
    found = compiled(spoiled(math.nan), T)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])


def test_which_inputs_are_finite():
    whole = torch.arange(3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        large = torch.full((3, 70_000), torch.finfo(dtype).max / 2**4, dtype=dtype)
        assert is_finite([large, whole]) and is_finite([-large])
        for value in (math.nan, math.inf, -math.inf):
            large[1, 5] = value
            assert not is_finite([whole, large])
        large[1, 6] = -large[1, 5]
        assert not is_finite([large])


def test_samples_that_are_marked():
    y, n = torch.ones(3, 2), torch.arange(3)
    x, c = torch.zeros(3, 4), torch.zeros(7)
    x[2, 1] = math.nan
    (marked, count) = with_nan((y, n), [x, c], [True, False])
    assert torch.equal(count, n) and marked[:2].equal(y[:2]) and marked[2].isnan().all()
    c[0] = math.nan  # of no sample
    assert with_nan((y,), [x, c], [True, False])[0].isnan().all()
    assert with_nan((y.sum(),), [x], [True])[0].isnan().all()


def test_on_other_devices_samples_are_marked_without_asking(monkeypatch):
    """As where the model is gone, whether or not anything is NaN."""
    compiled = compile(deep(), "inductor", check=False)
    expected = compiled(X, T)
    monkeypatch.setattr("tfmq_fx.conversion.models.is_finite", lambda inputs: False)
    monkeypatch.setattr(compiled, "reference", lambda: None)
    assert torch.equal(compiled(X, T), expected)
    found = compiled(spoiled(math.nan), T)
    assert found[1].isnan().all() and torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])
    ((y,), x) = (torch.ones(2, 3),), torch.tensor([[1.0], [math.nan]])
    for found in (with_nan(y, [x], [True]), with_nan(y, [y, x[1]], [True, False])):
        assert found[1].isnan().all()
    meta = with_nan(y.to("meta"), [x.to("meta"), x.to("meta")], [True, False])
    assert meta.shape == y.shape and meta.device.type == "meta"  # nothing waits for values
