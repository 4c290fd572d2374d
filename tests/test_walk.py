"""walk: running node by node gives what running the graph gives, and holds no more than it must."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.strategies import WIDTH, GraphBuilder, captured_graphs, draw_inputs
from tests.toys import ToyUNet, seeded
from tfmq_fx.capture import capture
from tfmq_fx.graph import fork
from tfmq_fx.walk import Walk, attribute


def chunks_of(gm, count=2):
    return [tuple(draw_inputs(gm, 2, seed).values()) for seed in range(count)]


@settings(deadline=None, max_examples=20)
@given(gm=captured_graphs(), count=st.integers(1, 3))
def test_a_walk_computes_what_the_graph_computes(gm, count):
    chunks = chunks_of(gm, count)
    walk = Walk(gm, chunks)
    output = list(gm.graph.nodes)[-1]
    walk.keep([output])
    walk.run_past([output])
    for chunk, found in zip(chunks, walk.values[output], strict=True):
        with torch.no_grad():
            expected = gm(*chunk)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) or torch.equal(a.isnan(), b.isnan())


@settings(deadline=None, max_examples=20)
@given(gm=captured_graphs())
def test_a_walk_holds_exactly_the_values_still_needed(gm):
    walk, nodes = Walk(gm, chunks_of(gm)), list(gm.graph.nodes)
    for i in range(len(nodes)):
        assert walk.step() is nodes[i]
        later = {used for node in nodes[i + 1 :] for used in node.all_input_nodes}
        assert set(walk.values) == later & set(nodes[: i + 1])


def chain(length=4):
    b = GraphBuilder()
    value, layers = b.x, []
    for i in range(length):
        value = b.layer(f"layers.{i}", nn.Linear(WIDTH, WIDTH), value)
        layers.append(value)
    return b.finish(value), layers


def test_stopping_before_a_node_leaves_its_inputs():
    gm, layers = chain()
    walk = Walk(gm, chunks_of(gm))
    walk.stop_before(layers[2])
    assert layers[1] in walk.values and layers[2] not in walk.values
    args, kwargs = walk.arguments(layers[2], 1)
    with torch.no_grad():
        x = chunks_of(gm)[1][0]
        assert (
            torch.equal(args[0], gm.get_submodule("layers.1")(gm.get_submodule("layers.0")(x)))
            and kwargs == {}
        )
    walk.stop_before(layers[2])  # again: nothing to do
    assert walk.step() is layers[2]


def test_a_layer_replaced_ahead_of_the_walk_is_the_one_that_runs():
    gm, layers = chain()
    gm = fork(gm)
    walk = Walk(gm, chunks_of(gm))
    first, third = (walk.node(layers[i].name) for i in (0, 2))
    walk.run_past([first])
    gm.set_submodule("layers.0", nn.Identity())  # too late
    gm.set_submodule("layers.1", nn.Identity())
    walk.stop_before(third)
    with torch.no_grad():
        expected = chain()[0].get_submodule("layers.0")(chunks_of(gm)[0][0])
    assert torch.equal(walk.arguments(third, 0)[0][0], expected)


def test_kept_values_stay_until_released():
    gm, layers = chain()
    walk = Walk(gm, chunks_of(gm))
    walk.keep([layers[0], layers[2]])
    walk.run_past([layers[2]])
    assert set(walk.values) >= {layers[0], layers[2]}
    walk.release()
    assert layers[0] not in walk.values and layers[2] in walk.values
    walk.run_past([layers[3]])
    assert layers[2] not in walk.values


def test_names_and_attributes():
    b = GraphBuilder()
    value = b.call(torch.add, b.buffer("table", torch.ones(1, WIDTH)), b.x)
    gm = b.finish(value)
    walk = Walk(gm, chunks_of(gm))
    assert walk.has("add") and not walk.has("sub") and walk.node("add") is value
    assert torch.equal(attribute(gm, "table"), torch.ones(1, WIDTH))
    with pytest.raises(AttributeError):
        attribute(gm, "table.missing")


def test_nothing_is_recorded_for_gradients():
    gm, layers = chain()
    walk = Walk(gm, chunks_of(gm))
    walk.keep(layers)
    walk.run_past(layers)
    assert not any(v.requires_grad for node in layers for v in walk.values[node])


def test_the_widest_cut_bounds_what_a_walk_holds():
    model = seeded(ToyUNet).eval()
    example = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([1, 2])}
    gm = capture(model, example, timestep="t").gm
    batch = 4
    walk = Walk(gm, [(torch.randn(batch, 3, 8, 8), torch.arange(batch))])
    most = 0
    weights = {n for n in gm.graph.nodes if n.op == "get_attr"}
    for _ in gm.graph.nodes:
        walk.step()
        held = {
            v.untyped_storage().data_ptr(): v.nbytes
            for node, values in walk.values.items()
            for v in values
            if isinstance(v, torch.Tensor) and node not in weights
        }
        most = max(most, sum(held.values()))
    widest = Walk.widest(gm) * batch
    # Values that share storage are counted once here and each by widest(), and a node's inputs and
    # output count together there; apart from that it is the same sum.
    assert most <= widest <= 4 * most
