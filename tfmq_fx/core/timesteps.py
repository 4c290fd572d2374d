"""Convert the `timesteps` argument, in any accepted form, to a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError

_MOST = 1 << 20  # timesteps of a set that is given as their number
_FORMS = (
    "timesteps must be a number N (0 to N - 1), numbers in a sequence, array or tensor of one "
    "dimension, or a scheduler"
)


def timestep_values(timesteps: Any) -> Tensor | None:
    """The finite set (K,) that an int N (0 to N - 1), a tensor, an array, an iterable of numbers or
    a scheduler stands for, in its own order; None for None.

    int64 or float64, except that a tensor keeps its dtype.  Raises ConfigError for anything else.
    """
    if timesteps is None:
        return None
    values = timesteps
    if not isinstance(timesteps, type) and hasattr(timesteps, "timesteps"):
        values = timesteps.timesteps  # a scheduler
        if values is None:
            raise ConfigError(
                f"this {type(timesteps).__name__} has no timesteps yet: call its "
                "set_timesteps(num_inference_steps) first"
            )
    values = _plain_scalar(values)
    if isinstance(values, (bool, np.bool_)):
        raise ConfigError(f"{_FORMS}, not a bool; got {values}")
    if isinstance(values, Integral):
        return _first(int(values))
    if isinstance(values, (Real, Decimal)):
        raise ConfigError(f"{_FORMS}; got the number {values}. The set of it alone is [{values}]")
    if isinstance(values, Tensor):
        return values.detach()
    if hasattr(values, "__array__") and not isinstance(values, type):
        values = np.asarray(values)
        if values.ndim != 1:
            raise ConfigError(f"{_FORMS}; got an array of shape {values.shape}")
    elif isinstance(values, (str, bytes, Mapping, Set, type)) or not isinstance(values, Iterable):
        raise ConfigError(f"{_FORMS}; got {_described(timesteps)}")
    numbers = [_number(value) for value in values]
    is_whole = all(isinstance(number, int) for number in numbers)
    return torch.tensor(numbers, dtype=torch.int64 if is_whole else torch.float64)


def _first(count: int) -> Tensor:
    """The timesteps 0 to count - 1."""
    if count < 1:
        raise ConfigError(f"timesteps are empty: {count} is to be their number, at least 1")
    if count > _MOST:
        raise ConfigError(
            f"timesteps={count} means a set of {count} timesteps, 0 to {count - 1}; give at "
            f"most {_MOST}, or timesteps=[{count}] for that one alone"
        )
    return torch.arange(count)


def _plain_scalar(value: Any) -> Any:
    """A 0-d array or tensor as a Python number; anything else unchanged."""
    return value.item() if isinstance(value, (np.ndarray, Tensor)) and not value.ndim else value


def _described(value: Any) -> str:
    """The kind of a value, for error messages."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "scheduler"):
        return f"a {type(value).__name__}; pass its scheduler"
    return repr(value) if isinstance(value, (str, bytes)) else f"a {type(value).__name__}"


def _number(value: Any) -> int | float:
    """One timestep as a Python number that int64 or float64 holds."""
    value = _plain_scalar(value)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (Real, Decimal)):
        raise ConfigError(f"{_FORMS}; got {_described(value)} among them")
    if not isinstance(value, Integral):
        try:
            return float(value)
        except (OverflowError, ValueError) as error:
            raise ConfigError(f"timesteps hold {value}, which is beyond float64") from error
    if abs(int(value)) >= 1 << 63:
        raise ConfigError(f"timesteps hold {value}, which is beyond 64 bits")
    return int(value)
