"""timesteps: every form in which people have a set of numbers means that set, all else is named."""

import types
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.timesteps import timestep_values


class Column:
    """What data frames hand out: neither a sequence nor an array, but one can be made of it."""

    def __array__(self, dtype=None, copy=None):
        return np.array([900, 500], dtype=np.int32)


WHOLE = np.array([900, 500])


@pytest.mark.parametrize(
    "given",
    [
        [900, 500],
        (900, np.int16(500)),
        [torch.tensor(900), np.array(500)],
        range(900, 100, -400),
        (step for step in (900, 500)),
        WHOLE,
        WHOLE[::-1][::-1],
        np.array([500, 0, 900])[::-2],
        WHOLE.astype(np.uint16),
        WHOLE.astype(object),
        Column(),
        types.SimpleNamespace(timesteps=WHOLE),
        types.SimpleNamespace(timesteps=[900, 500]),
        torch.tensor([900, 500]),
    ],
)
def test_whole_numbers(given):
    found = timestep_values(given)
    assert found.dtype == torch.int64 and found.tolist() == [900, 500]


@pytest.mark.parametrize(
    "given",
    [
        [0.5, 2],
        [Fraction(1, 2), Decimal(2)],
        [np.float16(0.5), torch.tensor(2.0)],
        np.array([0.5, 2], dtype=np.float16),
        np.array([2, 0.5], dtype=np.longdouble)[::-1],
        np.array([Fraction(1, 2), 2], dtype=object),
    ],
)
def test_other_numbers_are_as_exact_as_they_came(given):
    found = timestep_values(given)
    assert found.dtype == torch.float64 and found.tolist() == [0.5, 2.0]


@pytest.mark.parametrize("given", [3, np.int64(3), np.array(3), torch.tensor(3), np.uint8(3)])
def test_one_number_is_how_many_there_are(given):
    assert timestep_values(given).tolist() == [0, 1, 2]


def test_no_set_and_one_that_is_not_known_yet():
    assert timestep_values(None) is None
    with pytest.raises(ConfigError, match=r"has no timesteps yet: call its set_timesteps"):
        timestep_values(types.SimpleNamespace(timesteps=None))


def test_what_is_given_is_not_what_is_kept():
    mine = np.array([3, 1])
    found = timestep_values(mine)
    mine[:] = 0
    assert found.tolist() == [3, 1]  # order and duplicates are judged elsewhere


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_default_dtype_rounds_nothing(dtype):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert timestep_values([999.25, 1001]).tolist() == [999.25, 1001.0]
    finally:
        torch.set_default_dtype(usual)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (True, "not a bool; got True"),
        (np.bool_(False), "not a bool; got False"),
        (torch.tensor(True), "not a bool; got True"),
        ([1, True], "a bool among them"),
        (np.array([True, False]), "a bool"),
        (500.0, r"The set of it alone is \[500.0\]"),
        (np.float32(0.5), r"The set of it alone is \[0.5\]"),
        (Decimal("1.5"), r"alone is \[1.5\]"),
        (0, "timesteps are empty: 0"),
        (-3, "timesteps are empty: -3"),
        (2**70, r"or timesteps=\[1180591620717411303424\] for that one alone"),
        ([2**70], "1180591620717411303424, which is beyond 64 bits"),
        (np.array([2**64 - 1], dtype=np.uint64), "18446744073709551615, which is beyond 64 bits"),
        ([Fraction(10**400)], "beyond float64"),
        ("abc", "got 'abc'"),
        (["a"], "got 'a' among them"),
        ([None], "a NoneType among them"),
        ([[1], [2]], "a list among them"),
        (np.zeros((2, 2)), r"an array of shape \(2, 2\)"),
        (np.array(["a"]), "among them"),
        ({1: 2}, "a dict"),
        ({1, 2}, "a set"),
        (object(), "a object"),
        (1j, "a complex"),
        (types.SimpleNamespace, "the class SimpleNamespace"),
        (types.SimpleNamespace(scheduler=1), "pass its scheduler"),
    ],
)
def test_what_is_no_set_of_numbers_is_refused_by_name(given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        timestep_values(given)
    assert str(caught.value).startswith("timesteps")
