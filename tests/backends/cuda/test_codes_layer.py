"""Layers on codes on CUDA: torch's own product, and the operator that they call."""

import pytest
import torch
from torch import nn

from tests.backends.codes.test_layers import SCALE, codes_of, lowered, quantized
from tests.toys import seeded
from tfmq_fx.backends.codes.choice import Choice
from tfmq_fx.backends.codes.problem import Tile
from tfmq_fx.backends.cuda.conv import conv2d
from tfmq_fx.backends.saturation import onednn_is_exact

TORCH = Choice("torch", Tile())


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_torchs_own_product_gives_the_same(kind):
    # On the CPU it is oneDNN's, which may saturate in 16 bits with weights of more than 6.
    bits = 8 if onednn_is_exact() else 6
    if kind == "conv":
        layer, x = quantized(seeded(nn.Conv2d, 32, 16, 1), bits=bits), torch.randn(3, 32, 4, 6)
    else:
        layer, x = quantized(seeded(nn.Linear, 32, 16), bits=bits), torch.randn(3, 24, 32)
    ours, other = lowered(layer, x), lowered(layer, x, TORCH)
    codes, row = codes_of(ours, x, SCALE), torch.randn(3, 16)
    assert torch.equal(ours(codes, SCALE, row), other(codes, SCALE, row))


@pytest.mark.parametrize("engine, split, takes", [
    ("triton", 1, True), ("triton", 2, False), ("torch", 1, False),
])  # fmt: skip
def test_only_a_kernel_that_shares_no_sums_takes_a_second_segment(engine, split, takes):
    layer = quantized(seeded(nn.Linear, 12, 10))
    made = lowered(layer, torch.randn(3, 7, 12), Choice(engine, Tile(split=split)))
    assert made.takes_second_segment is takes


def test_the_op_passes_torchs_own_checks():
    layer = quantized(seeded(nn.Conv2d, 6, 4, 3, padding=1))
    x = torch.randn(2, 6, 5, 5)
    made = lowered(layer, x)
    arguments = (
        [codes_of(made, x, SCALE[:2])], [made.weight], [made.zero], [made.weight_scale],
        [made.offset], [SCALE[:2]], made.bias, None, None, None, 0, 0, [1, 1], [1, 1], [0],
        torch.float32, list(made.choice.tile),
    )  # fmt: skip
    torch.library.opcheck(conv2d, arguments, test_utils=("test_schema", "test_faketensor"))
