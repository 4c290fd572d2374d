"""Leave torch's inference mode, in which gradients and tracing do not work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap `function` so that it runs outside inference mode."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():  # entering the context would enable gradients
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return run


def ordinary(value: Tensor) -> Tensor:
    """The tensor, detached; a copy if it was created in inference mode, since autograd refuses such
    tensors and they have no version counter."""
    return value.detach().clone() if value.is_inference() else value.detach()
