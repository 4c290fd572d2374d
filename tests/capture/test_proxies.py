"""proxies: `.data` is the tensor, and sizes that come from data are refused with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tfmq_fx
from tfmq_fx.capture.capture import Captured, capture
from tfmq_fx.core.errors import CaptureError


def call(captured: Captured, **given: Any) -> Any:
    values, return_dict = captured.call.bind((), given)
    return captured.call.rebuild(captured.gm(*values), return_dict)


class ThroughData(nn.Module):
    """Reads and writes by way of `.data`."""

    def __init__(self, replace: bool = False) -> None:
        super().__init__()
        self.linear, self.replace = nn.Linear(4, 4), replace

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        where = x.new_zeros(1, x.shape[1], 4)
        where.data[:, 1:].copy_(torch.ones(1, x.shape[1] - 1, 4))
        if self.replace:
            where.data = torch.ones(1, 1, 4)
        return self.linear(x + where) + self.linear.bias.data * t.data[:, None, None]


def test_data_is_the_tensor_itself(tmp_path: Path) -> None:
    model, given = ThroughData().eval(), {"x": torch.randn(1, 3, 4), "t": torch.tensor([5])}
    folded = tfmq_fx.fold_timesteps(model, [1, 5], given)
    tfmq_fx.save(folded, tmp_path / "saved")
    for found in (folded, tfmq_fx.load(tmp_path / "saved")):
        assert torch.equal(found(**given), model(**given))
    with pytest.raises(CaptureError, match=r"forward puts other data into a tensor"):
        capture(ThroughData(replace=True).eval(), given, timestep="t")


class Keeps(nn.Module):
    """Attends to what a mask keeps, or to what is given as kept."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 4), kind

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        if self.kind == "where":
            x = torch.where(mask[..., None], self.linear(x), 0.0)
        else:
            kept = torch.nonzero(mask[0]).flatten() if self.kind == "nonzero" else mask
            x = self.linear(x[:, kept])
        return x.sum(1) + t[:, None]


def test_sizes_from_a_mask_are_held_and_need_not_be() -> None:
    mask = torch.ones(2, 6, dtype=torch.bool)
    given = {"x": torch.randn(2, 6, 4), "t": torch.ones(2), "mask": mask}
    model = Keeps("nonzero").eval()
    captured = capture(model, given, timestep="t")
    assert torch.equal(call(captured, **given), model(**given))
    assert any("captured where mask gives" in note for note in captured.notes)
    for kind, value in (("where", mask), ("given", torch.arange(4))):
        model, given = Keeps(kind).eval(), {**given, "mask": value}
        captured = capture(model, given, timestep="t")
        assert torch.equal(call(captured, **given), model(**given))
