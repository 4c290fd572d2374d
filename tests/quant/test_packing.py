"""packing: codes come back exactly, and take the bytes that are announced."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tfmq_fx.quant.packing import pack, packed_size, unpack


@settings(deadline=None, max_examples=80)
@given(
    bits=st.integers(2, 8),
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_codes_come_back_in_the_bytes_announced(bits, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, shape, generator=generator)
    packed = pack(codes.float(), bits)
    assert packed.dtype == torch.uint8 and packed.shape == (packed_size(codes.numel(), bits),)
    restored = unpack(packed, bits, codes.shape)
    assert restored.dtype == torch.uint8 and torch.equal(restored.long(), codes)


@pytest.mark.parametrize(
    ("count", "bits", "size"),
    [
        (7, 2, 2),
        (8, 2, 2),
        (9, 2, 3),
        (7, 4, 4),
        (8, 4, 4),
        (7, 3, 3),
        (8, 3, 3),
        (9, 3, 4),
        (5, 6, 4),
        (7, 8, 7),
        (0, 4, 0),
    ],
)
def test_sizes(count, bits, size):
    assert packed_size(count, bits) == size


def test_the_first_code_lies_lowest():
    assert pack(torch.tensor([1, 2, 15]), 4).tolist() == [0x21, 0x0F]
    assert pack(torch.tensor([1, 2, 3, 0, 3]), 2).tolist() == [0b00111001, 0b11]
    # 8 codes of 3 bits in 24 bits, the first in the lowest
    codes = [1, 2, 3, 4, 5, 6, 7, 0]
    assert pack(torch.tensor(codes), 3).tolist() == list(
        sum(code << (3 * i) for i, code in enumerate(codes)).to_bytes(3, "little")
    )
