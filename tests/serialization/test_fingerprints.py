"""fingerprints: equal content in any layout, device or JSON; any change of any element."""

import json

import pytest
import torch
from torch import nn

from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.serialization.fingerprints import Fingerprint, is_readable

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.complex128,
]
SHAPES = [(), (0,), (3,), (5, 7), (2, 9), (20, 10, 3, 3)]


class Packed(torch.Tensor):
    """A tensor whose memory may mean anything."""


def values(shape, dtype):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    return drawn > 0 if dtype is torch.bool else drawn.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_matches_its_copies_and_what_json_says_of_it(shape, dtype):
    value = values(shape, dtype)
    found = Fingerprint.of(value)
    assert found.matches(value.clone()) and found.matches(nn.Parameter(value, False))
    restored = Fingerprint.from_dict(json.loads(json.dumps(found.to_dict())), "w")
    assert restored.matches(value) and restored.checksum == found.checksum
    assert restored.sample.dtype == dtype and restored.shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_element_counts(dtype):
    value = values((5, 7), dtype)
    found = Fingerprint.of(value)
    for i in range(value.numel()):
        other = value.clone()
        other.view(-1)[i] *= 1.5
        assert not found.matches(other), i


def test_the_order_of_elements_counts():
    """Whole channels that change places, or values that cancel: a plain sum sees neither."""
    value = values((20, 10, 3, 3), torch.float32)
    found = Fingerprint.of(value)
    for other in (value.flip(0), value.flip(1), value.roll(1, 0), value.transpose(2, 3)):
        assert not found.matches(other.contiguous())
    swapped = value.clone()
    swapped[[7, 8]] = value[[8, 7]]  # no element of the sample
    assert not found.matches(swapped)
    words = torch.arange(1 << 17)  # more than one run
    found = Fingerprint.of(words)
    for moves in ({11: 1, 12: -1}, {11: 1, 12: -2, 13: 1}, {70_001: 5, 4_001: -5}):
        other = words.clone()
        for place, by in moves.items():
            other[place] += by
        assert not found.matches(other), moves
    shifted = words.clone()
    shifted[100:200], shifted[65_636:65_736] = words[65_636:65_736], words[100:200]
    assert not found.matches(shifted)  # at the same places of two runs
    assert found.matches(words.clone())


def test_bytes_beyond_the_last_word_count_in_order():
    value = torch.arange(11, dtype=torch.uint8)
    found = Fingerprint.of(value)
    for other in (value[[*range(8), 9, 8, 10]], value[[*range(8), 8, 9, 9]]):
        assert not found.matches(other)


def test_the_memory_layout_does_not_count():
    value = values((20, 10, 3, 3), torch.float32)
    found = Fingerprint.of(value)
    assert found.matches(value.to(memory_format=torch.channels_last))
    assert Fingerprint.of(value.to(memory_format=torch.channels_last)).matches(value)
    wide = torch.cat([value[:1], value])
    assert found.matches(wide[1:]) and found.matches(value.transpose(0, 1).clone().transpose(0, 1))
    odd = torch.cat([torch.ones(1).half(), value.half().flatten()])[1:]  # 2 bytes off 8
    assert Fingerprint.of(value.half()).matches(odd.view(value.shape))


def test_a_cast_is_no_change_and_other_values_after_a_cast_are():
    value = values((5, 7), torch.float32)
    found = Fingerprint.of(value)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert found.matches(value.to(dtype))
        assert not found.matches((value * 1.1).to(dtype))


def test_nan_equals_itself_and_shapes_count():
    value = torch.tensor([float("nan"), -0.0, 1.0])
    found = Fingerprint.of(value)
    assert found.matches(value.clone())
    assert not found.matches(torch.tensor([float("nan"), 0.0, 1.0]))
    assert not found.matches(value[None])


def test_what_has_no_content_or_hides_it():
    found = Fingerprint.of(torch.ones(3))
    assert found.matches(torch.ones(3, device="meta"))  # nothing there that could differ
    packed = torch.ones(3).as_subclass(Packed)
    assert not is_readable(packed) and not found.matches(packed)
    assert not is_readable(torch.ones(3, device="meta"))
    assert not is_readable(torch.eye(3).to_sparse())


def test_damaged_json_is_refused():
    data = Fingerprint.of(torch.ones(3)).to_dict()
    for broken in ({**data, "dtype": "device"}, {k: v for k, v in data.items() if k != "shape"}):
        with pytest.raises(ArtifactError):
            Fingerprint.from_dict(broken, "w")
