"""Codes are made once and what does nothing goes; and a whole UNet, with every fusion."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.backends.codes.nets import (
    EIGHT,
    LINEARS,
    NORMS,
    TIMES,
    C,
    apply,
    assert_near,
    assert_same,
    captured,
    code_step,
    conv,
    count,
    lowered,
    net,
    norm,
    quantized,
    results,
    whole_sums,
)
from tests.toys import tiny_unet2d
from tfmq_fx.backends.codes import fuse as fusions
from tfmq_fx.backends.codes.layers import quantize_input
from tfmq_fx.backends.cuda import lower as lowering
from tfmq_fx.capture.capture import capture
from tfmq_fx.core.layer_config import ActivationSpec, LayerConfig, WeightSpec
from tfmq_fx.ir.graph import fork
from tfmq_fx.quant.affine import dynamic_scale


def test_views_that_channels_last_refuses_become_reshapes(monkeypatch):
    def function(m, x, row):
        y = m.a(x).view(x.shape[0] * 4, -1)  # merges the batch with channels
        return y.view(x.shape[0], C, 6, 6) + row.view(-1, C, 1, 1)

    gm = quantized(captured(net(function, a=conv)))
    base = lowered(net(function, a=conv), monkeypatch)
    with pytest.raises(RuntimeError, match="view"):
        results(base)
    done, counts = apply(base, "loosen_views")
    assert counts == [3]
    # of the quantized layers, that compute the same up to float rounding
    for found, expected in zip(results(done), results(gm), strict=True):
        assert (found - expected).abs().max() <= code_step(base) + 1e-5


def test_a_view_that_is_written_stays(monkeypatch):
    def function(m, x, row):
        y = x.clone()
        y.view(-1, C, 36).mul_(2.0)
        return m.a(y)

    base = lowered(net(function, a=conv), monkeypatch)
    assert apply(base, "loosen_views")[1] == [0]


def test_operations_without_effect_go(monkeypatch):
    def function(m, x, row):
        y = F.dropout(m.drop(m.a(x)) / 1.0, 0.1, m.training)
        y = m.same(y) * 1 + 1 * x
        return m.b(y.permute(0, 2, 3, 1).permute(0, 3, 1, 2).contiguous())

    layers = {"a": conv, "b": conv, "drop": lambda: nn.Dropout(0.1), "same": nn.Identity}
    base = lowered(net(function, **layers), monkeypatch)
    done, counts = apply(base, "drop_noops")
    assert counts == [7]
    assert_same(done, base)


def test_what_only_seems_to_have_no_effect_stays(monkeypatch):
    def function(m, x, row):
        y = m.a(x) / 1.0
        part = y[:, :4]
        part += 1.0  # of memory that is not a's
        z = 1.0 / (y * y + 1.0)
        return (z * 2).contiguous().sin()

    base = lowered(net(function, a=conv), monkeypatch)
    assert apply(base, "drop_noops")[1] == [0]


def three(m, x, row):
    tokens = x.flatten(2).transpose(1, 2)
    y = m.q(tokens) * m.k(tokens) + m.v(tokens)
    return y.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(
    "acts",
    [ActivationSpec(), ActivationSpec(per_timestep=False), ActivationSpec(format="fp8")],
    ids=["per timestep", "static", "fp8"],
)
def test_layers_that_read_the_same_share_its_codes(monkeypatch, acts):
    layers = LayerConfig(weights=WeightSpec(search=1, format=acts.format), activations=acts)
    base = lowered(net(three, **LINEARS), monkeypatch, layers)
    done, counts = apply(base, "share_quantize")
    assert counts == [2] and count(base, quantize_input) == 5 and count(done, quantize_input) == 3
    calls = [done.graph.find_nodes(op="call_module", target=name) for name in "qkv"]
    assert len({call.args for (call,) in calls}) == 1
    assert_same(done, base)


def test_ranges_measured_at_run_time_are_measured_once(monkeypatch):
    layers = dataclasses.replace(EIGHT, activations=ActivationSpec(dynamic=True))
    base = lowered(net(lambda m, x, row: m.a(x) * m.b(x), a=conv, b=conv), monkeypatch, layers)
    done, counts = apply(base, "share_quantize")
    assert counts == [1] and count(base, dynamic_scale) == 4 and count(done, dynamic_scale) == 3
    assert_same(done, base)


def test_codes_that_differ_are_not_shared(monkeypatch):
    four = dataclasses.replace(EIGHT, activations=ActivationSpec(bits=4))
    model = net(three, **LINEARS)
    base = lowered(model, monkeypatch, plan={"k": four})
    assert apply(base, "share_quantize")[1] == [1]  # of q and v
    base = lowered(model, monkeypatch)
    base.activation_scales[1, 2] *= 2  # of one layer at one timestep
    assert apply(base, "share_quantize")[1] == [1]


def test_codes_of_what_is_written_in_between_or_has_other_borders_are_not_shared(monkeypatch):
    def function(m, x, row):
        y = torch.sin(x)
        z = m.a(y)
        y[:, :4] += 1.0
        return z * m.b(y) + m.c(x) * m.d(x)

    layers = {"a": conv, "b": conv, "c": conv, "d": lambda: conv(1)}
    base = lowered(net(function, **layers), monkeypatch)
    assert apply(base, "share_quantize")[1] == [0]


def test_only_a_part_that_is_taken_whole_replaces_a_concatenation(monkeypatch):
    def function(m, x, row):
        both = torch.cat([x, torch.sin(x)], 1)
        wide = torch.cat([x, torch.sin(x)], 2)
        rows = (
            wide.narrow(2, 0, 6) + wide.narrow(2, 3, 6) + torch.cat([x, x], 0).narrow(1, 0, C)[:4]
        )
        return m.a(both.narrow(1, C, C)) + m.b(both.narrow(1, 4, C)) + rows

    base = lowered(net(function, a=conv, b=conv), monkeypatch)
    done, counts = apply(base, "skip_concat")
    assert counts == [2]  # the second half of both, the first of wide
    assert_same(done, base)


def block(m, x, row):
    """A residual block that is modulated by the timestep, then attention over all pixels."""
    scale, shift = row[:, :, None, None].chunk(2, 1)
    y = m.a(F.silu(m.norm(x))) + scale.repeat(1, 2, 1, 1)
    y = x + m.b(F.silu(m.norm(y) * (1 + row[:, :, None, None]) + shift.repeat(1, 2, 1, 1)))
    tokens = m.norm(y.view(y.shape[0], C, -1)).transpose(1, 2)
    return y + m.q(tokens).transpose(1, 2).reshape(y.shape)


def test_sizes_may_be_free(monkeypatch):
    layers = {"a": conv, "b": conv, "q": lambda: nn.Linear(C, C), "norm": norm}
    base = lowered(net(block, **layers), monkeypatch, dynamic=("batch", "spatial"))
    done = fork(base)
    with torch.no_grad():
        found = fusions.fuse(done, whole_sums, **NORMS)
    done.recompile()
    assert found["absorb_rows"] == 1 and found["absorb_residuals"] == 2 and found["fuse_norms"] == 3
    assert_near(done, base)
    generator = torch.Generator().manual_seed(0)
    others = [(torch.randn(3, 3, 4, 10, generator=generator), torch.tensor(TIMES))]
    for found, expected in zip(results(done, others), results(base, others), strict=True):
        assert (found - expected).abs().max() <= code_step(base) + 1e-5


def test_a_unet_of_diffusers_is_fused_throughout(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    calls = [(torch.randn(2, 3, 16, 16, generator=generator), torch.full((2,), t)) for t in TIMES]
    named = dict(zip(("sample", "timestep"), calls[0], strict=True))
    gm = quantized(capture(tiny_unet2d(), named, timestep="timestep", dynamic=()).gm)
    done = lowering.lower(gm, choose=whole_sums, capability=(9, 0))
    # 8 residual blocks and 4 of attention, and the last norm.  Two layers of 4 blocks read
    # concatenations.  The time embedding is a table, at a fixed batch too.
    assert done.declined == []
    assert done.details["fused"] == {
        "loosen_views": 16,
        "drop_noops": 24,
        "share_quantize": 8,  # of query, key and value
        "skip_concat": 8,
        "merge_concat": 8,
        "absorb_rows": 8,
        "absorb_residuals": 12,
        "fuse_norms": 21,
        "requantize": 0,
        "join_siblings": 8,
    }
    with monkeypatch.context() as patch:
        patch.setattr(lowering, "fuse", lambda gm, choose, **norms: {})
        base = lowering.lower(gm, choose=whole_sums, capability=(9, 0)).gm
    for found, expected in zip(results(done.gm, calls[:1]), results(base, calls[:1]), strict=True):
        # codes that were rounded the other way change what comes after them
        assert (found - expected).square().mean() < 1e-3 * expected.square().mean()
