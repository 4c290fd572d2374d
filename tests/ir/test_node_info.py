import copy
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from tests.strategies import WIDTH, GraphBuilder
from tfmq_fx.core.errors import ConfigError, InputError
from tfmq_fx.core.stages import Stage, introduced_by
from tfmq_fx.ir.node_info import is_heavy, op_name, value_inputs
from tfmq_fx.ir.verifier import is_timestep_row
from tfmq_fx.quant.timestep_lookup import (
    check_timesteps,
    find_unknown,
    timestep_index,
    timestep_row,
)

KEYS = torch.tensor([-4, 0, 3, 999])
TABLE = torch.arange(8.0).view(4, 2)
numbers = st.one_of(st.integers(-(2**40), 2**40), st.floats(-1e6, 1e6, allow_nan=False))


class Lookup(nn.Module):
    def forward(self, table, keys, t):
        return timestep_row(table, keys, t) + 0.0


@settings(deadline=None)
@given(
    kind=st.sampled_from((torch.int64, torch.float64)),
    known=st.lists(numbers, min_size=1, max_size=9),
    asked=st.lists(numbers, max_size=5),
)
def test_look_up_is_by_exact_value(kind, known, asked):
    keys = torch.tensor(known, dtype=kind).unique()
    t = torch.cat([torch.tensor(asked, dtype=kind), keys.flip(0)])
    expected = [next((i for i, k in enumerate(keys) if k == v), -1) for v in t]
    assert timestep_index(keys, t).tolist() == expected
    missing = {v for v, row in zip(t.tolist(), expected, strict=True) if row < 0}
    assert find_unknown(keys, t) == sorted(missing)


def test_integers_and_floats_compare_by_value():
    assert timestep_index(KEYS, torch.tensor([3.0, 3.5, -4.0])).tolist() == [2, -1, 0]
    assert timestep_index(KEYS.double(), torch.tensor([3], dtype=torch.int32)).tolist() == [2]
    # 0.1 in bfloat16 is another number than in float32
    keys = torch.tensor([0.1]).bfloat16().double()
    assert timestep_index(keys, torch.tensor([0.1]).bfloat16()).tolist() == [0]
    assert timestep_index(keys, torch.tensor([0.1])).tolist() == [-1]
    assert timestep_index(keys, torch.tensor([float("nan")])).tolist() == [-1]


def test_rows_come_one_for_each_sample():
    rows = timestep_row(TABLE, KEYS, torch.tensor([999, -4, 999]))
    assert rows.tolist() == [[6, 7], [0, 1], [6, 7]]
    assert timestep_row(TABLE, KEYS, torch.tensor(3)).tolist() == [[4, 5]]
    assert timestep_row(TABLE.half(), KEYS, torch.tensor([0])).dtype == torch.float16


def test_an_unknown_timestep_is_named():
    with pytest.raises(
        InputError, match="timestep 1, 2; the table knows 4 timesteps: -4, 0, 3, 999"
    ):
        timestep_row(TABLE, KEYS, torch.tensor([2, 1, 0, 2]))
    with pytest.raises(InputError, match=r"0, 1, .*, \.\.\. \(50 in all\)"):
        timestep_row(torch.zeros(50, 1), torch.arange(50), torch.tensor([50]))


def test_integer_tables_are_refused():
    with pytest.raises(TypeError, match=r"not torch\.uint8"):
        timestep_row(TABLE.to(torch.uint8), KEYS, torch.tensor([0]))


def test_it_is_one_node_of_a_graph_and_known_to_the_dialect():
    gm = fx.symbolic_trace(Lookup())
    for each in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        (node,) = (n for n in each.graph.nodes if is_timestep_row(n))
        assert introduced_by(node.target) is Stage.FOLDED


@pytest.mark.parametrize("keys", [KEYS, KEYS.double() / 7], ids=["integer", "float"])
def test_export_keeps_the_node_and_marks_misses(keys):
    batch = torch.export.Dim("batch")
    exported = torch.export.export(
        Lookup(), (TABLE, keys, keys[:2]), dynamic_shapes=(None, None, {0: batch})
    )
    assert any(n.target is timestep_row for n in exported.graph.nodes)
    assert torch.equal(exported.module()(TABLE, keys, keys), TABLE)
    exported = exported.run_decompositions()
    rows = exported.module()(TABLE, keys, torch.stack([keys[1], keys[1] + 1, keys[3]]))
    assert rows[[0, 2]].tolist() == [[2, 3], [6, 7]] and rows[1].isnan().all()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("keys", [KEYS, KEYS.double() / 7], ids=["integer", "float"])
def test_compiled_look_ups_take_any_batch_and_mark_misses(backend, keys):
    torch._dynamo.reset()
    compiled = torch.compile(Lookup(), fullgraph=True, dynamic=True, backend=backend)
    for picks in ([1], [3, 0], [2, 2, 1]):
        assert torch.equal(compiled(TABLE, keys, keys[picks]), TABLE[picks])
    assert torch.isnan(compiled(TABLE, keys, keys[:1] + 1)).all()


# ---------------------------------------------------------------------------- timesteps


def test_keys_are_sorted_and_wide():
    assert check_timesteps([5, 1, 3], torch.int32).tolist() == [1, 3, 5]
    assert check_timesteps([5.0, 1.0], torch.int64).dtype == torch.int64
    keys = check_timesteps(torch.tensor([0.3, 0.1]), torch.bfloat16)
    assert keys.dtype == torch.float64
    assert keys.tolist() == torch.tensor([0.1, 0.3]).bfloat16().tolist()


@pytest.mark.parametrize(
    ("values", "dtype", "text"),
    [
        ([], torch.int64, "timesteps are empty"),
        ([1, 2, 2], torch.int64, r"duplicate timesteps \(as torch.int64\): 2"),
        ([1.0, 1.0001], torch.bfloat16, "duplicate"),
        ([float("nan")], torch.float32, "NaN or Inf"),
        ([float("inf")], torch.int64, "NaN or Inf"),
        ([1e6], torch.float16, "overflow torch.float16"),
        ([0.5, 1.0], torch.int64, "torch.int64 timesteps, which cannot hold 0.5"),
        ([300], torch.uint8, "cannot hold 300"),
        ([True], torch.int64, "got torch.bool"),
        ([[1, 2]], torch.int64, r"one-dimensional, got shape \(1, 2\)"),
        (3, torch.int64, r"got shape \(\)"),
    ],
)
def test_unusable_timesteps_are_refused(values, dtype, text):
    with pytest.raises(ConfigError, match=text):
        check_timesteps(values, dtype)


# ---------------------------------------------------------------------------- facts about torch


def test_operations_have_one_name_however_they_are_called():
    b = GraphBuilder()
    calls = (operator.add, torch.add, torch.ops.aten.add.Tensor, "add")
    assert [op_name(b.call(target, b.x, b.x)) for target in calls] == ["add"] * 4
    assert op_name(b.x) == op_name(b.layer("layer", nn.Identity(), b.x)) == ""


def test_arguments_read_for_their_shape_are_no_values():
    b = GraphBuilder()
    c = b.condition("c")
    assert value_inputs(b.size(b.x)) == []
    assert value_inputs(b.call(torch.zeros_like, b.x)) == []
    assert value_inputs(b.call("new_zeros", b.x, (3,))) == []
    assert value_inputs(b.call("expand_as", b.x, c)) == [b.x]
    assert value_inputs(b.call("to", b.x, c)) == [b.x]
    assert value_inputs(b.call(getattr, b.x, "dtype")) == []
    assert value_inputs(b.call(torch.add, b.x, other=c)) == [b.x, c]
    assert value_inputs(b.call(torch.cat, [b.x, c], 1)) == [b.x, c]


def test_heavy_operations_have_weights_or_multiply_matrices():
    b = GraphBuilder()
    weight = b.buffer("weight", nn.Parameter(torch.ones(WIDTH, WIDTH)))
    gm = b.finish(
        b.layer("linear", nn.Linear(WIDTH, WIDTH), b.x),
        b.layer("norm", nn.LayerNorm(WIDTH), b.x),
        b.call(F.linear, b.x, weight),
        b.call(operator.matmul, b.x, weight),
        b.layer("act", nn.SiLU(), b.x),
        b.call(operator.mul, b.x, 2.0),
    )
    found = [is_heavy(gm, n) for n in gm.graph.output_node().all_input_nodes]
    assert found == [True] * 4 + [False] * 2
