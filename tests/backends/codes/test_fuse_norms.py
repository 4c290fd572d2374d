"""Group norms make the codes of the layers that read them, and other norms stay."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.backends.codes.nets import (
    EIGHT,
    C,
    apply,
    assert_near,
    assert_same,
    conv,
    count,
    lowered,
    net,
    norm,
)
from tfmq_fx.backends.cuda.norm import norm_codes
from tfmq_fx.core.layer_config import ActivationSpec, LayerConfig, WeightSpec


class Norm32(nn.GroupNorm):
    """Normalises in float32 whatever it is given."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


def modulated(m, x, row):
    scale, shift = row[:, :, None, None], x.mean((2, 3), keepdim=True)
    return m.a(F.silu(m.norm(x) * (1 + scale) + shift))


def attention(m, x, row):
    tokens = m.norm(x.view(-1, C, 36)).transpose(1, 2)
    return (m.q(tokens) * m.k(tokens)).mT.reshape(x.shape)


NORMS = {
    "modules": lambda m, x, row: m.a(m.drop(m.silu(m.norm(x)))),
    "functions": lambda m, x, row: m.a(
        F.silu(F.group_norm(x, 4, weight=m.norm.weight, eps=1e-3), inplace=True)
    ),
    "alone": lambda m, x, row: m.a(m.norm(x)),
    "sigmoid": lambda m, x, row: m.a((y := m.norm(x)) * torch.sigmoid(y)),
    "float32": lambda m, x, row: m.a(m.silu(m.norm32(x))),
    "shift": lambda m, x, row: m.a(row[:, :, None, None] + m.norm(x)),
    "modulated": modulated,
    "places": attention,
    "images as tokens": lambda m, x, row: m.q(
        m.norm(x).permute(0, 2, 3, 1).reshape(-1, 36, C)
    ).mT.reshape(x.shape),
    "parts": lambda m, x, row: m.wide(m.silu(m.norm_wide(torch.cat([x, torch.sin(x)], 1)))),
}
NORM_LAYERS = {
    "a": conv,
    "wide": lambda: conv(3, 2 * C),
    "q": lambda: nn.Linear(C, C),
    "k": lambda: nn.Linear(C, C),
    "norm": norm,
    "norm_wide": lambda: norm(2 * C),
    "norm32": lambda: Norm32(4, C, affine=False),
    "silu": lambda: nn.SiLU(inplace=True),
    "drop": lambda: nn.Dropout(0.1),
}


@pytest.mark.parametrize("function", NORMS.values(), ids=NORMS)
def test_norms_make_the_codes_of_what_reads_them(monkeypatch, function):
    base = lowered(net(function, **NORM_LAYERS), monkeypatch)
    done, counts = apply(base, "drop_noops", "share_quantize", "fuse_norms")
    assert counts[-1] == 1 and count(done, norm_codes) == 1
    left = {type(done.get_submodule(n.target)) for n in done.graph.find_nodes(op="call_module")}
    assert not left & {nn.GroupNorm, nn.SiLU} and count(done, F.group_norm) == 0
    assert_near(done, base)


@pytest.mark.parametrize("acts", [ActivationSpec(per_timestep=False), ActivationSpec(format="fp8")])
def test_norms_make_codes_of_every_kind(monkeypatch, acts):
    layers = LayerConfig(weights=WeightSpec(search=1, format=acts.format), activations=acts)
    plan = {"a": layers, "wide.0": layers, "wide.1": layers}

    def function(m, x, row):
        return NORMS["modules"](m, x, row) + NORMS["parts"](m, x, row)

    base = lowered(net(function, **NORM_LAYERS), monkeypatch, plan=plan)
    done, counts = apply(base, "drop_noops", "fuse_norms")
    assert counts[-1] == 2
    assert_near(done, base)


def test_parts_of_other_sizes_of_grid_make_their_own_codes(monkeypatch):
    four = dataclasses.replace(EIGHT, activations=ActivationSpec(bits=4))
    base = lowered(net(NORMS["parts"], **NORM_LAYERS), monkeypatch, plan={"wide.1": four})
    assert apply(base, "fuse_norms")[1] == [0]


OTHER_NORMS = {
    "read twice": lambda m, x, row: m.a(y := m.norm(x)) + y,
    "other activation": lambda m, x, row: m.a(torch.tanh(m.norm(x))),
    "scaled by place": lambda m, x, row: m.a(m.norm(x) * x),
    "gate read twice": lambda m, x, row: m.a((y := m.norm(x)) * (g := torch.sigmoid(y))) + g,
    "two borders": lambda m, x, row: m.a(y := m.norm(x)) + m.c(y),
    "part of the channels": lambda m, x, row: m.d(m.norm(x).narrow(1, 0, 8)),
    "channels twice": lambda m, x, row: (
        m.d((y := m.norm(x)).narrow(1, 0, 8)) + m.d(y.narrow(1, 4, 8))
    ),
    "rows": lambda m, x, row: m.a(m.norm(x).narrow(2, 0, 3).repeat(1, 1, 2, 1)),
    "channels as tokens": lambda m, x, row: m.q(m.norm(x).reshape(-1, 36, C)).reshape(x.shape),
    "images as channels": lambda m, x, row: m.a(m.norm(x).transpose(2, 3)),
}


@pytest.mark.parametrize("function", OTHER_NORMS.values(), ids=OTHER_NORMS)
def test_other_uses_of_norms_are_left_alone(monkeypatch, function):
    layers = NORM_LAYERS | {"c": lambda: conv(1), "d": lambda: conv(3, 8)}
    base = lowered(net(function, **layers), monkeypatch)
    done, counts = apply(base, "drop_noops", "share_quantize", "fuse_norms")
    assert counts[-1] == 0
    assert_same(done, base)


def test_norms_of_what_is_written_meanwhile_stay(monkeypatch):
    def function(m, x, row):
        y = torch.sin(x)
        z = m.norm(y)
        y[:, :4] += 1.0
        return m.a(z) + y

    base = lowered(net(function, a=conv, norm=norm), monkeypatch)
    assert apply(base, "fuse_norms")[1] == [0]


def test_modules_with_hooks_stay(monkeypatch):
    model = net(NORMS["modules"], **NORM_LAYERS)
    for name in ("norm", "drop"):
        model.get_submodule(name).register_forward_hook(lambda module, args, y: 2 * y)
    base = lowered(model, monkeypatch)
    done, counts = apply(base, "drop_noops", "fuse_norms")
    assert counts == [0, 0]
    assert_same(done, base)
