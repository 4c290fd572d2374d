"""Outputs without a gradient say so when one is asked for, instead of giving a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.core.errors import InputError


def refusing(outputs: Sequence[Any], inputs: Sequence[Tensor], why: str) -> list[Any]:
    """`outputs`, whose backward raises InputError(why) where one of `inputs` wants a gradient."""
    wanting = [value for value in inputs if value.requires_grad]
    if not (wanting and torch.is_grad_enabled()):
        return list(outputs)
    return [
        _Refusal.apply(why, value, *wanting)  # type: ignore[no-untyped-call]
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        else value
        for value in outputs
    ]


class _Refusal(torch.autograd.Function):
    """The value itself, as if it were computed from tensors whose gradients nobody knows."""

    @staticmethod
    def forward(ctx: Any, why: str, value: Tensor, *wanting: Tensor) -> Tensor:
        ctx.why = why
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise InputError(ctx.why)
