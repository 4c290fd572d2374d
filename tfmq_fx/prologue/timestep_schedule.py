"""Follow the timesteps of a schedule or scheduler, in the form that the model receives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.timesteps import timestep_values
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
        self._scheduler: Any = source if hasattr(source, "timesteps") else None
        self._dtype = dtype
        self._form = 0
        self._read: Tensor | None = None
        self._values: list[float] = []
        if self._scheduler is not None:
            self._refresh()
            if source.timesteps is not None and not self._values:
                raise ConfigError(
                    f"the scheduler's timesteps cannot be received as {dtype}: {source.timesteps}"
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

    def _refresh(self) -> None:
        if self._scheduler.timesteps is not self._read:
            self._read = self._scheduler.timesteps
            forms = dict(self._forms())
            self._values = forms.get(self._form) or next(iter(forms.values()), [])

    def _forms(self) -> Iterator[tuple[int, list[float]]]:
        """The forms in which the model may receive the scheduler's timesteps, by number."""
        if self._scheduler.timesteps is None:
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
        if values.dim() == 1:
            received = values.to(self._dtype) if self._dtype.is_floating_point else values
            distinct = dict(zip(received.tolist(), values.tolist(), strict=True))
            values = torch.tensor([*distinct.values()], dtype=values.dtype)
        return check_timesteps(values, self._dtype).flip(0).tolist()
