"""Layers as patterns for oneDNN compute what quantized layers do, before they are compiled."""

import pytest
import torch
from torch import nn

from tests.backends.codes.test_layers import SCALE, quantized
from tests.toys import seeded
from tfmq_fx.backends.cpu.onednn import OnednnLayer
from tfmq_fx.core.stages import Stage

LAYERS = {
    "linear": (lambda: seeded(nn.Linear, 33, 20), (3, 7, 33)),
    "linear without tokens": (lambda: seeded(nn.Linear, 16, 5, bias=False), (3, 16)),
    "3x3": (lambda: seeded(nn.Conv2d, 3, 10, 3, padding=1), (3, 3, 6, 5)),
    "groups": (lambda: seeded(nn.Conv2d, 8, 8, 3, stride=2, groups=4, bias=False), (3, 8, 7, 8)),
    "uneven": (lambda: seeded(nn.Conv2d, 5, 6, (3, 1), padding=(2, 0), dilation=(1, 2)),
               (3, 5, 6, 7)),
    "same": (lambda: seeded(nn.Conv2d, 5, 6, (2, 3), padding="same"), (3, 5, 6, 7)),
}  # fmt: skip


def near(layer, made, x, scale, dtype=torch.float32):
    """Assert equality up to the order of sums: of integers in units of the output here, of rounded
    floats there; up to 300 terms of at most 255 steps each, rounded by 2**-24 of their sum."""
    expected = layer(x, scale)
    found = made(x, scale)
    assert found.dtype == expected.dtype == dtype and found.shape == expected.shape
    size = layer.weight.abs().flatten(1).sum(1).max() * 255 * SCALE.max() * 300
    # x / s is rounded once, as is x times 1 / s: beside a boundary a code is one off
    step = float(layer.weight.abs().max() * SCALE.max())
    apart = (found - expected).abs().float()
    assert apart.max() <= step + float(size) * 2**-24
    assert apart.median() <= float(size) * 2**-24


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("ranges", ["per timestep", "static"])
@pytest.mark.parametrize("bits, act_bits", [(8, 8), (4, 8), (3, 6)])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_computes_what_the_reference_does(name, bits, act_bits, ranges):
    make, shape = LAYERS[name]
    layer = quantized(make(), bits=bits, act_bits=act_bits, ranges=ranges)
    made = OnednnLayer(layer)
    assert made.stage is Stage.LOWERED and made.weight.dtype == torch.int8
    assert not made.weight_zero.any()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    near(layer, made, x, SCALE if ranges == "per timestep" else None)


@torch.no_grad()
def test_half_precision_comes_back_as_it_came():
    layer = quantized(seeded(nn.Linear, 16, 8)).half()
    made = OnednnLayer(layer)
    x = torch.randn(3, 5, 16).half()
    found, expected = made(x, SCALE), layer(x, SCALE)
    assert found.dtype == torch.float16
    # a code off by one, and rounding of x / s and of the result by 2**-11
    step = float(layer.weight.float().abs().max() * SCALE.max())
    assert (found - expected).abs().max() <= 16 * step + 2**-10 * expected.abs().max()


def test_the_original_layer_keeps_its_tensors():
    layer = quantized(seeded(nn.Conv2d, 6, 4, 3, padding=1))
    made = OnednnLayer(layer)
    mine = {b.data_ptr() for b in layer.buffers()}
    assert not mine & {b.data_ptr() for b in made.buffers() if b is not None}
    assert made.in_channels == 6 and made.stride == (1, 1)  # what pipelines read
    assert sum(b.nbytes for b in made.buffers()) < 4 * 6 * 9 + 4 * (4 + 8 + 4) + 1
