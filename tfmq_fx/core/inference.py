"""Leave torch's inference mode, in which no gradient is learnt and no graph is traced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, run with inference mode left where the caller is in it."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return run


def ordinary(value: Tensor) -> Tensor:
    """The tensor, detached; a copy where it was made in inference mode, as autograd takes none of
    those and nothing counts what is written to them."""
    return value.detach().clone() if value.is_inference() else value.detach()
