"""walk: running node by node gives what running the graph gives, and holds no more than it must."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

from tests.ir.test_sites import graph_of
from tests.strategies import WIDTH, GraphBuilder, captured_graphs, draw_inputs
from tfmq_fx.calibration.activation_store import ActivationStore
from tfmq_fx.calibration.executor import LayerwiseExecutor
from tfmq_fx.ir.graph import fork


def chunks_of(gm, count=2):
    return [tuple(draw_inputs(gm, 2, seed).values()) for seed in range(count)]


@settings(deadline=None, max_examples=20)
@given(gm=captured_graphs(), count=st.integers(1, 3))
def test_a_walk_computes_what_the_graph_computes(gm, count):
    chunks = chunks_of(gm, count)
    walk = LayerwiseExecutor(gm, chunks)
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
    walk, nodes = LayerwiseExecutor(gm, chunks_of(gm)), list(gm.graph.nodes)
    for i in range(len(nodes)):
        walk.run_past([nodes[i]])
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
    walk = LayerwiseExecutor(gm, chunks_of(gm))
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
    walk.run_past([layers[2]])
    assert set(walk.values) == {layers[2]}


def test_a_layer_replaced_ahead_of_the_walk_is_the_one_that_runs():
    gm, layers = chain()
    gm = fork(gm)
    walk = LayerwiseExecutor(gm, chunks_of(gm))
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
    walk = LayerwiseExecutor(gm, chunks_of(gm))
    walk.keep([layers[0], layers[2]])
    walk.run_past([layers[2]])
    assert set(walk.values) >= {layers[0], layers[2]}
    walk.release()
    assert layers[0] not in walk.values and layers[2] in walk.values
    walk.run_past([layers[3]])
    assert layers[2] not in walk.values


def test_names():
    b = GraphBuilder()
    value = b.call(torch.add, b.buffer("table", torch.ones(1, WIDTH)), b.x)
    gm = b.finish(value)
    walk = LayerwiseExecutor(gm, chunks_of(gm))
    assert walk.has("add") and not walk.has("sub") and walk.node("add") is value


def test_nothing_is_recorded_for_gradients():
    gm, layers = chain()
    walk = LayerwiseExecutor(gm, chunks_of(gm))
    walk.keep(layers)
    walk.run_past(layers)
    assert not any(v.requires_grad for node in layers for v in walk.values[node])


class Aliases(nn.Module):
    """Views that share storage, a broadcast one, tuples and sizes; writes in place where asked."""

    def __init__(self, writes):
        super().__init__()
        self.writes = writes

    def forward(self, x, t):
        h = torch.tanh(x) * 2
        left, right = h.chunk(2, dim=1)
        wide = x.mean(0).expand(4, *x.shape)
        values, places = torch.max(h, dim=1)
        if self.writes:
            left += 1.0
        moved = h.transpose(0, 1)
        if self.writes:
            right.mul_(2.0)
        y = moved.transpose(0, 1) * h + wide.sum(0)
        return y + values[:, None] + places[:, None] * t[:, None] + left.repeat(1, 2)


def finished(gm, chunks, spill, stops):
    """The graph's outputs after a walk that stops at `stops`, and what the arguments were there."""
    walk, seen = LayerwiseExecutor(gm, chunks, spill=spill), []
    nodes = list(gm.graph.nodes)
    for stop in stops:
        walk.stop_before(nodes[stop])
        # as they are now: later nodes may write to them
        seen += [described(walk.arguments(nodes[stop], i)) for i in range(len(chunks))]
        if spill.limit is not None:
            assert spill.used <= spill.limit
    walk.keep(nodes[-1:])
    walk.run_past(nodes[-1:])
    return seen, described(list(walk.values[nodes[-1]]))


def described(value):
    return pytree.tree_map_only(
        torch.Tensor, lambda x: (x.clone(), x.stride(), x.storage_offset()), value
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@settings(deadline=None, max_examples=20)
@given(gm=captured_graphs(), limit=st.sampled_from((0, 100, 1000)), data=st.data())
def test_results_do_not_depend_on_what_waits_in_files(gm, limit, data):
    stops = sorted(data.draw(st.lists(st.integers(0, len(gm.graph.nodes) - 1), max_size=4)))
    with ActivationStore(limit) as spill:
        found = finished(gm, chunks_of(gm, 3), spill, stops)
    assert same(found, finished(gm, chunks_of(gm, 3), ActivationStore(), stops))


@pytest.mark.parametrize("limit", [0, 40, 200, 10**6])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("writes", [False, True])
def test_views_and_tuples_survive_files_and_values_written_to_stay_in_memory(limit, every, writes):
    gm = graph_of(Aliases(writes).eval(), 4)
    chunks = [
        (torch.randn(n, 4, generator=torch.Generator().manual_seed(n)), torch.arange(n))
        for n in (2, 3)
    ]
    stops = range(0, len(gm.graph.nodes), every)
    with ActivationStore(limit) as spill:
        found = finished(gm, chunks, spill, stops)
        assert bool(spill.written) == (limit < 10**6 and not writes)
    assert same(found, finished(gm, chunks, ActivationStore(), stops))
    for chunk, output in zip(chunks, found[1], strict=True):
        assert same(output, described(gm(*chunk)))


def test_a_walk_runs_all_nodes_up_to_a_stop_on_one_chunk_before_the_next():
    gm, layers = chain()
    order = []
    for i, layer in enumerate(layers):
        module = gm.get_submodule(str(layer.target))
        module.register_forward_hook(lambda *_, i=i: order.append(i))
    LayerwiseExecutor(gm, chunks_of(gm)).stop_before(layers[3])
    assert order == [0, 1, 2, 0, 1, 2]


def test_a_node_that_has_run_is_no_stop():
    gm, layers = chain()
    walk = LayerwiseExecutor(gm, chunks_of(gm))
    walk.run_past([layers[1]])
    with pytest.raises(ValueError, match="has run already"):
        walk.stop_before(layers[0])
