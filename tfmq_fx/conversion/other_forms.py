"""Keep the forms of a model that were captured for calls that its first graph does not take.

A graph leaves free the sizes that the model's own code leaves free. For other calls (a resolution
that the code turns into numbers, an input that was left out before) the source is captured again,
with the weights and quantization parameters that the model has.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tfmq_fx.core.errors import InputError

log = logging.getLogger(__name__)

MOST_FORMS = 8


@functools.singledispatch
def captured_again(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return a form of `model` that takes the call (*args, **kwargs), captured from its source.

    The kinds of models register how. Raises TfmqError where it cannot be done.
    """
    raise InputError(f"a {type(model).__name__} cannot be captured again")


@functools.singledispatch
def captured_in(model: Any, dtype: torch.dtype) -> Any:
    """Return a form of `model` captured from its source in another floating dtype.

    Raises TfmqError where it cannot be done.
    """
    raise InputError(f"a {type(model).__name__} cannot be captured in {dtype}")


class OtherForms:
    """At most MOST_FORMS further forms of one model, the one used last at the end.

    Copies of a model begin without any.
    """

    def __init__(self) -> None:
        self._forms: list[Any] = []
        self._lock = threading.RLock()
        self.captured = 0  # how many were made, those that were dropped among them

    def __len__(self) -> int:
        return len(self._forms)

    def __deepcopy__(self, memo: dict[int, Any]) -> OtherForms:
        return OtherForms()

    def __reduce__(self) -> tuple[Any, ...]:
        return OtherForms, ()

    def clear(self) -> None:
        """Drop all forms, as after a move to another device or dtype."""
        with self._lock:
            self._forms.clear()

    def for_call(
        self, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], refusal: InputError
    ) -> Any:
        """Return the form of `model` for a call that its own graph refused, captured if it is new.

        Raises the refusal, with a note that says why no other form helps, where there is none.
        """
        with self._lock:
            for form in reversed(self._forms):
                if form.takes(args, kwargs):
                    self._forms.remove(form)
                    self._forms.append(form)
                    return form
            try:
                form = captured_again(model, args, kwargs)
                if not form.takes(args, kwargs):  # it would be captured again without end
                    raise InputError("the graph captured for this call does not take it either")
            except Exception as error:
                refusal.add_note(f"not captured again for this call: {_said(error)}")
                raise refusal from error
            self.captured += 1
            reason = str(refusal).partition(". ")[0]
            log.info("captured again for another call (%d so far): %s", self.captured, reason)
            if form is model:
                return form
            self._forms.append(form)
            if len(self._forms) > MOST_FORMS:
                del self._forms[0]
                log.warning(
                    "more than %d kinds of calls: the form used least recently is dropped, and "
                    "captured again when it is needed (%s)",
                    MOST_FORMS,
                    reason,
                )
            return form


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
