"""Make outputs without a gradient raise an error in backward, instead of giving a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.core.errors import InputError


def refusing(outputs: Sequence[Any], inputs: Sequence[Tensor], why: str) -> list[Any]:
    """`outputs`, whose backward raises InputError(why) where one of `inputs` needs a gradient."""
    leaves = [value for value in inputs if value.requires_grad]
    if not leaves:
        return list(outputs)
    return [
        _Refusal.apply(why, value, *leaves)  # type: ignore[no-untyped-call]
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        else value
        for value in outputs
    ]


class _Refusal(torch.autograd.Function):
    """Returns a tensor as it is, as a function of other tensors that has no gradient."""

    @staticmethod
    def forward(ctx: Any, why: str, value: Tensor, *leaves: Tensor) -> Tensor:
        ctx.why = why
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise InputError(ctx.why)
