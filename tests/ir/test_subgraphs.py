"""Regions replay exactly, share modules, and know what goes in and out."""

import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from tests.ir.test_temporal_block import few, record, tib
from tests.strategies import WIDTH, GraphBuilder, captured_graphs, draw_inputs
from tfmq_fx.core.errors import GraphError
from tfmq_fx.ir.subgraphs import extract, region, region_inputs, region_outputs


@few
@given(gm=captured_graphs(), seed=st.integers(0, 99), data=st.data())
def test_extracted_regions_replay_exactly(gm, seed, data):
    seen = record(gm, draw_inputs(gm, 2, seed))
    nodes = [n for n in gm.graph.nodes if n.op.startswith("call") and isinstance(seen[n], Tensor)]
    outputs = data.draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=3, unique=True))
    cut = data.draw(st.lists(st.sampled_from(nodes), max_size=2, unique=True))
    inputs = [*gm.graph.find_nodes(op="placeholder"), *cut]
    part = extract(gm, outputs, inputs)
    found = part(*(seen[n] for n in inputs))
    assert all(torch.equal(f, seen[n]) for f, n in zip(found, outputs, strict=True))
    assert all("val" in n.meta for n in part.graph.nodes if n.op.startswith("call"))


def test_extracted_regions_share_modules_and_refuse_missing_inputs():
    b = GraphBuilder()
    (h,) = tib(b, (WIDTH,))
    gm = b.finish(b.call(operator.mul, h, b.x))
    part = extract(gm, [h], [b.t])
    assert part.get_submodule("time.linear") is gm.get_submodule("time.linear")
    with pytest.raises(GraphError, match="blocks_0_proj: cannot be computed without input 't'"):
        extract(gm, [h], [b.x])


def test_writes_inside_a_region_come_along():
    b = GraphBuilder()
    value = b.call(torch.clone, b.x)
    b.call(operator.setitem, value, (slice(None), 0), 5.0)
    out = b.call("neg", value)
    b.graph.output((out,))
    gm = fx.GraphModule(b.root, b.graph)
    gm.meta["timestep"] = "t"
    x = torch.randn(2, WIDTH)
    assert torch.equal(extract(gm, [out], [b.x])(x)[0], gm(x, torch.tensor([1, 1]))[0])


def test_a_region_is_what_a_module_recorded():
    b = GraphBuilder()
    h = b.call("neg", b.x, path="blocks.0")
    inner = b.layer("blocks.0.proj", nn.Linear(WIDTH, WIDTH), h)
    size = b.size(h)
    out = b.call("reshape", inner, size, WIDTH, path="blocks.0")
    last = b.layer("blocks.1.proj", nn.Linear(WIDTH, WIDTH), out)
    gm = b.finish(last)
    nodes = region(gm, "blocks.0")
    assert nodes == [h, inner, out]
    assert region_inputs(nodes) == [b.x] and region_outputs(nodes) == [out]
    assert region(gm, "blocks.0.proj") == [inner] and region(gm, "block") == []
    x = torch.randn(3, WIDTH)
    part = extract(gm, region_outputs(nodes), region_inputs(nodes))
    assert torch.equal(part(x)[0], record(gm, {"x": x, "t": x})[out])
