"""Backends that answer as the reference does: each is compared with it before it is used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tfmq_fx.backends import backend, backend_module, inductor
from tfmq_fx.backends.self_check import Check, Reference
from tfmq_fx.core.errors import BackendError, BackendWarning, ConfigError
from tfmq_fx.core.version import __version__
from tfmq_fx.ir.graph import device_of
from tfmq_fx.ir.graph_pass import Rewrite

NEXT = ("float", "eager")  # what runs a model where the backend asked for is wrong


@dataclass(slots=True)
class Made:
    """A graph on a backend, what was found when it was compared (None: it was not), and the
    milliseconds of a call where they were measured."""

    name: str
    runner: Callable[..., Any]
    lowering: Rewrite
    check: Check | None = None

    @property
    def is_right(self) -> bool:
        """Whether nothing speaks against it."""
        return self.check is None or self.check.passed


def make(
    name: str, gm: fx.GraphModule, options: dict[str, Any], reference: Reference | None
) -> Made:
    """The graph on a backend, compared with the reference if that is given.

    Layers whose kernels of this package are wrong on this machine run in floating point.
    Raises BackendError where it cannot run here.
    """
    device = device_of(gm)
    chosen = backend(name, device)
    if reference is not None and name == "inductor":
        alone = inductor.alone(device, options.get("trial"))
        if wrong := reference.wrong_layers(alone):
            options = options | {"refused": wrong}
    runner, lowering = chosen.compile_graph(gm, **options)
    if reference is None or name == "eager":
        return Made(name, runner, lowering)
    check = reference.check(name, runner, lowering.gm)
    for note in check.notes:
        warnings.warn(f"backend {name!r}: {note}", BackendWarning, stacklevel=2)
    return Made(name, runner, lowering, check)


def refusal(made: Made) -> str:
    """Why a backend is not used, with what to report."""
    assert made.check is not None
    return (
        f"backend {made.name!r} does not answer as the reference: {made.check}. It is not used. "
        f"Please report this with these figures, your processor or GPU, the configuration of the "
        f"model, tfmq_fx {__version__} and torch {torch.__version__}"
    )


def make_right(
    name: str, gm: fx.GraphModule, options: dict[str, Any], reference: Reference | None
) -> tuple[Made, list[str]]:
    """The graph on the backend asked for, or with a warning on the first of `NEXT` that answers as
    the reference does where that one does not; and why others are not used.

    options: of the backend asked for.  Raises BackendError where that cannot run here.
    """
    reasons: list[str] = []
    for each in dict.fromkeys((name, *NEXT)):
        try:
            made = make(each, gm, options if each == name else {}, reference)
        except BackendError as error:
            if each == name:
                raise
            reasons.append(str(error))
            continue
        if made.is_right:
            break
        reasons.append(refusal(made))
    if reasons:
        warn(reasons[0], made.name)
    return made, reasons


def warn(reason: str, instead: str) -> None:
    """Warn that a backend answers wrongly, and which one runs the model instead."""
    text = f"{reason}. Backend {instead!r} runs the model instead."
    warnings.warn(text, BackendWarning, stacklevel=4)


def options_of(names: Sequence[str], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of options for any of some backends, those that each takes. Raises ConfigError for one that
    none of them takes."""
    known = {name: set(backend_module(name).OPTIONS) for name in names}
    every = sorted(set[str]().union(*known.values()))
    if unknown := sorted(set(options) - set(every)):
        raise ConfigError(
            f"no backend that runs here takes {', '.join(unknown)}; {', '.join(names)} take "
            f"{', '.join(every)}"
        )
    return {
        name: {key: value for key, value in options.items() if key in takes}
        for name, takes in known.items()
    }
