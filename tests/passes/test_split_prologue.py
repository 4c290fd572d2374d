"""The prologue's parts and the step together compute what the graph does, bit for bit."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from tests.exact import assert_untouched, snapshot
from tests.strategies import STEPS, WIDTH, GraphBuilder, captured_graphs, draw_inputs
from tests.toys import ToyDiT, seeded
from tfmq_fx.capture.capture import capture
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.functionalize import inplace_
from tfmq_fx.ir.request_cut import looks_up
from tfmq_fx.passes.fold_timesteps import fold_timesteps
from tfmq_fx.passes.split_prologue import Split, split_prologue
from tfmq_fx.serialization.graph_json import from_json, to_json


def run(split: Split, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The outputs by way of the parts."""
    given = [inputs[name] for name in split.kept]
    for part in split.parts:
        values = part.graph(inputs["t"], *(inputs[name] for name in part.conditions))
        assert len(values) == len(part.names) == len(part.batched) == len(part.returned)
        for value, batched in zip(values, part.batched, strict=True):
            assert not batched or value.shape[0] == len(inputs["t"])
        given += values
    return tuple(split.step(*given))


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@settings(deadline=None, max_examples=12)
@given(
    gm=captured_graphs(),
    conditions=st.sampled_from((("c",), (), ("c", "unused"), ("c", "x"))),
    steps=st.sampled_from((1, 2, 50)),
    saved=st.booleans(),
)
@torch.no_grad()
def test_any_graph(
    gm: fx.GraphModule, conditions: tuple[str, ...], steps: int, saved: bool
) -> None:
    gm.meta["stage"] = Stage.CAPTURED
    if saved:
        state = gm.state_dict()
        gm = from_json(to_json(gm))
        gm.load_state_dict(state, strict=False, assign=True)  # layers that nothing calls went
    before = snapshot(gm)
    split = split_prologue(gm, conditions, steps=steps)
    assert_untouched(gm, before)
    for batch in (1, 3):
        inputs = draw_inputs(gm, batch, seed=batch)
        assert same(run(split, inputs), gm(*inputs.values()))
    names = {n.target for n in split.step.graph.find_nodes(op="placeholder")}
    values = [name for part in split.parts for name in part.names]
    assert names == {*split.kept, *values} and split.kept.count("t") == 1
    every = dict((*gm.named_parameters(), *gm.named_buffers()))
    held = {id(t) for t in (*split.step.parameters(), *split.step.buffers())}
    for name, tensor in split.freed.items():
        assert every[name] is tensor and id(tensor) not in held


def test_a_step_on_patches() -> None:
    model = seeded(ToyDiT).eval()
    example = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([3, 9]), "y": torch.tensor([1, 2])}
    gm = capture(model, example, timestep="t").gm
    split = split_prologue(gm, ["y"], steps=2)
    (part,) = split.parts
    assert part.names == ("blocks_0_modulation", "blocks_1_modulation")
    assert (part.conditions, part.stepped) == (("y",), True)
    assert part.step_bytes == 2 * 6 * 32 * 4 and part.batched == (True, True)
    assert part.returned == (False, False) and split.kept == ("x", "t") and not split.declined
    layers = ("time.0", "time.2", "label", "blocks.0.modulation", "blocks.1.modulation")
    assert {name.rpartition(".")[0] for name in split.freed} == set(layers)
    assert split.step.get_submodule("head") is gm.get_submodule("head")
    with pytest.raises(ConfigError, match="no condition label; choose from x, y"):
        split_prologue(gm, ["label"], steps=2)


def test_folded_tables_are_read_in_the_prologue() -> None:
    b = GraphBuilder()
    c = b.condition("c")
    time = b.layer("time", nn.Linear(WIDTH, WIDTH), b.sinusoid())
    both = b.layer("both", nn.Linear(WIDTH, 64), b.call(operator.add, time, c))
    both = b.layer("merge", nn.Linear(64, WIDTH), b.call(F.silu, both))
    gm = b.finish(b.call(operator.mul, b.call(operator.add, b.x, time), both))
    gm.meta["stage"] = Stage.CAPTURED
    folded = fold_timesteps(gm, timesteps=STEPS).gm
    split = split_prologue(folded, ["c"], steps=len(STEPS))
    assert {(p.conditions, p.stepped) for p in split.parts} == {((), True), (("c",), True)}
    assert not any(looks_up(split.step, node) for node in split.step.graph.nodes)
    inputs = draw_inputs(folded, 2)
    assert same(run(split, inputs), folded(*inputs.values()))


@torch.no_grad()
@pytest.mark.parametrize("place", ["output", "view", "value"])
def test_writes_stay_in_the_step(place: str) -> None:
    """Also those to an output, behind the operation that makes it."""
    b = GraphBuilder()
    value = b.layer("one", nn.Linear(WIDTH, WIDTH), b.condition("c"))
    value = b.layer("two", nn.Linear(WIDTH, WIDTH), value)
    if place == "value":
        b.call(inplace_, value, "mul_", 2.0)
        out = b.call(operator.mul, value, b.x)
    else:
        out = b.call(operator.mul, value, b.x)
        target = b.call(operator.getitem, out, (slice(None), slice(0, 2)))
        b.call(inplace_, target if place == "view" else out, "add_", 1.0)
    gm = b.finish(out)
    gm.meta["stage"] = Stage.CAPTURED
    split = split_prologue(gm, ["c"], steps=1)
    inputs = draw_inputs(gm, 2)
    for _ in range(2):  # nothing that is kept may be written to
        assert same(run(split, inputs), gm(*inputs.values()))
    kept = [name for part in split.parts for name in part.names]
    assert kept == (["one"] if place == "value" else ["two"])


@pytest.mark.parametrize("view", ["itself", "view", "identity", "sum"])
def test_values_that_an_output_may_share_memory_with(view: str) -> None:
    b = GraphBuilder()
    value = b.layer("one", nn.Linear(WIDTH, WIDTH), b.condition("c"))
    shown = {
        "itself": lambda: value,
        "view": lambda: b.call("unsqueeze", value, 1),
        "identity": lambda: b.layer("identity", nn.Identity(), value),
        "sum": lambda: b.call(operator.add, value, 1.0),
    }[view]()
    gm = b.finish(b.call(operator.mul, b.x, value), shown)
    gm.meta["stage"] = Stage.CAPTURED
    (part,) = split_prologue(gm, ["c"], steps=1).parts
    assert part.names == ("one",) and part.returned == (view != "sum",)


def test_a_batch_that_is_fixed() -> None:
    model = seeded(ToyDiT).eval()
    example = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([3, 9]), "y": torch.tensor([1, 2])}
    gm = capture(model, example, timestep="t", dynamic=()).gm
    split = split_prologue(gm, ["y"], steps=2)
    (part,) = split.parts
    assert part.batched == (True, True)
    assert same(run(split, example), gm(*example.values()))
