"""Name the example inputs of a model and find the timestep among them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tfmq_fx.core.errors import ConfigError

from .call_inference import TIMESTEP_NAMES
from .diffusers_inputs import example_inputs as derived_inputs
from .input_checks import plain_number
from .model_checks import check_model, forward_parameters


def named_inputs(
    model: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any] | None
) -> dict[str, Any]:
    """The example inputs by parameter name; None derives them from a diffusers config.

    Raises ConfigError where they cannot be named or derived.
    """
    check_model(model)
    if isinstance(example_inputs, Mapping):
        return dict(example_inputs)
    if example_inputs is not None:
        if isinstance(example_inputs, Tensor):
            raise ConfigError("example_inputs must be a tuple or a dict, not one tensor")
        if not isinstance(example_inputs, Sequence):
            raise ConfigError(
                f"example_inputs must be a tuple or a dict, not {type(example_inputs).__name__}"
            )
        names = forward_parameters(model)
        if len(example_inputs) > len(names):
            instead = _named_otherwise(model, len(example_inputs))
            raise ConfigError(
                f"{len(example_inputs)} example_inputs given, but {type(model).__name__}.forward "
                f"takes {len(names)}: {', '.join(names)}{instead}"
            )
        return dict(zip(names, example_inputs, strict=False))
    return derived_inputs(model)


def _named_otherwise(model: nn.Module, count: int) -> str:
    """The remedy, for an error message, where forward takes fewer than `count` inputs by name."""
    fits = [n for n, part in model.named_children() if len(forward_parameters(part)) >= count]
    if len(fits) == 1:
        part = f"[{fits[0]}]" if isinstance(model, nn.Sequential) else f".{fits[0]}"
        return f". To prepare the model that it holds, pass model{part}"
    takes_names = inspect.Parameter.VAR_KEYWORD in {
        p.kind for p in inspect.signature(model.forward).parameters.values()
    }
    return ". Give them by name, as a dict" if takes_names else ""


def find_timestep(inputs: Mapping[str, Any], timestep: str | None) -> str:
    """The name of the timestep among `inputs`; raises ConfigError with candidates where unclear."""
    if timestep is not None:
        if timestep not in inputs:
            raise ConfigError(
                f"no input named {timestep!r}; the example inputs are {', '.join(inputs)}. "
                "Pass timestep=<one of them> to prepare()."
            )
        value = inputs[timestep]
        if isinstance(value, Tensor) and value.dim() > 2:
            raise ConfigError(
                f"{timestep!r} has shape {tuple(value.shape)}, and a timestep is one number, one "
                "for each sample, or one for each sample and token. Pass timestep=<another input>."
            )
        return timestep
    named = [name for name in inputs if name in TIMESTEP_NAMES]
    if len(named) == 1:
        return named[0]
    scalar = [
        name
        for name, value in inputs.items()
        if (isinstance(value, Real) and not isinstance(value, bool))
        or (isinstance(value, (Tensor, np.ndarray)) and value.ndim <= 1)
    ]
    if not named and len(scalar) == 1:
        return scalar[0]
    candidates = ", ".join(named or scalar or inputs)
    raise ConfigError(
        f"cannot tell which input is the timestep; candidates are {candidates}. "
        "Pass timestep=<name> to prepare()."
    )


def example_timestep(example: Any, floats: torch.dtype | None) -> Any:
    """The timestep of the example inputs as a tensor, in which whole numbers give way to `floats`,
    the dtype in which the model will receive its timesteps, if that is a floating one.

    A float example stays as it is, and so does what is no timestep, which capture refuses.
    """
    value = plain_number(example)
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        return example
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float32)
    if floats is None or value.is_floating_point() or value.dtype == torch.bool:
        return value
    return value.to(floats)
