"""Rows of one value come back as they were."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tfmq_fx.prologue.row_store import RowStore


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(values: Tensor) -> RowStore:
    rows = RowStore()
    rows.extend(list(values))
    return rows


@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    n=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)),
)
def test_rows_keep_every_bit(shape: list[int], n: list[int], dtype: torch.dtype) -> None:
    rows, every = RowStore(), []
    for i, count in enumerate(n):
        new = list((draw(count, *shape, seed=i) * 3).to(dtype))
        rows.extend(new)
        every += new
    assert len(rows) == len(every)
    for k, value in enumerate(every):
        found = rows.row(k)
        assert found.dtype == dtype and torch.equal(found, value)
    assert rows.nbytes() == sum(value.nbytes for value in every)


def test_nan_and_infinities_stay() -> None:
    value = torch.tensor([[float("nan"), float("inf"), -0.0]])
    rows = filled(value[None])
    assert torch.equal(rows.row(0).view(torch.int32), value.view(torch.int32))


def test_layout_stays() -> None:
    values = [draw(2, 3, 4, 5, seed=i).to(memory_format=torch.channels_last) for i in range(2)]
    rows = RowStore()
    rows.extend(values)
    assert rows.row(1).stride() == values[1].stride() and torch.equal(rows.row(1), values[1])


def test_a_part_of_something_larger_takes_its_own_bytes_only() -> None:
    large = draw(2, 1000)
    rows = RowStore()
    rows.extend([large[:, :3]])
    found = rows.row(0)
    assert found.untyped_storage().nbytes() == rows.nbytes() == 2 * 3 * 4
    large.zero_()
    assert found.all()


def test_each_sample_gets_the_row_of_its_step() -> None:
    values = draw(4, 3, 6)
    rows = filled(values[:2])
    assert torch.equal(rows.picked(torch.tensor([1, 0, 1]))[1], rows.row(0)[1])
    rows.extend(list(values[2:]))
    found = rows.picked(torch.tensor([3, 0, 2]))
    assert torch.equal(found, torch.stack([rows.row(3)[0], rows.row(0)[1], rows.row(2)[2]]))
    assert rows.nbytes() == filled(values).nbytes()  # nothing is kept twice
    numbers = filled((values * 1000).long())
    assert torch.equal(numbers.picked(torch.tensor([2, 0, 0]))[0], (values[2, 0] * 1000).long())


def test_a_single_sample_serves_all() -> None:
    rows = filled(draw(4, 1, 6))
    found = rows.picked(torch.tensor([3, 0, 3]))
    assert torch.equal(found, torch.stack([rows.row(k)[0] for k in (3, 0, 3)]))


def test_an_unknown_step_is_nan_for_its_sample_alone() -> None:
    rows = filled(draw(2, 2, 3, 4))
    found = rows.picked(torch.tensor([-1, 1]))
    assert found[0].isnan().all() and torch.equal(found[1], rows.row(1)[1])


def test_rows_in_bfloat16_come_back_as_such() -> None:
    values = draw(2, 2, 8).bfloat16()
    rows = filled(values)
    assert rows.row(0).dtype == rows.picked(torch.tensor([0, 1])).dtype == torch.bfloat16
    assert torch.equal(rows.row(1), values[1])
