"""The finite set of timesteps that an argument means, in whatever form people have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError

_MOST = 1 << 20  # timesteps of a set that is told by their number
_WHAT = (
    "timesteps must be a number N (0 to N - 1), numbers in a sequence, array or tensor of one "
    "dimension, or a scheduler"
)


def timestep_values(timesteps: Any) -> Tensor | None:
    """The finite set (K,) meant by an int N (0 to N - 1), a tensor, an array, an iterable of
    numbers or a scheduler, in the order given; None of None.

    int64 or float64, but for a tensor, which keeps its dtype.  Raises ConfigError for what means
    no set of numbers.
    """
    if timesteps is None:
        return None
    found = timesteps
    if not isinstance(timesteps, type) and hasattr(timesteps, "timesteps"):
        found = timesteps.timesteps  # a scheduler
        if found is None:
            raise ConfigError(
                f"this {type(timesteps).__name__} has no timesteps yet: call its "
                "set_timesteps(num_inference_steps) first"
            )
    if isinstance(found, (np.ndarray, Tensor)) and found.ndim == 0:
        found = found.item()
    if isinstance(found, (bool, np.bool_)):
        raise ConfigError(f"{_WHAT}, not a bool; got {found}")
    if isinstance(found, Integral):
        return _first(int(found))
    if isinstance(found, (Real, Decimal)):
        raise ConfigError(f"{_WHAT}; got the number {found}. The set of it alone is [{found}]")
    if isinstance(found, Tensor):
        return found.detach()
    if isinstance(found, (str, bytes, Mapping, Set, type)) or not _is_many(found):
        raise ConfigError(f"{_WHAT}; got {_described(timesteps)}")
    if not isinstance(found, np.ndarray) and hasattr(found, "__array__"):
        found = np.asarray(found)
    if isinstance(found, np.ndarray) and (found.ndim != 1 or found.dtype.kind in "fiu"):
        return _of_array(found)
    return _of_numbers(list(found))


def _first(count: int) -> Tensor:
    if count < 1:
        raise ConfigError(f"timesteps are empty: {count} is to be their number, at least 1")
    if count > _MOST:
        raise ConfigError(
            f"timesteps={count} means a set of {count} timesteps, 0 to {count - 1}; give at "
            f"most {_MOST}, or timesteps=[{count}] for that one alone"
        )
    return torch.arange(count)


def _is_many(value: Any) -> bool:
    return isinstance(value, (np.ndarray, Iterable)) or hasattr(value, "__array__")


def _described(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "scheduler"):
        return f"a {type(value).__name__}; pass its scheduler"
    return repr(value) if isinstance(value, (str, bytes)) else f"a {type(value).__name__}"


def _of_array(values: np.ndarray) -> Tensor:
    if values.ndim != 1:
        raise ConfigError(f"{_WHAT}; got an array of shape {values.shape}")
    if values.dtype.kind == "u" and len(values) and values.max() > np.iinfo(np.int64).max:
        raise ConfigError(f"timesteps hold {values.max()}, which is beyond 64 bits")
    # a copy of plain strides: torch takes no others, and the caller may write to its own
    return torch.from_numpy(values.astype(np.float64 if values.dtype.kind == "f" else np.int64))


def _of_numbers(values: list[Any]) -> Tensor:
    numbers = [_number(value) for value in values]
    whole = all(isinstance(number, int) for number in numbers)
    return torch.tensor(numbers, dtype=torch.int64 if whole else torch.float64)


def _number(value: Any) -> int | float:
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (Real, Decimal)):
        raise ConfigError(f"{_WHAT}; got {_described(value)} among them")
    if not isinstance(value, Integral):
        try:
            return float(value)
        except (OverflowError, ValueError) as error:
            raise ConfigError(f"timesteps hold {value}, which is beyond float64") from error
    if abs(int(value)) >= 1 << 63:
        raise ConfigError(f"timesteps hold {value}, which is beyond 64 bits")
    return int(value)
