"""activation: each grid gives the nearest of its values, zeros stay zeros, rows get their scale."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.quant.activation import QuantActivation
from tfmq_fx.quant.affine import shared_zero_scales
from tfmq_fx.quant.modules import QuantLinear


def made(grid="uniform", bits=8, per_timestep=False, scale=1.0, zero=0):
    module = QuantActivation(bits=bits, grid=grid, per_timestep=per_timestep)
    module.set_static_range(scale, zero)
    return module


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=20)
@given(bits=st.sampled_from((4, 6, 8, 16)), seed=st.integers(0, 9))
def test_uniform_values_are_those_of_a_quantized_layer(bits, seed):
    x = drawn(3, 7, 5, seed=seed)
    low, high = x.amin((1, 2)), x.amax((1, 2))
    scale, zero = shared_zero_scales(low, high, bits=bits)
    layer = QuantLinear(
        weight_shape=(2, 5), weight_bits=8, act_bits=bits, per_timestep=True, bias=False
    )
    layer.set_static_range(1.0, zero)
    module = made(bits=bits, per_timestep=True, zero=zero)
    assert torch.equal(module(x, scale), layer.quantized_input(x, scale))
    # half a step; one rounding of 1 / scale and one of each product
    bound = scale.view(-1, 1, 1) * (0.5 + 2.0**-22 * 2**bits)
    assert bool(((module(x, scale) - x).abs() <= bound).all())


@settings(deadline=None, max_examples=30)
@given(
    bits=st.sampled_from((4, 5, 8, 16)),
    scale=st.sampled_from((1.0, 0.37, 1e-3)),
    share=st.floats(1e-6, 1.5),
)
def test_log2_values_are_the_nearest_power_by_logarithm(bits, scale, share):
    found = float(made("log2", bits=bits, scale=scale)(torch.tensor([[share * scale]])))
    code = min(max(round(-math.log2(share)), 0), 2**bits - 1)
    expected = 0.0 if code == 2**bits - 1 else scale * 2.0**-code
    near_a_tie = abs(-math.log2(share) % 1 - 0.5) < 1e-4
    assert near_a_tie or math.isclose(found, expected, rel_tol=1e-6)


def test_the_largest_log2_code_is_zero():
    x = torch.tensor([[0.0, 2.0**-14, 2.0**-14.4, 2.0**-14.6, 2.0**-15, 2.0**-140, -0.5, 3.0, 1.0]])
    found = made("log2", bits=4)(x)
    assert found.tolist() == [[0, 2.0**-14, 2.0**-14, 0, 0, 0, 0, 1, 1]]
    # 8 bits reach below what float32 holds: what is not 0 stays above it as far as it can
    assert made("log2", bits=8)(x)[0, :6].tolist() == [
        0,
        2.0**-14,
        2.0**-14,
        2.0**-15,
        2.0**-15,
        2.0**-126,
    ]


def test_zeros_stay_zeros_on_every_grid():
    x = torch.zeros(2, 3)
    rows, flags = torch.tensor([0.1, 0.2]), torch.tensor([1.0, 0.0])
    assert torch.equal(made(zero=3, scale=0.3)(x), x)
    assert torch.equal(made("log2")(x), x)
    assert torch.equal(made("adaptive", per_timestep=True)(x, rows, flags), x)


def test_the_choice_is_made_sample_by_sample():
    x = drawn(6, 4).abs()
    scale = torch.tensor([0.5, 0.25, 2.0])
    adaptive = made("adaptive", bits=4, per_timestep=True)
    found = adaptive(x, scale, torch.tensor([1.0, 0.0, 1.0]))
    log2 = made("log2", bits=4, per_timestep=True)(x, scale)
    uniform = made(bits=4, per_timestep=True)(x, scale)
    assert torch.equal(found[:2], log2[:2]) and torch.equal(found[4:], log2[4:])
    assert torch.equal(found[2:4], uniform[2:4]) and not torch.equal(log2, uniform)


@pytest.mark.parametrize("heads", [1, 3])
def test_heads_folded_into_the_batch_get_their_sample_s_scale(heads):
    x, scale = drawn(4, heads, 5, 2), torch.tensor([0.1, 0.2, 0.3, 0.4])
    module = made(bits=4, per_timestep=True, zero=7)
    assert torch.equal(module(x.flatten(0, 1), scale), module(x, scale).flatten(0, 1))


def test_rows_that_belong_to_no_sample_are_refused():
    module = made(per_timestep=True)
    with pytest.raises(ConfigError, match="5 rows of x do not belong to 2 samples"):
        module(drawn(5, 2), torch.ones(2))
    with pytest.raises(ConfigError, match="needs a row for each"):
        module(drawn(4, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"grid": "cubic", "bits": 8, "per_timestep": False},
        {"grid": "uniform", "bits": 1, "per_timestep": False},
        {"grid": "adaptive", "bits": 8, "per_timestep": False},
    ],
)
def test_grids_that_do_not_exist_are_refused(options):
    with pytest.raises(ConfigError):
        QuantActivation(**options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_in_and_out_with_float32_scales(dtype):
    module = made(bits=16, scale=2.0**-15, zero=2**15).to(dtype)
    assert module.act_scale.dtype == torch.float32 and module.act_zero.dtype == torch.int32
    x = drawn(3, 4).clamp(-0.9, 0.9).to(dtype)
    found = module(x)
    assert found.dtype == dtype
    # 16 bits over [-1, 1) are finer than either dtype down to 2**-4
    torch.testing.assert_close(found, x, rtol=2.0**-7, atol=2.0**-15)


def test_a_module_comes_back_from_its_spec():
    module = made("adaptive", bits=5, per_timestep=True, scale=0.2)
    again = QuantActivation.from_spec(module.spec())
    again.load_state_dict(module.state_dict())
    x, rows, flags = drawn(4, 3).abs(), torch.rand(4), torch.tensor([0.0, 1, 1, 0])
    assert torch.equal(again(x, rows, flags), module(x, rows, flags))
    assert torch.equal(copy.deepcopy(module)(x, rows, flags), module(x, rows, flags))
    assert repr(again) == repr(module) == "QuantActivation(5 bits adaptive, per timestep)"
    assert repr(made()) == "QuantActivation(8 bits uniform, static)"


def test_gradients_pass_straight_through():
    x = torch.tensor([[0.3, 0.0, 0.9, 5.0]], requires_grad=True)
    y = made(bits=4, scale=0.1)(x)
    with torch.no_grad():
        assert torch.equal(y, made(bits=4, scale=0.1)(x))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, 1.0, 1.0, 0.0]]))  # the last is clipped
    x.grad = None
    made("log2", bits=4)(x).sum().backward()
    # the value is at most 2**0.5 off, and so is its slope; 0 and what is clipped have none
    assert bool(torch.isfinite(x.grad).all()) and x.grad[0, 1] == 0 and x.grad[0, 3] == 0
    assert 2**-0.51 < float(x.grad[0, 0]) < 2**0.51


@pytest.mark.parametrize("grid", ["uniform", "log2", "adaptive"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(grid, bad):
    module = made(grid, per_timestep=grid == "adaptive", scale=0.1, zero=0)
    rows = (torch.full((2,), 0.1), torch.tensor([0.0, 1.0])) if grid == "adaptive" else ()
    x = torch.rand(2, 5)
    x[0, 3] = x[1, 2] = bad
    assert torch.equal(module(x, *rows).isfinite(), x.isfinite())
    x[0, 3] = x[1, 2] = 3e38  # large, and finite
    assert module(x, *rows).isfinite().all()


def test_a_scale_below_the_smallest_has_a_finite_inverse():
    assert made(scale=1e-42)(torch.zeros(3)).isfinite().all()
