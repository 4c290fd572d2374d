import pytest
import torch

from tfmq_fx.core.strides import can_lay_out, kept_strides, laid_out

KEPT = [
    torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    torch.randn(2, 3, 4, 4, 4).to(memory_format=torch.channels_last_3d),
    torch.randn(4, 3).t(),
    torch.randn(2, 3, 4).permute(2, 0, 1),
    torch.randn(3, 1).expand(3, 5),
    torch.randn(1).expand(4, 4),
    torch.randn(10, 10)[:, :3],
]


@pytest.mark.parametrize("value", KEPT, ids=lambda v: str(v.stride()))
def test_layouts_come_back(value):
    again = laid_out(value.contiguous(), kept_strides(value))
    assert torch.equal(again, value) and again.stride() == value.stride()


def test_contiguous_and_wasteful_layouts_are_not_kept():
    assert kept_strides(torch.randn(3, 4)) is None
    assert kept_strides(torch.randn(1000, 1000)[:, :3]) is None
    assert kept_strides(torch.randn(9).unfold(0, 3, 1)) is None


def test_strides_that_overlap_or_take_much_memory_are_none():
    for shape, strides in (([2, 2], [1, 1]), ([2, 2], [1 << 40, 1]), ([4], [-1]), ([3, 3], [2, 1])):
        assert not can_lay_out(shape, strides)
