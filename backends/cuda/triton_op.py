"""Make torch operators of functions that launch Triton kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton


def kernel_op(name: str, launch: Callable[..., Tensor]) -> Any:
    """The operator `name` that calls `launch`, which torch.compile can look into.

    Where Triton is missing, torch's triton_op says so at every import: there it is a custom
    operator, which nothing can call on a GPU either.
    """
    if importlib.util.find_spec("triton") is None:
        return custom_op(name, launch, mutates_args=())
    return triton_op(name, launch, mutates_args=())


def launcher(kernel: Any) -> Any:
    """The form of a kernel to launch: seen by torch.compile unless Triton interprets it."""
    from triton.runtime.interpreter import InterpretedFunction

    return kernel if isinstance(kernel, InterpretedFunction) else wrap_triton(kernel)
