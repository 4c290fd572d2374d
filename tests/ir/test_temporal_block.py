import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from tests.strategies import WIDTH, GraphBuilder, captured_graphs, draw_inputs
from tests.toys import ToyDiT, seeded
from tfmq_fx.capture.capture import capture
from tfmq_fx.core.errors import ConfigError, GraphError
from tfmq_fx.ir.binding_times import Binding, binding_times
from tfmq_fx.ir.temporal_block import temporal_block, temporal_cut

few = settings(deadline=None, max_examples=40)


class Recorder(fx.Interpreter):
    """Keeps a copy of every value at the time it is computed."""

    def run_node(self, n: fx.Node):
        value = super().run_node(n)
        self.seen[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def record(gm, inputs):
    recorder = Recorder(gm)
    recorder.seen = {}
    with torch.no_grad():
        recorder.run(*inputs.values())
    return recorder.seen


def same(a, b) -> bool:
    if isinstance(a, (tuple, list)):
        return all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else True


def timed(builder: GraphBuilder, *outputs: fx.Node, conditions=()):
    gm = builder.finish(*outputs)
    return gm, binding_times(gm, conditions)


def test_join_is_the_least_upper_bound():
    assert Binding.T.join(Binding.C) is Binding.TC
    for a in Binding:
        assert Binding.CONSTANT.join(a) is a.join(a) is a
        assert Binding.X.join(a) is Binding.X
        for b in Binding:
            assert a.join(b) is b.join(a) and a.join(b) >= max(a, b)


@few
@given(gm=captured_graphs(), seed=st.integers(0, 99))
def test_a_value_changes_only_with_what_it_is_said_to_depend_on(gm, seed):
    times = binding_times(gm, ["c"])
    first, second = draw_inputs(gm, 3, seed), draw_inputs(gm, 3, seed + 100)
    seen = record(gm, first)
    changes = {  # which inputs change -> what must not
        ("x", "unused"): Binding.TC,
        ("x", "c", "unused"): Binding.T,
        ("x", "c", "t", "unused"): Binding.CONSTANT,
    }
    for names, limit in changes.items():
        other = record(gm, {k: second[k] if k in names else v for k, v in first.items()})
        for node in gm.graph.nodes:
            if times[node] | limit == limit:
                assert same(seen[node], other[node]), node


def test_shape_dtype_and_device_reads_are_no_dependences():
    b = GraphBuilder()
    size = b.size(b.x)
    ones = b.call(torch.ones, (size, WIDTH))
    like = b.call(torch.zeros_like, b.x)
    cast = b.call("type_as", b.t, b.x)
    _, times = timed(b, ones, like, cast, b.call(operator.mul, ones, b.x))
    assert times[size] is times[ones] is times[like] is Binding.CONSTANT
    assert times[cast] is Binding.T


def test_conditions_form_their_own_binding_times():
    b = GraphBuilder()
    c = b.condition("c")
    temporal = b.sinusoid()
    both = b.call(operator.add, temporal, c)
    gm, times = timed(b, both, b.call("neg", c), conditions=["c"])
    assert times[both] is Binding.TC and times[c] is Binding.C and times[temporal] is Binding.T
    assert binding_times(gm)[both] is Binding.X
    for wrong in ("t", "nothing"):
        with pytest.raises(ConfigError, match="choose from c, x"):
            binding_times(gm, [wrong])


def test_random_operations_count_as_sample():
    b = GraphBuilder()
    temporal = b.sinusoid()
    noise = b.call(torch.rand_like, temporal)
    dropped = b.call(F.dropout, temporal, 0.5)
    kept = b.call(F.dropout, temporal, 0.5, False)
    training = b.layer("drop", nn.Dropout(), temporal)
    b.root.drop.train()
    idle = b.layer("idle", nn.Dropout(), temporal)
    _, times = timed(b, noise, dropped, kept, training, idle)
    assert times[noise] is times[dropped] is times[training] is Binding.X
    assert times[kept] is times[idle] is Binding.T
    assert [n.reason for n in times.notes] == [
        "a random operation; counts as depending on the sample"
    ] * 3


def test_a_write_in_place_reaches_everything_that_shares_the_memory():
    b = GraphBuilder()
    temporal = b.sinusoid()
    value = b.call(torch.clone, temporal)
    left = b.call(operator.getitem, value, (slice(None), slice(0, 2)))
    right = b.call(operator.getitem, value, (slice(None), slice(2, 4)))
    flat = b.call("view", right, b.size(b.t), 2, 1)
    write = b.call("add_", flat, 1.0)
    late = b.call("neg", left)
    _, times = timed(b, write, late, right, temporal)
    assert {times[n] for n in (value, left, right, flat, write, late)} == {Binding.X}
    assert times[temporal] is Binding.T
    assert [n.site for n in times.notes] == [write.name]
    assert "in place" in times.notes[0].reason


@pytest.mark.parametrize(
    "write",
    [
        lambda b, v: b.call(operator.iadd, v, b.x),
        lambda b, v: b.call(operator.setitem, v, (slice(None), 0), 1.0),
        lambda b, v: b.call(F.silu, v, inplace=True),
        lambda b, v: b.call(F.silu, v, True),
        lambda b, v: b.layer("act", nn.SiLU(inplace=True), v),
        lambda b, v: b.call(torch.neg, b.x, out=v),
        lambda b, v: b.call(torch.ops.aten.add_.Tensor, v, b.x),
    ],
)
def test_every_way_to_write_in_place_is_seen(write):
    b = GraphBuilder()
    value = b.call(torch.clone, b.sinusoid())
    write(b, value)
    b.graph.output((value,))
    gm = fx.GraphModule(b.root, b.graph)
    gm.meta["timestep"] = "t"
    assert binding_times(gm)[value] is Binding.X


def test_sizes_are_not_written():
    b = GraphBuilder()
    size = b.call(operator.iadd, b.size(b.x), 1)
    _, times = timed(b, b.call(torch.ones, (size,)))
    assert times[size] is Binding.CONSTANT and not times.notes


def test_a_graph_without_its_timestep_is_an_error():
    gm = GraphBuilder().finish()
    gm.meta["timestep"] = "step"
    with pytest.raises(GraphError, match="'step'"):
        binding_times(gm)


# ---------------------------------------------------------------------------- the cut


def tib(b: GraphBuilder, outs=(WIDTH, WIDTH)):
    """linear(silu(linear(sinusoid))) for each width, named like a UNet's."""
    h = b.layer("time.linear", nn.Linear(WIDTH, WIDTH), b.sinusoid())
    h = b.call(F.silu, h, path="time")
    return [b.layer(f"blocks.{i}.proj", nn.Linear(WIDTH, width), h) for i, width in enumerate(outs)]


def test_the_block_ends_after_the_last_layers_and_is_named_after_them():
    b = GraphBuilder()
    first, second = tib(b, (WIDTH, 2))
    shaped = b.call(operator.getitem, first, (slice(None), slice(None), None), path="blocks.0")
    gm = b.finish(
        b.call(operator.mul, b.call("squeeze", shaped, 2), b.x), b.call(torch.cat, [second, b.x], 1)
    )
    block = temporal_block(gm)
    assert [(f.name, f.node, f.shape) for f in block.features] == [
        ("blocks.0.proj", first, (WIDTH,)),
        ("blocks.1.proj", second, (2,)),
    ]
    assert block.modules == ("time.linear", "blocks.0.proj", "blocks.1.proj")
    assert block.shared == ("time.linear",)
    assert block.uses == {
        "blocks.0.proj": ("time.linear", "blocks.0.proj"),
        "blocks.1.proj": ("time.linear", "blocks.1.proj"),
    }
    assert not block.declined
    assert [n.target for n in block.graph.graph.find_nodes(op="placeholder")] == ["t"]
    assert block.summary()["shared"] == ["time.linear"]


def test_cheap_additions_per_block_stay_outside():
    """One value is stored, not one for each block: the cut is minimal, not the frontier."""
    b = GraphBuilder()
    (h,) = tib(b, (WIDTH,))
    outs = []
    for i in range(3):
        table = b.buffer(f"table_{i}", nn.Parameter(torch.ones(1, WIDTH)))
        outs.append(b.call(operator.mul, b.call(operator.add, h, table), b.x))
    gm = b.finish(*outs)
    assert temporal_cut(gm, binding_times(gm))[0] == (h,)


def test_the_narrowest_value_is_stored():
    b = GraphBuilder()
    (h,) = tib(b, (3 * WIDTH,))
    part = b.call(operator.getitem, h, (slice(None), slice(0, WIDTH)))
    gm = b.finish(b.call(operator.mul, part, b.x))
    assert temporal_cut(gm, binding_times(gm))[0] == (part,)


def test_nothing_is_stored_without_a_heavy_operation():
    b = GraphBuilder()
    gm = b.finish(b.call(operator.add, b.sinusoid(), b.x))
    block = temporal_block(gm)
    assert (block.features, block.modules, block.uses) == ((), (), {})
    assert block.graph(torch.tensor([1])) == ()


def test_a_repeat_beyond_the_batch_moves_the_cut_in_front_of_it():
    b = GraphBuilder()
    (h,) = tib(b, (WIDTH,))
    repeated = b.call("repeat_interleave", h, 3, 0)
    gm = b.finish(b.call(operator.mul, repeated, b.call("repeat_interleave", b.x, 3, 0)))
    block = temporal_block(gm)
    assert [f.node for f in block.features] == [h]


def test_a_value_without_a_batch_is_declined_and_the_others_are_not():
    b = GraphBuilder()
    first, second = tib(b)
    weight = b.buffer("weight", nn.Parameter(torch.ones(WIDTH, WIDTH)))
    mixed = b.call(torch.matmul, b.call("t", first), first)
    gm = b.finish(
        b.call(F.linear, b.x, b.call(operator.add, mixed, weight)),
        b.call(operator.mul, second, b.x),
    )
    block = temporal_block(gm)
    assert [f.node for f in block.features] == [second]
    assert any("does not begin with the batch" in d.reason for d in block.declined)


def test_a_value_that_takes_a_spatial_size_is_declined():
    b = GraphBuilder()
    (h,) = tib(b, (WIDTH,))
    mean = b.call(
        torch.bmm, b.call("unsqueeze", h, 1), b.call("new_ones", b.x, (b.size(b.x), WIDTH, 1))
    )
    scaled = b.call(operator.mul, b.call("squeeze", mean, 2), b.call(torch.zeros_like, b.x))
    deep = b.layer("deep", nn.Linear(WIDTH, WIDTH), scaled)
    gm = b.finish(b.call(operator.mul, deep, b.x))
    block = temporal_block(gm)
    assert not block.features
    assert block.declined[0].site == "deep" and "takes x as well" in block.declined[0].reason


def test_weights_that_serve_the_sample_too_are_reported():
    b = GraphBuilder()
    (h,) = tib(b, (WIDTH,))
    again = b.layer("blocks.0.proj", nn.Identity(), b.x)
    gm = b.finish(b.call(operator.mul, h, again))
    block = temporal_block(gm)
    assert [d.site for d in block.declined] == ["blocks.0.proj"]


def test_equal_names_are_made_unique():
    b = GraphBuilder()
    (h,) = tib(b, (WIDTH,))
    again = b.layer("blocks.0.proj", nn.Identity(), h)
    gm = b.finish(b.call(operator.mul, h, b.x), b.call(operator.mul, again, b.x))
    assert [f.name for f in temporal_block(gm).features] == ["blocks.0.proj", "blocks.0.proj_1"]


def test_the_cut_upto_conditions_ends_at_the_modulation_layers():
    model = seeded(ToyDiT)
    example = {"x": torch.randn(2, 3, 8, 8), "t": 0.5, "y": torch.tensor([3, 4])}
    gm = capture(model, example, timestep="t").gm
    times = binding_times(gm, ["y"])
    cut, _ = temporal_cut(gm, times, upto=Binding.TC)
    assert [node.target for node in cut] == ["blocks.0.modulation", "blocks.1.modulation"]
    assert [node.target for node in temporal_cut(gm, times, upto=Binding.C)[0]] == ["label"]
    assert [node.target for node in temporal_cut(gm, times)[0]] == ["time.2"]
