"""blocks: layers that belong together are found by structure, in execution order."""

import pytest
import torch
from torch import nn

from tests.ir.test_sites import graph_of
from tests.strategies import WIDTH, GraphBuilder
from tests.toys import ToyDiT, ToyUNet, seeded, tiny_unet2d
from tfmq_fx.capture.capture import capture
from tfmq_fx.ir.reconstruction_units import unit_nodes, units
from tfmq_fx.ir.sites import find_sites


def paths(gm):
    return {
        u.path: [s.name.removeprefix(u.path) for s in u.sites] for u in units(find_sites(gm)[0])
    }


@pytest.fixture(scope="module")
def toy():
    return graph_of(seeded(ToyUNet).eval(), 3, 8, 8)


def test_a_hand_written_model_groups_into_its_blocks(toy):
    found = paths(toy)
    residual = [".conv1", ".time", ".conv2"]
    assert found["down1"] == found["mid1"] == found["mid2"] == residual
    assert found["down2"] == found["up1"] == found["up2"] == [*residual, ".skip"]
    assert found["attention"] == [".qkv", ".out"] and found["time_mlp"] == [".0", ".2"]
    lone = {path for path, names in found.items() if names == [""]}
    assert lone == {"conv_in", "shrink1", "smooth", "conv_out"}


def test_units_come_in_execution_order_and_hold_each_site_once(toy):
    sites, _ = find_sites(toy)
    found = units(sites)
    assert sorted(s.name for u in found for s in u.sites) == sorted(s.name for s in sites)
    order = [s.name for s in sites]
    first = [order.index(u.sites[0].name) for u in found]
    assert first == sorted(first)
    names = [u.path for u in found]
    assert names.index("mid1") < names.index("attention") < names.index("up2") < names.index("up1")


def test_a_diffusers_unet_groups_into_resnets_and_attentions():
    gm = capture(
        tiny_unet2d(), {"sample": torch.randn(1, 3, 16, 16), "timestep": 1}, timestep="timestep"
    ).gm
    found = paths(gm)
    attention = found["mid_block.attentions.0"]
    assert attention == [".to_q", ".to_k", ".to_v", ".to_out.0"]
    resnets = [path for path in found if ".resnets." in path]
    assert len(resnets) == 8 and all(len(found[path]) >= 3 for path in resnets)
    assert found["conv_in"] == [""] and found["down_blocks.0.downsamplers.0.conv"] == [""]
    assert not any(path in found for path in ("down_blocks.1", "mid_block", "up_blocks.0"))


def test_a_transformer_groups_into_its_halves():
    example = {
        "x": torch.randn(2, 3, 8, 8),
        "t": torch.tensor([1, 2]),
        "y": torch.tensor([1, 2]),
    }
    found = paths(capture(seeded(ToyDiT).eval(), example, timestep="t").gm)
    # mlp holds two layers itself, so that the block that holds it is no unit of its own
    assert found["blocks.0.mlp"] == [".0", ".2"]
    assert found["blocks.0.qkv"] == found["blocks.0.proj"] == found["patch"] == [""]


def test_a_flat_model_has_no_units_but_its_layers():
    b = GraphBuilder()
    h = b.layer("a", nn.Linear(WIDTH, WIDTH), b.x)
    gm = b.finish(b.layer("b", nn.Linear(WIDTH, WIDTH), h))
    assert paths(gm) == {"a": [""], "b": [""]}


def test_the_nodes_of_a_unit_are_what_its_forward_recorded(toy):
    by_path = {u.path: u for u in units(find_sites(toy)[0])}
    nodes = unit_nodes(toy, by_path["down2"])
    targets = [n.target for n in nodes if n.op == "call_module"]
    assert {"down2.norm1", "down2.conv1", "down2.time", "down2.norm2", "down2.conv2"} < set(targets)
    assert all(str(t).startswith("down2.") for t in targets)
    order = list(toy.graph.nodes)
    assert [order.index(n) for n in nodes] == sorted(order.index(n) for n in nodes)
    (lone,) = unit_nodes(toy, by_path["conv_out"])
    assert lone.target == "conv_out"
