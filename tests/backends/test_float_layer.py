"""float_layer: what no kernel runs computes what its reference does, whatever its format."""

import pytest
import torch

from tests.quant.test_modules import FP8, make, quantized
from tfmq_fx.backends.float_layers import FloatLayer
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
