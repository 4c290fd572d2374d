"""Conditions of a request are known again, and never mistaken for others."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tfmq_fx.prologue.condition_snapshot import Snapshot

SIZES = {"small": 8, "large": 1 << 15}  # elements; the latter 128 KiB
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
DTYPES += (torch.uint8, torch.int64, torch.bool)
WRITES: dict[str, Callable[[Tensor], object]] = {
    "copy_": lambda x: x.copy_(torch.ones_like(x)),
    "item": lambda x: x.__setitem__(-1, 5.0),
    "view": lambda x: x.view(2, -1)[1].zero_(),
    "data": lambda x: x.data.mul_(2),
    "detach": lambda x: x.detach().mul_(2),
    "new data": lambda x: setattr(x, "data", torch.ones_like(x)),
    "numpy": lambda x: np.multiply(x.numpy(), 2, out=x.numpy()),
    "storage": lambda x: x.untyped_storage().fill_(1),
    "resize": lambda x: x.resize_(4),
    "set": lambda x: x.set_(torch.ones_like(x)),
}


def draw(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", WRITES)
def test_every_way_of_writing_is_noticed(how: str, size: str) -> None:
    x, label = draw(SIZES[size]), torch.tensor([3])
    held = Snapshot([label, x])
    assert held.is_seen([label, x]) and held.matches([label, x])
    WRITES[how](x)
    assert not held.is_seen([label, x]) and not held.matches([label, x])
    assert not held.is_seen([label, x])  # being asked changes nothing


def test_what_is_held_is_a_copy() -> None:
    x = draw(8)
    held, before = Snapshot([x]), x.clone()
    x.zero_()
    assert torch.equal(held.contents[0], before) and held.nbytes() == before.nbytes
    x.copy_(before)  # back to what it was, at another version
    assert not held.is_seen([x]) and held.matches([x]) and held.is_seen([x])


def test_an_equal_tensor_is_known_and_then_seen() -> None:
    x = draw(8)
    held, other = Snapshot([x]), x.clone()
    assert not held.is_seen([other]) and held.matches([other])
    assert held.is_seen([other]) and not held.is_seen([x]) and held.matches([x])


def test_a_tensor_at_the_address_of_one_that_is_gone_is_another() -> None:
    memory = np.zeros(8, dtype=np.float32)
    x = torch.from_numpy(memory)
    held, gone = Snapshot([x]), weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None  # conditions are not kept alive
    memory[0] = 1.0
    y = torch.from_numpy(memory)
    assert not held.is_seen([y]) and not held.matches([y])


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(4, 2),
        torch.zeros(8, dtype=torch.float64),
        torch.zeros(8, dtype=torch.int32),  # the same bits
        torch.zeros(7),
        torch.zeros(8, device="meta"),
    ],
    ids=lambda x: f"{x.dtype}{tuple(x.shape)}{x.device}",
)
def test_shape_dtype_and_device_count(other: Tensor) -> None:
    assert not Snapshot([torch.zeros(8)]).matches([other])


def test_bits_count() -> None:
    """NaN equals itself, zeros of different signs differ: 1 / x tells them apart."""
    assert Snapshot([torch.tensor([float("nan"), 1.0])]).matches([torch.tensor([float("nan"), 1])])
    assert not Snapshot([torch.tensor([0.0, 1.0])]).matches([torch.tensor([-0.0, 1.0])])


def test_inference_tensors_are_compared() -> None:
    with torch.inference_mode():
        x = draw(8)
        held = Snapshot([x])
        assert not held.is_seen([x]) and held.matches([x])  # they have no version
        x.mul_(2)
        assert not held.is_seen([x]) and not held.matches([x])


def test_of_several_tensors_each_counts_in_its_place() -> None:
    a, b = draw(8, 1), draw(8, 2)
    held = Snapshot([a, b])
    assert held.is_seen([a, b]) and not held.is_seen([b, a]) and not held.matches([b, a])
    assert not held.matches([a, a]) and Snapshot([]).is_seen([])


def test_gradients_are_not_held() -> None:
    x = draw(8).requires_grad_()
    held = Snapshot([x * 2])
    assert not held.contents[0].requires_grad and held.matches([x * 2])


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=3),
    offset=st.integers(0, 3),
    transposed=st.booleans(),
    change=st.integers(0, 100),
)
def test_content_alone_decides(
    dtype: torch.dtype, shape: list[int], offset: int, transposed: bool, change: int
) -> None:
    """Whatever the dtype, the layout and where in its memory a tensor begins."""
    n = int(np.prod(shape, dtype=int))
    values = torch.arange(1, n + offset + 1).to(dtype)
    x = values[offset:].view(shape)
    y = x.clone()
    if transposed:
        y = y.mT.contiguous().mT if y.dim() > 1 else y
    held = Snapshot([x])
    assert held.matches([y])
    if n:
        place = change % n
        where = np.unravel_index(place, shape) if shape else ()
        y[tuple(int(i) for i in where)] = 0
        assert not held.matches([y])
