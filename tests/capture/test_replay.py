"""replay: a graph is compared with a model that may use up what it is given or what it has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq_fx.capture.capture import Captured, capture
from tfmq_fx.core.errors import CaptureError


def call(captured: Captured, **given: Any) -> Any:
    values, return_dict = captured.call.bind((), given)
    return captured.call.rebuild(captured.gm(*values), return_dict)


class TakesOut(nn.Module):
    """Empties the containers that it is given, as adapters' residuals are taken in diffusers."""

    def forward(self, x: Tensor, t: Tensor, residuals: Any = None, options: Any = None) -> Tensor:
        h = x + t[:, None]
        while residuals:
            h = h + residuals.pop(0)
        return h * options.pop("scale") if options else h


@pytest.mark.parametrize(
    "more",
    [
        {"residuals": [torch.ones(2, 3), torch.ones(2, 3)]},
        {"options": {"scale": torch.full((2, 1), 2.0)}},
        {
            "residuals": [torch.ones(2, 3)],
            "options": {"scale": torch.full((2, 1), 2.0), "other": 1},
        },
    ],
)
def test_what_forward_takes_out_of_lists_and_dicts(more: dict[str, Any]) -> None:
    given = {"x": torch.randn(2, 3), "t": torch.ones(2), **more}
    captured = capture(TakesOut(), given, timestep="t")
    assert given["x"].shape == (2, 3) and more == {name: given[name] for name in more}
    expected = TakesOut()(**copy.deepcopy(given))
    assert torch.equal(call(captured, **given), expected)


class Queue(nn.Module):
    """Takes a number from its own list at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.left = [1.0]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * t[:, None] * self.left.pop()


def test_a_list_of_the_model_that_runs_out_is_told() -> None:
    with pytest.raises(CaptureError, match="Queue cannot be called twice itself: IndexError: pop"):
        capture(Queue(), {"x": torch.randn(2, 3), "t": torch.ones(2)}, timestep="t")
