"""layers: new layers say and hold what they should, and the exact rewrites go on top of another."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

from tests.exact import (
    all_sites,
    assert_untouched,
    captured,
    check_exact,
    inputs_of,
    layers,
    snapshot,
)
from tests.strategies import WIDTH, GraphBuilder
from tfmq_fx.calibration.observers import RangeObserver
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.layer_config import ActivationSpec, LayerConfig, WeightSpec
from tfmq_fx.core.stages import stage_of
from tfmq_fx.ir.functionalize import inplace_
from tfmq_fx.ir.layer_edits import (
    bias_of,
    call_before,
    channel_dim,
    groups_of,
    layer_before,
    layer_with,
    readers,
    replace_call,
    sites_named,
    weight_of,
)
from tfmq_fx.ir.verifier import check
from tfmq_fx.passes.observe_layers import observe_layers
from tfmq_fx.passes.quantize_layers import quantize_layers
from tfmq_fx.passes.rotate_inputs import rotate_inputs
from tfmq_fx.passes.scale_channels import scale_channels
from tfmq_fx.passes.split_concat import split_concat
from tfmq_fx.passes.split_low_rank import split_low_rank
from tfmq_fx.quant.low_rank import LowRank
from tfmq_fx.serialization import artifact


@settings(max_examples=30)
@given(case=layers())
def test_a_new_layer_has_all_settings_of_the_old_one(case):
    layer, x = case
    before = copy.deepcopy(layer.state_dict())
    made = layer_with(layer, weight_of(layer) * 2, bias_of(layer))
    assert repr(made) == repr(layer) and type(made) is type(layer)
    with torch.no_grad():
        bias = 0 if layer.bias is None else layer.bias.view(-1, *[1] * (-channel_dim(layer) - 1))
        assert torch.allclose(made(x) - bias, 2 * (layer(x) - bias))
    for parameter in made.parameters():
        parameter.data.zero_()
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())


def test_a_new_layer_keeps_mode_and_gradients_of_the_old_one():
    layer = nn.Conv2d(4, 4, 3, groups=2).eval().requires_grad_(False)
    made = layer_with(layer, weight_of(layer), None)
    assert not made.training and not made.weight.requires_grad and made.bias is None
    assert layer_with(layer.train().requires_grad_(True), weight_of(layer), None).training
    assert groups_of(layer) == 2 and groups_of(nn.Linear(2, 2)) == 1


def test_subclasses_without_a_forward_of_their_own_become_plain_layers():
    layer = nn.modules.linear.NonDynamicallyQuantizableLinear(3, 2)
    assert type(layer_with(layer, weight_of(layer), bias_of(layer))) is nn.Linear


def test_names_are_sites_or_say_why_they_are_none():
    b = GraphBuilder()
    x = b.layer("known", nn.Linear(WIDTH, WIDTH), b.x)
    x = b.call(F.linear, x, b.buffer("w", nn.Parameter(torch.eye(WIDTH))))
    gm = b.finish(b.layer("other", nn.Linear(WIDTH, WIDTH), x))
    found, declined = sites_named(gm, ["other", "known", "linear"])
    assert [site.name for site in found] == ["known", "other"]
    assert [(d.site, d.reason) for d in declined] == [
        ("linear", "called as a function, not as a torch.nn layer")
    ]
    assert [site.name for site in sites_named(gm, {"other"})[0]] == ["other"]
    assert sites_named(gm, {"other"})[1] == []
    with pytest.raises(ConfigError, match="no layer a, b in the graph"):
        sites_named(gm, {"known", "b", "a"})


def test_readers_of_a_value_come_together_unless_it_is_written():
    b = GraphBuilder()
    h, g = b.call(torch.tanh, b.x), b.call(torch.sin, b.x)
    a, c = b.layer("a", nn.Linear(WIDTH, WIDTH), h), b.layer("c", nn.Linear(WIDTH, WIDTH), g)
    b.call(inplace_, h, "mul_", 3.0).meta["writes"] = True
    d, e = b.layer("d", nn.Linear(WIDTH, WIDTH), h), b.layer("e", nn.Linear(WIDTH, WIDTH), g)
    gm = b.finish(a, c, d, e)
    found = [(x.name, [site.name for site, _ in calls]) for x, calls in readers(gm, all_sites(gm))]
    assert found == [("tanh", ["a"]), ("sin", ["c", "e"]), ("tanh", ["d"])]


def test_what_replaces_a_call_has_its_name_and_its_users():
    b = GraphBuilder()
    y = b.layer("deep.layer", nn.Linear(WIDTH, WIDTH), b.x)
    gm = b.finish(b.call(torch.tanh, y))
    (node,) = gm.graph.find_nodes(op="call_module")
    node.meta["source"] = "model.py:3"
    gm.get_submodule("deep").add_module("extra", nn.Linear(WIDTH, WIDTH))
    x = node.args[0]
    extra = layer_before(node, "deep.extra", gm.get_submodule("deep.extra"), x, "extra")
    replace_call(node, call_before(node, torch.add, extra, x, name="sum"))
    gm.recompile()
    check(gm, stage_of(gm))
    (total,) = [n for n in gm.graph.nodes if n.target is torch.add]
    (tanh,) = [n for n in gm.graph.nodes if n.target is torch.tanh]
    assert total.name == "deep_layer" and tanh.args == (total,)
    assert total.meta["source"] == "model.py:3" and total.meta["val"].shape[1] == WIDTH
    assert list(extra.meta["nn_module_stack"]) == ["", "deep", "deep.extra"]
    assert extra.meta["val"] is not node.meta["val"]


def rewritten(gm):
    """Every exact rewrite, one on top of another."""
    done = split_concat(gm, only=[s.name for s in all_sites(gm)])
    generator = torch.Generator().manual_seed(0)
    factors = {
        site.name: torch.rand(weight_of(site.layer).shape[1], generator=generator) + 0.5
        for site in all_sites(done.gm)
    }
    passes = [done, scale_channels(done.gm, factors=factors)]
    passes.append(rotate_inputs(passes[-1].gm, group=8, only=factors))
    passes.append(split_low_rank(passes[-1].gm, rank=1, only=factors))
    return passes


def test_the_rewrites_go_on_top_of_another_and_can_be_quantized_and_saved(tmp_path):
    gm = captured("tiny")
    before = snapshot(gm)
    passes = rewritten(gm)
    assert all(done.changed for done in passes)
    for done in passes:
        check_exact(gm, done)
    assert_untouched(gm, before)
    reference, inputs = passes[-1].gm, inputs_of(gm)
    observed = observe_layers(reference).gm
    with torch.no_grad():
        observed(*inputs)
    steps = inputs[1].unique()
    spec = LayerConfig(weights=WeightSpec(bits=8, search=1), activations=ActivationSpec(bits=8))
    ranges = {o.site: o.ranges(steps) for o in observed.modules() if isinstance(o, RangeObserver)}
    quantized = quantize_layers(
        reference, plan=dict.fromkeys(ranges, spec), ranges=ranges, timesteps=steps
    ).gm
    artifact.save(tmp_path / "model", gm=quantized, call={}, config={}, extra={})
    loaded = artifact.load(tmp_path / "model").gm
    assert any(isinstance(module, LowRank) for module in loaded.modules())
    with torch.no_grad():
        expected, found = gm(*inputs)[0], quantized(*inputs)[0]
        assert torch.equal(loaded(*inputs)[0], found)
    # 8 bits everywhere: far from exact, near to what the model says
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.1
