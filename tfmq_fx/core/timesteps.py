"""Convert the `timesteps` argument, in any accepted form, to a tensor."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError

_MOST = 1 << 20  # timesteps of a set that is given as their number
_TRIED = 4  # steps, to see the dtype of a scheduler's timesteps
_FORMS = (
    "timesteps must be a number N (0 to N - 1), numbers in a sequence, array or tensor of one "
    "dimension, or a scheduler"
)


def timestep_values(timesteps: Any) -> Tensor | None:
    """The finite set (K,) that an int N (0 to N - 1), a tensor, an array, an iterable of numbers or
    a scheduler stands for, in its own order; None for None.

    int64 or float64, except that a tensor keeps its dtype.  Of a scheduler, a tensor or an array,
    which may visit a timestep twice, each value counts once; numbers listed twice are left for
    `check_timesteps` to refuse.  Raises ConfigError for anything else, and for a scheduler that has
    no timesteps yet.
    """
    if timesteps is None:
        return None
    values = timesteps
    if is_scheduler(timesteps):
        values = scheduler_timesteps(timesteps)
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
        return distinct(values.detach())
    is_array = hasattr(values, "__array__") and not isinstance(values, type)
    if is_array:
        values = np.asarray(values)
        if values.ndim != 1:
            raise ConfigError(f"{_FORMS}; got an array of shape {values.shape}")
    elif isinstance(values, (str, bytes, Mapping, Set, type)) or not isinstance(values, Iterable):
        raise ConfigError(f"{_FORMS}; got {_described(timesteps)}")
    numbers = [_number(value) for value in values]
    is_whole = all(isinstance(number, int) for number in numbers)
    given = torch.tensor(numbers, dtype=torch.int64 if is_whole else torch.float64)
    return distinct(given) if is_array or is_scheduler(timesteps) else given


def is_scheduler(value: Any) -> bool:
    """Whether `value` is a scheduler, set or not, and no class or pipeline."""
    known = hasattr(value, "timesteps") or callable(getattr(value, "set_timesteps", None))
    return known and not isinstance(value, type)


def scheduler_timesteps(scheduler: Any) -> Any:
    """The timesteps of a scheduler, in the form that it has them; None where it is not set yet."""
    values = getattr(scheduler, "timesteps", None)
    return None if values is None or (hasattr(values, "__len__") and not len(values)) else values


def distinct(values: Tensor) -> Tensor:
    """Each value of a tensor (K,) once, in order; a tensor of another shape unchanged."""
    return _first_of_each(values, values.tolist()) if values.dim() == 1 else values


def as_received(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` (K,) without those that a model, which receives them as `dtype`, cannot tell from
    one before; a value that is there twice stays."""
    if not dtype.is_floating_point or values.dim() != 1 or len(distinct(values)) < len(values):
        return values
    return _first_of_each(values, values.to(dtype).tolist())


def float_dtype(timesteps: Any) -> torch.dtype | None:
    """The dtype in which a model will receive `timesteps`, a set in any form of `timestep_values`;
    None where they are whole numbers, or nothing is known.

    Tensors have their own, and plain numbers arrive as float32.  A scheduler that has no timesteps
    yet shows by a copy which it would have.
    """
    if is_scheduler(timesteps) and scheduler_timesteps(timesteps) is None:
        timesteps = copy.deepcopy(timesteps)
        try:
            timesteps.set_timesteps(_TRIED)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            return None  # one that must be told more than the number of steps
    values = timestep_values(timesteps)
    if values is None or not values.is_floating_point():
        return None
    given = scheduler_timesteps(timesteps) if is_scheduler(timesteps) else timesteps
    return values.dtype if isinstance(given, Tensor) else torch.float32


def _first_of_each(values: Tensor, keys: Sequence[Hashable]) -> Tensor:
    """Of the values (K,) with equal `keys` the first, in order."""
    first: dict[Hashable, int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    return values if len(first) == len(values) else values[[*first.values()]]


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
