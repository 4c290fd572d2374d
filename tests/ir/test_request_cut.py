"""What a request fixes: the cheapest values that spare the heavy operations, and why not others."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import fx, nn

from tests.strategies import WIDTH, GraphBuilder, captured_graphs
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.ir.binding_times import Binding, binding_times
from tfmq_fx.ir.min_cut import minimum_cut, stored_bytes
from tfmq_fx.ir.node_info import is_heavy
from tfmq_fx.ir.request_cut import Group, find_request, left_nodes, tensors_of
from tfmq_fx.ir.subgraphs import extract_nodes

few = settings(deadline=None, max_examples=12)


def early_nodes(gm: fx.GraphModule) -> set[fx.Node]:
    times = binding_times(gm, ["c"])
    return {
        n for n in gm.graph.nodes if n.op != "output" and times[n].join(Binding.TC) is Binding.TC
    }


def outputs(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="output"))


def left(gm: fx.GraphModule, cut: Collection[fx.Node]) -> set[fx.Node]:
    given = [*gm.graph.find_nodes(op="placeholder"), *cut]
    return set(extract_nodes(gm, outputs(gm), given))


# ---------------------------------------------------------------- minimum cuts


@few
@given(gm=captured_graphs(), data=st.data())
def test_no_cut_is_cheaper(gm: fx.GraphModule, data: st.DataObject) -> None:
    """Against all sets of values, at costs drawn for each value, some of which cannot be stored."""
    early = early_nodes(gm)
    heavy = {n for n in early if is_heavy(gm, n)}
    needed = left(gm, ())
    free = [n for n in gm.graph.nodes if n in early & needed and n.op != "placeholder"]
    assume(0 < len(free) <= 9)
    price = {n: data.draw(st.integers(1, 5)) for n in gm.graph.nodes}
    blocked = {n: "drawn" for n in free if data.draw(st.integers(0, 5)) == 0}
    blocked |= {n: "an input" for n in early if n.op in ("placeholder", "get_attr")}
    cut, declined = minimum_cut(
        gm.graph, early, heavy=heavy, obstacles=blocked, cost=price.__getitem__
    )
    assert not set(cut) & set(blocked) and list(cut) == [n for n in gm.graph.nodes if n in cut]
    if declined:  # some way from a heavy operation to the rest leads past no value that can be kept
        assert {d.site for d in declined} <= {n.name for n in blocked}
        assert left(gm, [n for n in early if n not in blocked]) & heavy
        return
    assert not left(gm, cut) & heavy
    allowed = [n for n in free if n not in blocked]
    for size in range(len(allowed) + 1):
        for other in itertools.combinations(allowed, size):
            if not left(gm, other) & heavy:
                assert sum(map(price.__getitem__, cut)) <= sum(map(price.__getitem__, other))


def test_without_heavy_operations_there_is_no_cut() -> None:
    b = GraphBuilder()
    gm = b.finish(b.call(operator.add, b.x, b.sinusoid()))
    found = minimum_cut(gm.graph, early_nodes_of_t(gm), heavy=(), obstacles={}, cost=lambda n: 1)
    assert found == ((), [])


def early_nodes_of_t(gm: fx.GraphModule) -> set[fx.Node]:
    times = binding_times(gm)
    return {n for n in gm.graph.nodes if times[n].join(Binding.T) is Binding.T}


# ---------------------------------------------------------------- what is stored


def wide(b: GraphBuilder, path: str, value: fx.Node, width: int = 64) -> fx.Node:
    """Two layers with many weights behind `value`, (B, WIDTH)."""
    h = b.layer(f"{path}.up", nn.Linear(WIDTH, width), value)
    return b.layer(f"{path}.down", nn.Linear(width, WIDTH), b.call(F.silu, h))


def names(groups: list[Group]) -> list[tuple[tuple[str, ...], bool, list[str]]]:
    return [(g.conditions, g.stepped, [n.name for n in g.values]) for g in groups]


def test_groups_by_what_values_depend_on() -> None:
    b = GraphBuilder()
    c, d = b.condition("c"), b.condition("d")
    of_t, of_c = wide(b, "t", b.sinusoid()), wide(b, "c", c)
    of_tc = wide(b, "tc", b.call(operator.mul, b.sinusoid(), d))
    of_both = wide(b, "both", b.call(operator.mul, c, d))
    y = b.x
    for value in (of_both, of_tc, of_c, of_t):
        y = b.call(torch.maximum, y, b.call(operator.mul, b.x, value))
    gm = b.finish(y)
    groups, declined = find_request(gm, ["d", "c"], steps=1)
    assert sorted(names(groups)) == [
        ((), True, ["t_down"]),
        (("c",), False, ["c_down"]),
        (("c", "d"), False, ["both_down"]),
        (("d",), True, ["tc_down"]),
    ]
    assert not declined
    cut = [node for group in groups for node in group.values]
    assert not any(is_heavy(gm, node) for node in left_nodes(gm, cut))


def test_inputs_that_are_not_conditions_stay_in_the_step() -> None:
    b = GraphBuilder()
    gm = b.finish(b.call(operator.add, b.x, wide(b, "c", b.condition("c"))))
    assert find_request(gm, [], steps=1) == ([], [])
    with pytest.raises(ConfigError, match="no condition y; choose from c, x"):
        find_request(gm, ["y"], steps=1)
    with pytest.raises(ConfigError, match="no condition t"):
        find_request(gm, ["t"], steps=1)


def test_rows_are_weighed_with_the_number_of_steps() -> None:
    b = GraphBuilder()
    value = wide(b, "tc", b.call(operator.mul, b.sinusoid(), b.condition("c")), width=8)
    gm = b.finish(b.call(operator.mul, b.x, value))
    weights = sum(t.nbytes for t in tensors_of(gm, gm.graph.nodes).values()) - 4 * 4  # frequencies
    assert weights == 4 * (4 * 8 + 8 + 8 * 4 + 4)
    row = 4 * WIDTH
    assert stored_bytes(value) == row
    most = (weights + 16) // row
    assert names(find_request(gm, ["c"], steps=most)[0]) == [(("c",), True, ["tc_down"])]
    groups, declined = find_request(gm, ["c"], steps=most + 1)
    assert not groups
    assert [(d.site, d.reason) for d in declined] == [
        (
            "tc_down",
            f"its rows would take {row * (most + 1)} bytes and the weights they replace "
            f"{weights + 16}",
        )
    ]


def test_the_cut_goes_behind_what_makes_a_value_smaller() -> None:
    b = GraphBuilder()
    large = b.layer("large", nn.Linear(WIDTH, 200), b.condition("c"))
    mean = b.call("mean", b.call(torch.tanh, large), 1, keepdim=True)
    gm = b.finish(b.call(operator.mul, b.x, mean))
    assert names(find_request(gm, ["c"], steps=1)[0]) == [(("c",), False, ["mean"])]


def test_a_refused_value_leaves_the_others() -> None:
    """Its layer is computed at every step; what else it needs is not."""
    b = GraphBuilder()
    early = wide(b, "early", b.call(operator.mul, b.sinusoid(), b.condition("c")))
    small = wide(b, "small", early)
    large = b.layer("large", nn.Linear(WIDTH, 300, bias=False), early)
    outer = b.call(operator.mul, large, b.call("mean", b.x, 1, keepdim=True))
    gm = b.finish(b.call(operator.mul, b.x, small), b.call("sum", outer, 1, keepdim=True))
    groups, declined = find_request(gm, ["c"], steps=2)
    assert names(groups) == [(("c",), True, ["small_down", "large"])] and not declined
    groups, declined = find_request(gm, ["c"], steps=10)
    assert names(groups) == [(("c",), True, ["early_down", "small_down"])]
    assert [d.site for d in declined] == ["large"]


def test_what_serves_the_sample_as_well_does_not_count_as_replaced() -> None:
    b = GraphBuilder()
    layer = nn.Linear(WIDTH, WIDTH)
    of_c = b.layer("both", layer, b.condition("c"))
    gm = b.finish(b.call(operator.mul, b.layer("both", layer, b.x), of_c))
    groups, declined = find_request(gm, ["c"], steps=1)
    assert not groups and declined[0].reason.endswith("the weights they replace 0")


def test_only_writes_that_matter_keep_a_value_in_the_step() -> None:
    b = GraphBuilder()
    value = wide(b, "c", b.condition("c"))
    written = b.call("mul_", value, 2.0)
    gm = b.finish(b.call(operator.mul, b.x, written))
    groups, declined = find_request(gm, ["c"], steps=1)
    cut = [node for group in groups for node in group.values]
    assert value not in cut and written not in cut
    assert any("writes in place" in d.reason for d in declined)


@few
@given(gm=captured_graphs(), steps=st.sampled_from((1, 2, 10, 10000)))
def test_what_is_stored_never_outweighs_what_it_replaces(gm: fx.GraphModule, steps: int) -> None:
    groups, declined = find_request(gm, ["c"], steps=steps)
    cut = [node for group in groups for node in group.values]
    kept = tensors_of(gm, left_nodes(gm, cut))
    inside = extract_nodes(gm, cut, list(gm.graph.find_nodes(op="placeholder")))
    freed = sum(t.nbytes for key, t in tensors_of(gm, inside).items() if key not in kept)
    rows = sum(
        stored_bytes(node) * (steps if group.stepped else 1)
        for group in groups
        for node in group.values
    )
    assert rows <= freed or not cut
    times = binding_times(gm, ["c"])
    for group in groups:
        for node in group.values:
            assert group.stepped == ("t" in times.deps[node])
            assert group.conditions == (("c",) if "c" in times.deps[node] else ())
    declined = {d.site for d in declined}
    assert not declined & {node.name for node in cut}
    # what is computed at every step for all that has its reason
    heavy = {n for n in early_nodes(gm) & left(gm, cut) if is_heavy(gm, n)}
    assert declined or all(times[n] is Binding.CONSTANT for n in heavy)
