import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import guard_bool

import tfmq_fx.serialization.symbolic_sizes
from tests.serialization.test_graph_json import make_net, round_trip, with_values
from tests.serialization.test_json_values import through_text
from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.serialization.graph_json import from_json, to_json


@pytest.fixture
def net():
    return make_net()


def sizes(gm):
    """Every size and stride in the graph's values, in order."""
    values = [n.meta.get("val") for n in gm.graph.nodes]
    flat = itertools.chain.from_iterable(v if isinstance(v, tuple) else (v,) for v in values)
    return [n for v in flat if isinstance(v, torch.Tensor) for n in (*v.shape, *v.stride())]


def at(gm, batch, height, width):
    """The sizes in the graph's values where the first input is (batch, 3, height, width)."""
    shape = next(n for n in gm.graph.nodes if n.op == "placeholder").meta["val"].shape
    names = [shape[i].node.expr for i in (0, 2, 3)]
    point = dict(zip(names, (batch, height, width), strict=True))
    return [n if type(n) is int else int(n.node.expr.subs(point)) for n in sizes(gm)]


class Sizes(nn.Module):
    def forward(self, x):
        b, _, h, w = x.shape
        y = F.avg_pool2d(x, 2)[:, :, 1:].transpose(2, 3)
        y = F.interpolate(y, size=(h // 3 + b, w % 5 + 7)).permute(0, 2, 1, 3)
        return y.flatten(1).expand(b, -1), x.to(torch.float16).contiguous()


def test_symbolic_sizes_are_the_same_functions_of_the_same_symbols():
    x = torch.randn(4, 3, 11, 17)
    gm = with_values(fx.symbolic_trace(Sizes()), x, dynamic=(0, 2, 3))
    again = round_trip(gm)
    for point in ((4, 11, 17), (2, 64, 32), (7, 12, 19)):
        assert at(again, *point) == at(gm, *point)
    env = {n.node.shape_env for n in sizes(again) if type(n) is not int}
    assert len(env) == 1 and env != {n.node.shape_env for n in sizes(gm) if type(n) is not int}
    assert not next(iter(env)).guards
    loaded = next(n for n in again.graph.nodes if n.op == "placeholder").meta["val"]
    assert loaded.shape[2].node.hint == 11 and guard_bool(loaded.shape[0] < 5)


def test_an_expression_that_cannot_be_written_becomes_a_symbol_of_its_own(net, monkeypatch):
    monkeypatch.delitem(tfmq_fx.serialization.symbolic_sizes._EXPRESSIONS, "Mult")
    again = round_trip(net)
    product = again.graph.output_node().args[0].meta["val"].shape[1]
    assert product.node.hint == 8 * 8 * 8 and len(product.node.expr.free_symbols) == 1
    view = next(n for n in again.graph.nodes if n.target == "reshape").meta["val"].shape[1]
    assert view.node.expr == product.node.expr


def test_symbolic_numbers_come_back():
    gm = with_values(fx.symbolic_trace(Sizes()), torch.randn(4, 3, 11, 17), dynamic=(0, 2, 3))
    x = next(n for n in gm.graph.nodes if n.op == "placeholder")
    b, h = x.meta["val"].shape[0], x.meta["val"].shape[2]
    x.meta["val"] = (
        h // 2 + b,
        torch.sym_sqrt(h),
        h > b,
        [torch.sym_max(h, 3), 5],
        {"k": math.floor(torch.sym_float(h) * 1.5)},
        None,
        torch.float32,
    )
    found = next(iter(round_trip(gm).graph.nodes)).meta["val"]
    assert [type(v).__name__ for v in found[:3]] == ["SymInt", "SymFloat", "SymBool"]
    assert found[0].node.hint == 9 and found[1].node.hint == math.sqrt(11)
    assert guard_bool(found[2]) and found[3][0].node.hint == 11 and found[3][1] == 5
    assert found[4]["k"].node.hint == 16 and found[5:] == (None, torch.float32)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "s0.real",
        "9**9**9",
        "1 // 0",
        "(lambda: 1)()",
        "[1]",
        "s9",
        "s0 +",
    ],
)
def test_expressions_are_not_evaluated_as_code(net, text):
    data = through_text(to_json(net))
    data["nodes"][0]["val"]["tensor"]["shape"][0] = text
    with pytest.raises(ArtifactError, match="is no expression of sizes"):
        from_json(data)
