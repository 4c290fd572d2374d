"""The arithmetic of codes: quantization rounds from float32, and packing loses nothing."""

import pytest
import torch

from tfmq_fx.backends.codes.arithmetic import pack_weight, packed_half, quantize, unpack_weight


def test_half_precision_is_rounded_from_float32():
    x = torch.randn(3, 8).to(torch.bfloat16)
    expected = torch.round(x.float() * (1 / 0.02)) + 100
    found = quantize(x, torch.tensor(0.02), 100, 255, torch.int8).float() + 128
    assert torch.equal(found, expected.clamp(0, 255))


@pytest.mark.parametrize("channels", [1, 4, 31, 32, 64, 65, 96, 128, 320, 640, 1000])
def test_packing_loses_nothing(channels):
    half = packed_half(channels)
    codes = torch.randint(0, 16, (3, 2, 2, channels))
    zero = torch.tensor([0, 8, 15], dtype=torch.uint8)
    packed = pack_weight(codes, half)
    assert packed.dtype == torch.uint8 and packed.shape[3] % half == 0
    expected = codes - zero.long()[:, None, None, None]
    assert torch.equal(unpack_weight(packed, half, channels, zero).long(), expected)


@pytest.mark.parametrize("channels, half", [(320, 32), (640, 64), (1280, 64), (32, 32), (960, 64)])
def test_runs_are_as_wide_as_little_waste_allows(channels, half):
    assert packed_half(channels) == half
    assert (-(-channels // (2 * half)) * 2 * half - channels) / channels < 0.15 or channels < 64
