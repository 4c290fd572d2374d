"""boxes: modules down to a depth, in an order in which they can be computed."""

import networkx as nx
import pytest
import torch

from tests.toys import NestedOutput, SharedTwice, ToyDiT, ToyUNet, seeded, tiny_unet2d
from tfmq_fx.diagnostics.analyze import analyze
from tfmq_fx.diagnostics.graph_boxes import Box, Op, collapse
from tfmq_fx.ir.binding_times import Binding

IMAGES = (torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]))
MAKERS = {
    "unet2d": lambda: analyze(tiny_unet2d()),
    "unet": lambda: analyze(seeded(ToyUNet).eval(), IMAGES),
    "dit": lambda: analyze(seeded(ToyDiT).eval(), (*IMAGES, torch.tensor([3, 4]))),
    "nested": lambda: analyze(seeded(NestedOutput), (torch.zeros(2, 4), torch.ones(2))),
    "twice": lambda: analyze(seeded(SharedTwice), (torch.zeros(2, 4), torch.ones(2))),
}


@pytest.fixture(scope="module", params=MAKERS)
def found(request):
    return MAKERS[request.param]()


@pytest.mark.parametrize("depth", [1, 2, 3, 9])
def test_nothing_is_lost_and_no_edge_goes_back(found, depth):
    ops = found.drawing.ops
    boxes, edges = collapse(ops, depth)
    assert sorted(map(id, ops)) == sorted(id(op) for box in boxes for op in box.ops)
    assert all(source < target for source, target in edges)
    assert nx.is_directed_acyclic_graph(nx.DiGraph(edges))
    where = {id(op): i for i, box in enumerate(boxes) for op in box.ops}
    expected = {(where[id(ops[j])], where[id(op)]) for op in ops for j in op.reads}
    assert set(edges) == {(a, b) for a, b in expected if a != b}
    used = found.data["parameters"] - found.data["unused_parameters"]
    assert sum(box.parameters for box in boxes) == used
    assert sum(box.flops for box in boxes) == found.data["flops"]
    assert all(abs(sum(box.mix().values()) - 1) < 1e-9 for box in boxes)


def titles(found, depth, kind="module"):
    return [box.title for box in collapse(found.drawing.ops, depth)[0] if box.kind == kind]


def test_modules_are_drawn_down_to_the_depth():
    found = MAKERS["unet2d"]()
    names = ["time_proj", "time_embedding", "conv_in", "down_blocks.0", "down_blocks.1"]
    tail = ["up_blocks.0", "up_blocks.1", "conv_norm_out", "conv_act", "conv_out"]
    assert titles(found, 1) == [*names, "mid_block", *tail]
    embedding = ["time_embedding.linear_1", "time_embedding.act", "time_embedding.linear_2"]
    # mid_block.resnets is only a container, so the modules in it are drawn
    middle = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    assert titles(found, 2) == ["time_proj", *embedding, *names[2:], *middle, *tail]
    assert "down_blocks.0.resnets.0.conv1" in titles(found, 5)
    assert titles(found, 1, "input") == ["sample", "timestep"]
    assert titles(found, 1, "output") == ["output"]


def test_operations_outside_of_modules_are_apart_by_binding_time():
    found = MAKERS["dit"]()
    loose = [box for box in collapse(found.drawing.ops, 2)[0] if box.kind == "ops"]
    assert [(box.title, list(box.mix())) for box in loose] == [
        ("add", [Binding.X]),
        ("arange, mul, truediv, ...", [Binding.T]),
        ("add", [Binding.TC]),
    ]
    patch = next(b for b in collapse(found.drawing.ops, 2)[0] if b.title == "patch")
    assert [op.name for op in patch.ops] == ["call_module", "flatten", "transpose"]


def test_every_call_of_a_module_is_a_box():
    assert titles(MAKERS["twice"](), 2).count("linear") == 3


def op(binding, parameters=0):
    return Op("f", "op", (), binding, parameters, 0, "", False, ())


def test_mixes_are_of_parameters_else_of_operations():
    box = Box("ops", "", "", "", [op(Binding.X, 3), op(Binding.T, 1), op(Binding.T)])
    assert list(box.mix().items()) == [(Binding.T, 0.25), (Binding.X, 0.75)]
    box = Box("ops", "", "", "", [op(Binding.CONSTANT), op(Binding.T), op(Binding.TC)])
    assert box.mix() == {Binding.T: 0.5, Binding.TC: 0.5}
    assert Box("ops", "", "", "", [op(Binding.CONSTANT)]).mix() == {Binding.CONSTANT: 1.0}
