"""soft: a layer whose rounding is learnt starts as the layer it stands for and ends on its grid."""

import pytest
import torch
from torch import nn

from tests.quant.test_modules import LAYERS, make, quantized
from tfmq_fx.core.config import ReconstructionSpec
from tfmq_fx.core.presets import resolve
from tfmq_fx.quant.adaround import (
    AdaRoundLayer,
    Batch,
    learn,
    nearest_of,
    start_of,
    with_float_inputs,
)


def soft_of(layer, made, *, quantize_input=False):
    return AdaRoundLayer(made, start_of(made, layer.weight.detach()), quantize_input=quantize_input)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_deciding_at_once_gives_the_layer_back(name, bits):
    layer, x = make(name)
    made = quantized(layer, bits=bits)
    soft = soft_of(layer, made)
    back = soft.decided()
    assert torch.equal(back.weight_codes(), made.weight_codes())
    assert torch.equal(back(x), made(x)) and back is not made
    assert soft(x).shape == made(x).shape


@pytest.mark.parametrize("name", ["linear", "linear without bias", "conv2d"])
def test_of_fp8_layers_the_bias_alone_is_learnt(name):
    layer, x = make(name)
    made = quantized(layer, weight_format="fp8")
    soft = soft_of(layer, made)
    assert soft.rounding is None and torch.equal(soft(x), made(x))
    batch = Batch((x,), (layer(x).detach(),))
    stopped = learn(
        Tupled(soft),
        [soft],
        [batch],
        before=1.0,
        iters=3,
        learning_rate=0.1,
        regularization=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    back = soft.decided()
    assert stopped is None and torch.equal(back.codes, made.codes)
    assert back.bias is None if made.bias is None else not torch.equal(back.bias, made.bias)


def test_it_starts_at_the_float_weight_where_the_layer_is_rounded_to_nearest():
    layer, _ = make("linear")
    made = quantized(layer, bits=4)
    assert torch.equal(start_of(made, layer.weight.detach()), layer.weight.detach())


def test_it_starts_at_codes_that_are_not_the_nearest_ones():
    layer, _ = make("linear")
    made = quantized(layer, bits=4)
    codes = made.weight_codes().float() + made.weight_zero[:, None].float()
    moved = torch.where(codes > 7, codes - 1, codes + 1)
    grid = soft_of(layer, made).rounding.grid
    made.set_weight(moved, grid)
    soft = soft_of(layer, made)
    assert torch.equal(soft.rounding.codes(), moved)
    # less than half a step from the code, on the side of the weight
    start = start_of(made, layer.weight.detach())
    assert bool(((start - made.weight).abs() < 0.5 * made.weight_scale[:, None]).all())
    toward = (start - made.weight).sign() == (layer.weight.detach() - made.weight).sign()
    assert bool(toward.all())


def test_inputs_are_rounded_straight_through():
    layer, x = make("conv2d")
    made = quantized(layer, act_bits=4)
    made.set_static_range(0.5, 8)
    soft = soft_of(layer, made, quantize_input=True)
    x.requires_grad_()
    y = soft(x)
    seen = made.quantized_input(x.detach())
    weight = soft.rounding.soft().view(soft.shape)
    # x + (q - x) is q up to one float32 rounding of |x| <= 4, times 36 products with |w| <= 0.5
    expected = made.apply_op(seen, weight, soft.bias)
    assert float((y - expected).detach().abs().max()) <= 36 * 0.5 * 4 * 2**-23
    y.sum().backward()
    ones = torch.ones_like(y)
    (through,) = torch.autograd.grad(made.apply_op(x, weight.detach(), None), x, ones)
    torch.testing.assert_close(x.grad, through)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act_bits", [None, 8])
def test_half_precision_layers_can_be_learnt(dtype, act_bits):
    layer, x = make("linear")
    made = quantized(layer, bits=4, act_bits=act_bits).to(dtype)
    soft = soft_of(layer.to(dtype), made, quantize_input=True)
    y = soft(x.to(dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert float(soft.rounding.alpha.grad.abs().sum()) > 0


def correlated(rows, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width // 3, width, generator=generator)
    return torch.randn(rows, width // 3, generator=generator) @ mix


class Tupled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return (self.layer(x),)


def relative(layer, x, target):
    """Squared error of a layer's output relative to its target."""
    with torch.no_grad():
        return float((layer(x) - target).square().mean() / target.square().mean())


def learnt(
    seed=0,
    iters=600,
    learning_rate=1e-2,
    x=None,
    dtype=torch.float32,
    stopped=None,
    regularization=1.0,
):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layer = nn.Linear(12, 16).requires_grad_(False).to(dtype)
    made = quantized(layer, bits=3)
    x = correlated(64, 12).to(dtype) if x is None else x
    soft = soft_of(layer, made)
    found = learn(
        Tupled(soft),
        [soft],
        [Batch((part,), (layer(part),)) for part in x.split(32)],
        before=relative(made, correlated(64, 12).to(dtype), layer(correlated(64, 12).to(dtype))),
        iters=iters,
        learning_rate=learning_rate,
        regularization=regularization,
        generator=torch.Generator().manual_seed(seed),
    )
    assert found == stopped
    return layer, made, soft, x


# The settings of the presets, and those that block reconstruction was published with.
SHIPPED = ReconstructionSpec()
PUBLISHED = resolve("tfmq").reconstruction


@pytest.mark.parametrize(
    ("iters", "spec"),
    [
        (2000, SHIPPED),
        pytest.param(20_000, PUBLISHED, marks=[pytest.mark.slow, pytest.mark.sample]),
    ],
)
def test_learning_lowers_the_output_error_and_decides(iters, spec):
    assert spec.iters in (0, iters) and spec.regularization == 30
    layer, made, soft, x = learnt(
        iters=iters, learning_rate=spec.learning_rate, regularization=spec.regularization
    )
    decided = soft.decided()
    before = (made(x) - layer(x)).square().sum()
    after = (decided(x) - layer(x)).square().sum()
    # 3-bit nearest rounding is blind to correlated inputs; learning gains far more than half
    assert after < before / 2
    assert soft.rounding.decided() >= 0.95
    assert torch.equal(decided.weight_scale, made.weight_scale)
    steps = (decided.weight - layer.weight).abs() / made.weight_scale[:, None]
    assert float(steps.max()) <= 1 + 2**-18  # up or down, never further, and float32 rounding


def test_learning_is_deterministic_for_a_seed():
    codes = [learnt(seed=seed, iters=50)[2].rounding.alpha.detach() for seed in (0, 0, 1)]
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])


def test_the_loss_does_not_depend_on_the_size_of_the_output():
    def alpha(factor):
        layer, made, _, x = learnt(iters=0)
        soft = soft_of(layer, made)

        class Times(nn.Module):
            def forward(self, x):
                return (factor * soft(x),)

        learn(
            Times(),
            [soft],
            [Batch((x,), (factor * layer(x),))],
            before=0.01,
            iters=20,
            learning_rate=1e-2,
            regularization=1.0,
            generator=torch.Generator().manual_seed(0),
        )
        return soft.rounding.alpha.detach()

    # powers of two scale floating point exactly, so that errors relative to the targets are equal
    assert torch.equal(alpha(1.0), alpha(2.0**10))


def test_learning_stops_where_the_loss_is_nan_and_says_so():
    x = correlated(64, 12)
    x[:, 3] = float("nan")
    *_, soft, _ = learnt(x=x, iters=5, stopped="the loss became nan at step 0 of 5")
    assert bool(torch.isfinite(soft.rounding.alpha).all())


def test_a_learning_rate_beyond_all_bounds_still_gives_codes_on_the_grid():
    _, _, soft, _ = learnt(
        iters=3, learning_rate=1e30, stopped="the loss became inf at step 1 of 3"
    )
    codes = soft.decided().weight_codes()
    assert codes.shape == (16, 12)


def weighted_loss(weights, values):
    """The gradient-free part of `learn`'s loss: squares of residuals over those of targets."""
    batch = Batch((), (torch.tensor(values),), weights)
    (residual,) = batch.residuals([torch.zeros(len(values))])
    power = float(batch.power()[0])
    assert abs(power - round(power)) < 1e-12  # the square of a root, in float64
    return float(residual.square().sum()), round(power)


def test_weights_multiply_squared_errors_of_their_samples():
    # powers of two and their roots are exact
    assert weighted_loss(torch.tensor([4.0, 0.25]), [1.0, 2.0]) == (4 + 1, 4 + 1)
    # two rows for each sample stand together
    assert weighted_loss(torch.tensor([4.0, 0.25]), [1.0, 1.0, 2.0, 4.0]) == (13, 13)
    # rows that are no samples, and no weights
    assert weighted_loss(torch.tensor([4.0, 0.25]), [1.0, 1.0, 2.0]) == (6, 6)
    assert weighted_loss(None, [1.0, 1.0, 2.0]) == (6, 6)


def test_squares_of_huge_values_do_not_overflow():
    batch = Batch((), (torch.full((4,), 1e30),))
    assert float(batch.power()[0]) == pytest.approx(4e60, rel=1e-6)  # float32 of 1e30


def test_nearest_rounding_on_the_grid_of_a_layer():
    layer, x = make("linear")
    made = quantized(layer, bits=4)
    shifted = quantized(layer, bits=4)
    codes = shifted.weight_codes().float() + shifted.weight_zero[:, None].float()
    shifted.set_weight(torch.where(codes > 7, codes - 1, codes + 1), shifted.grid())
    shifted.bias = shifted.bias + 1
    nearest = nearest_of(shifted, layer.weight, layer.bias)
    assert torch.equal(nearest.codes, made.codes) and torch.equal(nearest.bias, layer.bias)
    assert torch.equal(nearest(x), made(x)) and not torch.equal(nearest(x), shifted(x))


def test_a_layer_with_float_inputs_shares_tensors_and_rounds_weights_alone():
    layer, x = make("conv2d")
    made = quantized(layer, bits=4, act_bits=4)
    made.set_static_range(0.5, 8)
    free = with_float_inputs(made)
    assert free.codes is made.codes and made.act_bits == 4
    assert torch.equal(free(x), made.apply_op(x, made.weight, made.bias))
    free.set_weight(torch.zeros(made.weight_shape), made.grid())
    assert free.codes is not made.codes and bool(made.codes.any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_learning_lowers_the_error_of_half_precision_layers(dtype):
    layer, made, soft, x = learnt(iters=600, dtype=dtype)
    decided = soft.decided()
    assert decided.bias.dtype == dtype and decided(x).dtype == dtype
    assert relative(decided, x, layer(x)) < relative(made, x, layer(x)) / 2
