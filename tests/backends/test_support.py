"""kernels: which layers run on integers here, and what is said of the others."""

import pytest
from torch import nn

from tests.quant.test_modules import FP8, quantized
from tfmq_fx.backends.support import keeps_integer_weights, obstacle


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"act_bits": 8}, None),
        ({"act_bits": 8, "dynamic": True}, None),
        (FP8, "no fp8 kernel on cpu"),
        (FP8 | {"dynamic": True}, "no fp8 kernel on cpu"),
        ({"weight_format": "fp8"}, "no fp8 kernel on cpu"),
        ({}, "activations are in floating point"),
    ],
    ids=str,
)
@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(4, 4, 3)])
def test_formats_and_dynamic_ranges_have_a_reason(layer, how, reason):
    made = quantized(layer, **how)
    assert obstacle(made) == reason
    assert keeps_integer_weights(made) == (how == {} and isinstance(layer, nn.Linear))
