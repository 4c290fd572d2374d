"""Follow the timesteps of a schedule or scheduler, in the form that the model receives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.timesteps import (
    as_received,
    distinct,
    is_scheduler,
    scheduler_timesteps,
    timestep_values,
)
from tfmq_fx.quant.timestep_lookup import check_timesteps


class Schedule:
    """A fixed set of timesteps, or a scheduler's, which is read again when it is set again.

    source: an int N (0 to N - 1), a 1-d tensor or sequence of values as the model receives them, a
    scheduler, or None for no set.  dtype: that of the model's timestep.
    Pipelines pass on a scheduler's timesteps as they are, or as shares of 1000, from either end,
    cast before or after the division, or pass its sigmas: the form that contains the timesteps
    received is used.  The set of a scheduler without timesteps is empty until it has some.
    Raises ConfigError for values that cannot be used.
    """

    def __init__(self, source: Any, dtype: torch.dtype) -> None:
        self._scheduler: Any = source if is_scheduler(source) else None
        self._dtype = dtype
        self._form = 0
        self._read: Tensor | None = None
        self._values: list[float] = []
        if self._scheduler is not None:
            self._refresh()
            if self._set is not None and not self._values:
                values = timestep_values(source)
                shown = ", ".join(map(str, [] if values is None else values.tolist()[:4]))
                raise ConfigError(
                    f"the scheduler's timesteps cannot be received as {dtype}: {shown}, ... "
                    "Capture the model anew, with a float timestep: prepare(..., timesteps=the "
                    "scheduler), or bind_request() of the model itself"
                )
        elif (values := timestep_values(source)) is not None:
            self._values = self._keys(values)

    def __bool__(self) -> bool:
        return bool(self._values)

    def values(self, meeting: Sequence[float] = ()) -> list[float]:
        """The set, in the order of sampling (falling); empty where there is none.

        meeting: timesteps just received; a scheduler's form is chosen to contain them.
        """
        if self._scheduler is not None:
            self._refresh()
            if any(step not in self._values for step in meeting):
                for form, values in self._forms():
                    if all(step in values for step in meeting):
                        self._form, self._values = form, values
                        break
        return self._values

    @property
    def _set(self) -> Any:
        """The timesteps that the scheduler has now; None where it is not set."""
        return scheduler_timesteps(self._scheduler)

    def _refresh(self) -> None:
        if self._set is not self._read:
            self._read = self._set
            forms = dict(self._forms())
            self._values = forms.get(self._form) or next(iter(forms.values()), [])

    def _forms(self) -> Iterator[tuple[int, list[float]]]:
        """The forms in which the model may receive the scheduler's timesteps, by number."""
        if self._set is None:
            return
        raw = timestep_values(self._scheduler)
        assert raw is not None
        makers: tuple[Callable[[], Tensor], ...] = (
            lambda: raw,
            lambda: raw.to(self._dtype) / 1000,
            lambda: raw / 1000,
            lambda: (1000 - raw) / 1000,
            lambda: torch.as_tensor(self._scheduler.sigmas)[: len(raw)],
        )
        for form, make in enumerate(makers):
            try:
                yield form, self._keys(make())
            except (ConfigError, AttributeError, RuntimeError):
                continue  # not a form that this dtype can hold, or no sigmas

    def _keys(self, values: Tensor) -> list[float]:
        # Some schedulers visit a timestep twice, and of neighbours a short dtype makes one.
        values = as_received(distinct(values), self._dtype)
        return check_timesteps(values, self._dtype).flip(0).tolist()
