"""Rows of one value come back as they were, or as their precision says, with the error measured."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tfmq_fx.config import Precision
from tfmq_fx.rows import Rows

PRECISIONS: tuple[Precision, ...] = ("exact", "float16", "int8")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(precision: Precision, values: Tensor, *, batched: bool = True) -> Rows:
    rows = Rows(precision, batched=batched)
    rows.extend(list(values))
    return rows


@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    n=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)),
)
def test_exact_rows_keep_every_bit(shape: list[int], n: list[int], dtype: torch.dtype) -> None:
    rows, every = Rows("exact", batched=False), []
    for i, count in enumerate(n):
        new = list((draw(count, *shape, seed=i) * 3).to(dtype))
        rows.extend(new)
        every += new
    assert len(rows) == len(every) and rows.error == 0
    for k, value in enumerate(every):
        found = rows.row(k)
        assert found.dtype == dtype and torch.equal(found, value)
    assert rows.nbytes() == sum(value.nbytes for value in every)


def test_nan_and_infinities_stay_in_exact_rows() -> None:
    value = torch.tensor([[float("nan"), float("inf"), -0.0]])
    rows = filled("exact", value[None])
    assert torch.equal(rows.row(0).view(torch.int32), value.view(torch.int32))


def test_layout_stays_in_exact_rows() -> None:
    values = [draw(2, 3, 4, 5, seed=i).to(memory_format=torch.channels_last) for i in range(2)]
    rows = Rows("exact", batched=True)
    rows.extend(values)
    assert rows.row(1).stride() == values[1].stride() and torch.equal(rows.row(1), values[1])


def test_a_part_of_something_larger_takes_its_own_bytes_only() -> None:
    large = draw(2, 1000)
    rows = Rows("exact", batched=True)
    rows.extend([large[:, :3]])
    found = rows.row(0)
    assert found.untyped_storage().nbytes() == rows.nbytes() == 2 * 3 * 4
    large.zero_()
    assert found.all()


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_the_error_is_the_measured_one(precision: Precision, batched: bool) -> None:
    """The largest relative L2 error of a step's sample, or of a whole step."""
    values = draw(5, 3, 40) * torch.logspace(-3, 3, 3)[:, None]  # samples of other magnitudes
    rows = filled(precision, values[:2], batched=batched)
    first = rows.error
    rows.extend(list(values[2:]))
    found = torch.stack([rows.row(k) for k in range(5)])
    assert found.dtype == torch.float32
    dims = (2,) if batched else (1, 2)
    lost = (found - values).double().norm(dim=dims) / values.double().norm(dim=dims)
    assert 0 < first <= rows.error
    assert rows.error == pytest.approx(float(lost.max()), rel=1e-6)
    # half of the last of 11 bits; half a step of 255 over some 4 deviations each way
    assert rows.error <= (2**-11 if precision == "float16" else 4 / 255)


def test_int8_takes_a_quarter_of_the_bytes_and_its_scales() -> None:
    values = draw(4, 2, 100)
    assert filled("exact", values).nbytes() == 4 * 800
    assert filled("float16", values).nbytes() == 4 * 400
    assert filled("int8", values).nbytes() == 4 * (200 + 2 * 8)  # scale and zero for each sample
    assert filled("int8", values, batched=False).nbytes() == 4 * (200 + 8)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_constant_rows_are_exact_at_8_bits_and_zeros_at_any(precision: Precision) -> None:
    values = torch.stack([torch.zeros(2, 5), torch.full((2, 5), 0.3)])
    rows = filled(precision, values)
    assert torch.equal(rows.row(0), values[0])
    if precision == "int8":
        assert torch.equal(rows.row(1), values[1]) and rows.error == 0


@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_no_real_float_stays_exact(dtype: torch.dtype, precision: Precision) -> None:
    values = (draw(3, 2, 4) * 1000).to(dtype)
    rows = filled(precision, values)
    assert rows.precision == "exact" and rows.error == 0
    assert all(torch.equal(rows.row(k), values[k]) for k in range(3))
    assert torch.equal(rows.picked(torch.tensor([2, 0])), torch.stack([values[2, 0], values[0, 1]]))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_sample_gets_the_row_of_its_step(precision: Precision) -> None:
    values = draw(4, 3, 6)
    rows = filled(precision, values[:2])
    assert torch.equal(rows.picked(torch.tensor([1, 0, 1]))[1], rows.row(0)[1])
    rows.extend(list(values[2:]))
    found = rows.picked(torch.tensor([3, 0, 2]))
    assert torch.equal(found, torch.stack([rows.row(3)[0], rows.row(0)[1], rows.row(2)[2]]))
    assert rows.nbytes() == filled(precision, values).nbytes()  # nothing is kept twice


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_single_sample_serves_all(precision: Precision) -> None:
    rows = filled(precision, draw(4, 1, 6))
    found = rows.picked(torch.tensor([3, 0, 3]))
    assert torch.equal(found, torch.stack([rows.row(k)[0] for k in (3, 0, 3)]))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_unknown_step_is_nan_for_its_sample_alone(precision: Precision) -> None:
    rows = filled(precision, draw(2, 2, 3, 4))
    found = rows.picked(torch.tensor([-1, 1]))
    assert found[0].isnan().all() and torch.equal(found[1], rows.row(1)[1])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_in_bfloat16_come_back_as_such(precision: Precision) -> None:
    values = draw(2, 2, 8).bfloat16()
    rows = filled(precision, values)
    assert rows.row(0).dtype == rows.picked(torch.tensor([0, 1])).dtype == torch.bfloat16
    if precision != "int8":  # 8 bits of mantissa fit into 11
        assert torch.equal(rows.row(1), values[1])


def test_what_float16_cannot_hold_shows_in_the_error() -> None:
    rows = filled("float16", torch.full((1, 1, 4), 1e6))
    assert rows.row(0).isinf().all() and rows.error == float("inf")
