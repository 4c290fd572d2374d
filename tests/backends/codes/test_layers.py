"""Layers on codes compute what the quantized layers do, on the CPU through the ops' references."""

import pytest
import torch
from torch import nn

from tests.backends.codes.nets import whole_sums
from tests.toys import seeded
from tfmq_fx.backends.codes.arithmetic import (
    stored_zero,
)
from tfmq_fx.backends.codes.layers import ConcatLayer, problem_of, quantize_input
from tfmq_fx.backends.cuda.autotune import untimed_choice
from tfmq_fx.backends.cuda.codes_layer import CudaCodesLayer
from tfmq_fx.core.layer_config import WeightSpec
from tfmq_fx.quant.affine import FP8, weight_qparams
from tfmq_fx.quant.gptq import round_nearest
from tfmq_fx.quant.modules import QuantConv2d, QuantLinear

SCALE = torch.tensor([0.02, 0.05, 0.03])


def quantized(source, *, bits=8, act_bits=8, format="int", ranges="per timestep", zero=100):
    """A quantized layer of `source` with weights rounded to nearest."""
    kind = QuantLinear if isinstance(source, nn.Linear) else QuantConv2d
    layer = kind.from_float(
        source,
        weight_bits=bits,
        act_bits=act_bits,
        per_timestep=ranges == "per timestep",
        dynamic=ranges == "dynamic",
        weight_format=format,
        act_format=format,
    )
    grid = weight_qparams(source.weight, WeightSpec(bits=bits, format=format, search=1))
    codes = round_nearest(source.weight.detach().float().flatten(1), grid)
    layer.set_weight(codes.view(source.weight.shape), grid)
    if ranges != "dynamic":
        levels = 2**act_bits - 1
        layer.set_static_range(0.03, 0 if format == "fp8" else zero * levels // 255)
    return layer.eval()


def lowered(layer, x, choice=None):
    problem = problem_of(layer, x.shape)
    return CudaCodesLayer(layer, x.dtype, problem, choice or untimed_choice(problem, x.dtype))


def codes_of(made, x, scale):
    return quantize_input(x, scale, made.zero_point, made.levels, made.codes_dtype, made.pads)


def scale_for(layer, made, x):
    if layer.dynamic:
        return layer.measured_scale(x)
    return SCALE[: len(x)] if layer.per_timestep else made.act_scale


def tolerance(layer, x, scale):
    """Sums of the reference are of floats: each of up to 300 terms is rounded by 2**-24 of what the
    sum may reach; the kernel's are exact."""
    size = layer.weight.abs().flatten(1).sum(1).max() * 255 * scale.max() * 500
    return float(size) * 2**-24


LAYERS = {
    "linear": (lambda: seeded(nn.Linear, 33, 20), (3, 7, 33)),
    "linear without tokens": (lambda: seeded(nn.Linear, 16, 5, bias=False), (3, 16)),
    "3x3": (lambda: seeded(nn.Conv2d, 12, 10, 3, padding=1), (3, 12, 6, 5)),
    "stride": (lambda: seeded(nn.Conv2d, 9, 8, 3, stride=2, padding=1), (3, 9, 7, 8)),
    "1x1": (lambda: seeded(nn.Conv2d, 16, 32, 1), (3, 16, 4, 4)),
    "dilation": (lambda: seeded(nn.Conv2d, 5, 6, 3, dilation=2, padding=2), (3, 5, 7, 6)),
    "same": (lambda: seeded(nn.Conv2d, 5, 6, (2, 3), padding="same"), (3, 5, 6, 7)),
    "uneven": (
        lambda: seeded(nn.Conv2d, 5, 6, (3, 1), padding=(2, 0), stride=(1, 2)),
        (3, 5, 6, 7),
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("ranges", ["per timestep", "static", "dynamic"])
@pytest.mark.parametrize("format, bits, act_bits", [
    ("int", 8, 8), ("int", 4, 8), ("int", 3, 6), ("int", 6, 4), ("fp8", 8, 8),
])  # fmt: skip
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_the_reference_does(name, format, bits, act_bits, ranges):
    make, shape = LAYERS[name]
    layer = quantized(make(), bits=bits, act_bits=act_bits, format=format, ranges=ranges)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = lowered(layer, x)
    scale = scale_for(layer, made, x)
    found = made(codes_of(made, x, scale), scale)
    expected = layer(x, scale if layer.per_timestep else None)
    assert found.shape == expected.shape and found.dtype == x.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=tolerance(layer, x, scale))
    assert made.weight.dtype == (
        FP8 if format == "fp8" else torch.uint8 if bits <= 4 else torch.int8
    )


@pytest.mark.parametrize("format", ["int", "fp8"])
def test_rows_and_residuals_are_added(format):
    layer = quantized(seeded(nn.Conv2d, 12, 10, 3, padding=1), format=format)
    x, row, residual = torch.randn(3, 12, 6, 5), torch.randn(3, 10), torch.randn(3, 10, 6, 5)
    made = lowered(layer, x)
    found = made(codes_of(made, x, SCALE), SCALE, row, residual)
    expected = layer(x, SCALE) + row[:, :, None, None] + residual
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=tolerance(layer, x, SCALE))
    layer = quantized(seeded(nn.Linear, 12, 10), format=format)
    x, residual = torch.randn(3, 7, 12), torch.randn(3, 7, 10)
    made = lowered(layer, x)
    found = made(codes_of(made, x, SCALE), SCALE, row[:, None], residual)
    expected = layer(x, SCALE) + row[:, None] + residual
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=tolerance(layer, x, SCALE))


@pytest.mark.parametrize("format", ["int", "fp8"])
def test_results_can_be_the_codes_of_the_next_layer(format):
    first = quantized(seeded(nn.Linear, 12, 16), format=format)
    second = quantized(seeded(nn.Linear, 16, 8), format=format, zero=30)
    x = torch.randn(3, 7, 12)
    a, b = lowered(first, x), lowered(second, torch.randn(3, 7, 16))
    expected = codes_of(b, a(codes_of(a, x, SCALE), SCALE), SCALE * 2)
    a.requantizes(b.zero_point, b.levels, b.codes_dtype)
    found = a(codes_of(a, x, SCALE), SCALE, out_scale=SCALE * 2)
    assert found.dtype == expected.dtype and torch.equal(found.float(), expected.float())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_two_segments_are_the_sum_of_two_layers(kind, bits):
    if kind == "conv":
        sources = [seeded(nn.Conv2d, n, 6, 3, padding=1, bias=n == 40) for n in (40, 70)]
        x, dim = torch.randn(3, 110, 5, 5), 1
    else:
        sources = [seeded(nn.Linear, n, 6, bias=n == 40) for n in (40, 70)]
        x, dim = torch.randn(3, 9, 110), 2
    layers = [quantized(source, bits=bits) for source in sources]
    parts = x.split([40, 70], dim)
    whole = [
        whole_sums(problem_of(la, part.shape), part.dtype)
        for la, part in zip(layers, parts, strict=True)
    ]
    made = [lowered(*each) for each in zip(layers, parts, whole, strict=True)]
    scales = [SCALE, SCALE * 1.5]
    codes = [codes_of(m, p, s) for m, p, s in zip(made, parts, scales, strict=True)]
    found = ConcatLayer(*made)(codes[0], scales[0], codes[1], scales[1])
    expected = layers[0](parts[0], scales[0]) + layers[1](parts[1], scales[1])
    bound = tolerance(layers[0], x, scales[1]) + tolerance(layers[1], x, scales[1])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=bound)


def test_codes_are_those_of_the_reference():
    layer = quantized(seeded(nn.Conv2d, 4, 4, 3, padding=(1, 2)))
    x = torch.randn(3, 4, 5, 6) * 3
    made = lowered(layer, x)
    codes = codes_of(made, x, SCALE)
    assert codes.shape == (3, 7, 10, 4) and codes.is_contiguous() and codes.dtype == torch.int8
    inner = codes[:, 1:-1, 2:-2].permute(0, 3, 1, 2).float() + 128 - 100
    assert torch.equal(inner, layer.input_codes(x, SCALE.view(3, 1, 1, 1)))
    assert (codes[:, 0] == stored_zero(100, torch.int8)).all() and stored_zero(100, FP8) == 0


def test_codes_are_contiguous_wherever_the_input_lies():
    layer = quantized(seeded(nn.Linear, 8, 4))
    images = torch.randn(3, 8, 5, 6)
    tokens = images.flatten(2).transpose(1, 2)
    made = lowered(layer, tokens)
    assert not tokens.is_contiguous() and codes_of(made, tokens, SCALE).is_contiguous()
    bound = tolerance(layer, tokens, SCALE)
    found = made(codes_of(made, tokens, SCALE), SCALE)
    torch.testing.assert_close(found, layer(tokens, SCALE), rtol=1e-6, atol=bound)


def test_the_original_layer_keeps_its_tensors():
    layer = quantized(seeded(nn.Conv2d, 6, 4, 3, padding=1))
    made = lowered(layer, torch.randn(2, 6, 5, 5))
    mine = {b.data_ptr() for b in layer.buffers()}
    assert not mine & {b.data_ptr() for b in made.buffers() if b is not None}
    assert made.in_channels == 6 and made.stride == (1, 1)  # what pipelines read
