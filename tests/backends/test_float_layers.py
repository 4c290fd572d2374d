"""float_layers: layers that no kernel runs, with inputs rounded as by the reference or not."""

import pytest
import torch
from torch import nn

from tests.quant.test_modules import FP8, make, quantized
from tfmq_fx.backends.cpu.kernels import fast_dtype
from tfmq_fx.backends.float_layers import DequantizedLayer, FloatLayer
from tfmq_fx.core.stages import Stage

DYNAMIC = {"act_bits": 8, "dynamic": True}


@pytest.mark.parametrize("how", [FP8, FP8 | {"dynamic": True}, DYNAMIC, {"weight_format": "fp8"}])
@pytest.mark.parametrize("name", ["linear", "linear without bias", "conv1d", "conv2d"])
@torch.no_grad()
def test_formats_and_dynamic_ranges_are_the_reference_in_other_order(name, how):
    layer, x = make(name)
    source = quantized(layer, **how)
    source.act_scale.fill_(0.01)
    lowered = FloatLayer(source)
    assert lowered.stage is Stage.LOWERED
    # up to 36 products of |x| <= 4 and |w| <= 0.5, scaled before the sum instead of after it
    bound = 36 * 4 * 0.5 * 3 * 2**-24
    torch.testing.assert_close(lowered(x), source(x), rtol=0, atol=bound)
    half, x = FloatLayer(source.to(torch.bfloat16)), x.to(torch.bfloat16)
    # inputs, weights and the result are rounded by 2^-8: |y| <= 4 and 36 products at random
    bound = 2**-8 * (4 + 2 * 6 * 4 * 0.5)
    assert half(x).dtype == torch.bfloat16
    torch.testing.assert_close(half(x).float(), source(x).float(), rtol=0, atol=bound)


@pytest.mark.parametrize("how", [{}, {"act_bits": 8}, FP8, {"weight_format": "fp8"}, {"bits": 4}])
@pytest.mark.parametrize("name", ["linear", "linear without bias", "conv1d", "conv2d groups"])
@torch.no_grad()
def test_inputs_are_not_rounded_and_weights_are_those_of_the_codes(name, how):
    layer, x = make(name)
    source = quantized(layer, **how)
    lowered = DequantizedLayer(source, torch.float32)
    assert lowered.stage is Stage.LOWERED
    expected = source.apply_op(x, source.weight, source.bias)
    assert torch.equal(lowered(x), expected)
    assert torch.equal(lowered(x, torch.ones(len(x))), expected)  # a range is not needed


@torch.no_grad()
def test_products_are_of_the_dtype_and_results_of_the_inputs():
    layer, x = make("conv2d")
    source = quantized(layer, act_bits=8)
    exact, half = (DequantizedLayer(source, d) for d in (torch.float32, torch.bfloat16))
    assert half.dequantized.dtype == half.float_bias.dtype == torch.bfloat16
    found = half(x)
    assert found.dtype == torch.float32 and half(x.bfloat16()).dtype == torch.bfloat16
    # x, weights and the result are rounded by 2**-9 each, the bias too
    sizes = nn.functional.conv2d(
        x.abs(), source.weight.abs(), source.bias.abs(), padding=layer.padding
    )
    assert ((found - exact(x)).abs() <= 2**-9 * 3.1 * sizes).all() and not (found == exact(x)).all()


def test_codes_are_let_go_and_the_original_keeps_its_own():
    layer, _ = make("conv2d")
    source = quantized(layer, act_bits=8)
    before = source.codes.clone()
    lowered = DequantizedLayer(source, torch.float32)
    assert lowered.layer.codes.numel() == 0 and torch.equal(source.codes, before)
    assert lowered.padding == layer.padding and lowered.in_channels == layer.in_channels


@pytest.mark.parametrize("there", [True, False])
def test_the_fast_dtype_is_what_the_processor_multiplies(monkeypatch, there):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: there)
    assert fast_dtype() == (torch.bfloat16 if there else torch.float32)
