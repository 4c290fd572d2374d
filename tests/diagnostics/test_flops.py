"""flops: counts agree with counts by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.toys import ToyDiT, seeded
from tfmq_fx.capture.capture import capture
from tfmq_fx.diagnostics.flops import node_flops


class Wraps(nn.Module):
    """f(x), plus t so that there is a timestep."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x, t):
        return self.f(x) + 0 * t.sum()


class Attends(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.mha = kind, nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        if self.kind == "module":
            return self.mha(x, x, x)[0]
        if self.kind == "sdpa":
            return F.scaled_dot_product_attention(x, x, x)
        if self.kind == "einsum":
            return torch.einsum("bnc,bmc->bnm", x, x)
        return torch.baddbmm(x, x @ x.transpose(1, 2), x)


def total(f, *shape, batch=2):
    x = torch.randn(batch, *shape)
    gm = capture(Wraps(f).eval(), {"x": x, "t": torch.ones(batch)}, timestep="t").gm
    return sum(node_flops(gm, [(batch, *shape), (batch,)]).values())


@pytest.mark.parametrize(
    "make, shape, expected",
    [
        (lambda: nn.Linear(8, 16), (8,), 2 * 2 * 8 * 16),
        (lambda: nn.Linear(8, 16, bias=False), (5, 8), 2 * 2 * 5 * 8 * 16),
        (lambda: nn.Conv2d(3, 6, 3, padding=1), (3, 8, 8), 2 * 2 * 64 * 9 * 3 * 6),
        (lambda: nn.Conv2d(4, 8, 3, groups=2), (4, 8, 8), 2 * 2 * 36 * 9 * 2 * 8),
        (lambda: nn.Conv2d(4, 4, 2, stride=2), (4, 8, 8), 2 * 2 * 16 * 4 * 4 * 4),
        (lambda: nn.ConvTranspose2d(4, 6, 3), (4, 8, 8), 2 * 2 * 64 * 9 * 4 * 6),
        (lambda: Attends("sdpa"), (2, 5, 8), 2 * 2 * 2 * 2 * 5 * 5 * 8),
        (lambda: Attends("einsum"), (5, 8), 2 * 2 * 5 * 5 * 8),
        (lambda: Attends("baddbmm"), (5, 8), 2 * 2 * 2 * 5 * 5 * 8),
        (lambda: Attends("module"), (5, 8), 2 * (2 * 5 * 8 * 8 * 4 + 2 * 2 * 5 * 5 * 8)),
        (lambda: nn.SiLU(), (8,), 0),
        (lambda: nn.GroupNorm(2, 4), (4, 8, 8), 0),
    ],
)
def test_counts_are_those_by_hand(make, shape, expected):
    assert total(make(), *shape) == expected


def test_counts_belong_to_nodes_and_scale_with_the_batch():
    model = seeded(ToyDiT).eval()
    inputs = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([1, 2]), "y": torch.tensor([3, 4])}
    gm = capture(model, inputs, timestep="t").gm
    one, four = (
        {node.name: n for node, n in node_flops(gm, [(b, 3, 8, 8), (b,), (b,)]).items()}
        for b in (1, 4)
    )
    assert one["patch"] == 2 * 16 * (3 * 2 * 2) * 32
    assert one["time_0"] == one["time_2"] == 2 * 32 * 32
    assert one["blocks_1_modulation"] == 2 * 32 * 192
    assert one["blocks_0_qkv"] == 2 * 16 * 32 * 96
    assert one["scaled_dot_product_attention"] == 2 * 2 * 4 * 16 * 16 * 8
    assert one["head"] == 2 * 16 * 32 * 12
    assert four == {name: 4 * n for name, n in one.items()}


def test_torch_settings_are_left_as_they_were():
    assert torch.backends.mha.get_fastpath_enabled()
    total(Attends("module"), 5, 8)
    assert torch.backends.mha.get_fastpath_enabled()
