"""Codes of a concatenation are made of its parts where they lie."""

import operator

import pytest
import torch

from tests.backends.codes import nets
from tests.backends.codes.nets import EIGHT, C, conv, net, norm
from tests.backends.cpu.cases import needs_kernels
from tfmq_fx.backends.cpu.autotune import untimed_choice
from tfmq_fx.backends.cpu.lower import lower
from tfmq_fx.backends.cpu.norm_codes import norm_codes
from tfmq_fx.ir.node_info import op_name
from tfmq_fx.quant.sqnr import sqnr

pytestmark = needs_kernels
SAME = 45  # as in test_lower
LAYERS = {
    "wide": lambda: conv(width=2 * C),
    "norm_wide": lambda: norm(2 * C),
    "more": lambda: torch.nn.Linear(C, 4 * C),
    "three": lambda: conv(width=3 * C),
    "norm_three": lambda: norm(3 * C),
}


def lowered(function):
    gm = nets.quantized(nets.captured(net(function, **LAYERS)), EIGHT)
    done = lower(gm, choose=untimed_choice)
    pairs = zip(nets.results(gm), nets.results(done.gm), strict=True)
    assert min(sqnr(x, y) for x, y in pairs) > SAME
    left = sum(op_name(n) == "cat" for n in done.gm.graph.nodes)
    return done.gm, done.details["fused"]["concat"], left


def two(x):
    return torch.cat([x, torch.sin(x)], 1)


def modulated(m, x, row):
    scale, shift = m.more(row)[:, :, None, None].chunk(2, 1)  # that lie apart
    return m.wide(torch.nn.functional.silu(m.norm_wide(two(x)) * (1 + scale) + shift))


@pytest.mark.parametrize("function", [
    lambda m, x, row: m.wide(m.norm_wide(two(x))),
    modulated,
    lambda m, x, row: m.wide(m.norm_wide(torch.cat([x, torch.sin(x)], dim=-3))),
    lambda m, x, row: m.wide(torch.tanh(y := two(x))) * m.wide(m.norm_wide(y)),
])  # fmt: skip
def test_norms_of_concatenations_read_the_parts(function):
    gm, count, _ = lowered(function)
    calls = gm.graph.find_nodes(op="call_function", target=norm_codes)
    calls = [call for call in calls if "more" in call.kwargs]
    assert len(calls) == count == 1
    for call in calls:
        assert call.meta["val"].dtype == torch.uint8
        assert operator.itemgetter(0, 3)(call.meta["val"].shape) == (4, 2 * C)


def test_nothing_is_concatenated_any_more():
    _, count, left = lowered(lambda m, x, row: m.wide(m.norm_wide(two(x))))
    assert (count, left) == (1, 0)


@pytest.mark.parametrize("function", [
    lambda m, x, row: m.three(m.norm_three(torch.cat([x, torch.sin(x), x], 1))),
    lambda m, x, row: m.wide(m.norm_wide(two(x).relu())),
])  # fmt: skip
def test_three_parts_and_other_values_are_left_alone(function):
    _, count, left = lowered(function)
    assert count == 0 and left == 1
