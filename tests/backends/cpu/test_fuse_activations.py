"""Activations go to the kernels of the layers that they follow, where nothing else reads these."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.backends.codes import nets
from tests.backends.codes.nets import EIGHT, conv, net
from tests.backends.cpu.cases import needs_kernels
from tfmq_fx.backends.cpu.autotune import untimed_choice
from tfmq_fx.backends.cpu.codes_layer import CpuCodesLayer
from tfmq_fx.backends.cpu.lower import lower
from tfmq_fx.quant.sqnr import sqnr

pytestmark = needs_kernels
SAME = 45  # as in test_lower


def lowered(function, **modules):
    """The lowered net, how many activations it gave away, and how near its results are, in dB."""
    gm = nets.quantized(nets.captured(net(function, a=conv, b=conv, **modules)), EIGHT)
    done = lower(gm, choose=untimed_choice)
    pairs = zip(nets.results(gm), nets.results(done.gm), strict=True)
    return done.gm, done.details["fused"]["activations"], min(sqnr(x, y) for x, y in pairs)


@pytest.mark.parametrize("function, modules, name", [
    (lambda m, x, row: m.act(m.a(x)), {"act": nn.SiLU}, "silu"),
    (lambda m, x, row: m.act(m.a(x)), {"act": nn.GELU}, "gelu"),
    (lambda m, x, row: m.act(m.a(x)), {"act": lambda: nn.GELU(approximate="tanh")}, "gelu_tanh"),
    (lambda m, x, row: F.silu(m.a(x)), {}, "silu"),
    (lambda m, x, row: F.silu(m.a(x), inplace=True), {}, "silu"),  # not in place once captured
    (lambda m, x, row: m.act(m.a(x)), {"act": lambda: nn.SiLU(inplace=True)}, "silu"),
    (lambda m, x, row: F.gelu(m.a(x)), {}, "gelu"),
    (lambda m, x, row: F.gelu(m.a(x), approximate="tanh"), {}, "gelu_tanh"),
    (lambda m, x, row: F.silu(m.a(x) + row[:, :, None, None]), {}, "silu"),
    (lambda m, x, row: F.silu(m.a(x) + x), {}, "silu"),
    (lambda m, x, row: m.b(F.silu(m.a(torch.cat([x, x], 1)[:, :16]))), {}, "silu"),
])  # fmt: skip
def test_silu_and_gelu_are_applied_by_the_kernel(function, modules, name):
    gm, count, near = lowered(function, **modules)
    found = [m.activation for m in gm.modules() if isinstance(m, CpuCodesLayer)]
    assert count == 1 and found.count(name) == 1 and near > SAME
    assert set(found) == {"none", name}


@pytest.mark.parametrize("function, modules", [
    (lambda m, x, row: F.silu(y := m.a(x)) + torch.sin(y), {}),  # something else reads it
    (lambda m, x, row: F.silu(m.a(x)) + torch.sin(m.a(torch.cos(x))), {}),  # called twice
    (lambda m, x, row: F.relu(m.a(x)), {}),
    (lambda m, x, row: F.silu(torch.sin(m.a(x))), {}),
])  # fmt: skip
def test_other_activations_and_readers_are_left_alone(function, modules):
    gm, count, near = lowered(function, **modules)
    assert count == 0 and near > SAME
    assert {m.activation for m in gm.modules() if isinstance(m, CpuCodesLayer)} == {"none"}


def test_codes_of_activations_are_made_by_the_kernel_too():
    def function(m, x, row):
        return m.c(F.silu(m.a(x)))

    gm, count, near = lowered(function, c=lambda: conv(1))
    assert count == 1 and near > SAME
    assert gm.a.activation == "silu" and gm.a.out_dtype == torch.uint8
