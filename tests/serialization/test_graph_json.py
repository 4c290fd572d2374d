import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from tests.serialization.test_json_values import few, structures, through_text
from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.core.stages import Stage
from tfmq_fx.quant.timestep_table import FEATURE
from tfmq_fx.serialization.graph_json import from_json, to_json


class _Propagate(fx.Interpreter):
    def run_node(self, node):
        node.meta["val"] = super().run_node(node)
        return node.meta["val"]


def with_values(gm, *inputs, dynamic=(0,)):
    """`gm` with meta["val"] on every node; the dims in `dynamic` of every input are symbols."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    kinds = {True: DimDynamic.DYNAMIC, False: DimDynamic.STATIC}
    fakes = [
        mode.from_tensor(
            x,
            symbolic_context=StatelessSymbolicContext(
                dynamic_sizes=[kinds[d in dynamic] for d in range(x.dim())]
            ),
        )
        for x in inputs
    ]
    with mode, enable_python_dispatcher(), torch.no_grad():
        _Propagate(gm).run(*fakes)
    gm.meta["stage"] = Stage.CAPTURED
    return gm


def round_trip(gm):
    again = from_json(through_text(to_json(gm)))
    again.load_state_dict(gm.state_dict(), strict=True, assign=True)
    return again


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect", bias=False)
        self.norm = nn.GroupNorm(4, 8, eps=1e-3)
        self.act = nn.SiLU(inplace=True)
        self.drop = nn.Dropout(0.3)
        self.up = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.pool = nn.AvgPool2d(2)
        self.emb = nn.Embedding(10, 8, padding_idx=2)
        self.lin = nn.Linear(8, 8, bias=False)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.lin.weight
        self.ln = nn.LayerNorm(8, elementwise_affine=False)
        self.shift = nn.Parameter(torch.randn(8, 1, 1), requires_grad=False)
        self.register_buffer("offset", torch.arange(8.0))

    def forward(self, x, t):
        h = self.act(self.norm(self.conv(x))) + self.shift
        e = self.act(self.ln(self.tied(self.lin(self.emb(t) + self.offset))))
        h = self.pool(self.up(self.drop(h + e[:, :, None, None])))
        a, b = h.chunk(2, dim=1)
        h = torch.cat([a * 2.5, F.silu(b)], 1)
        return h.reshape(h.shape[0], -1).to(torch.float64)


INPUTS = torch.randn(3, 3, 8, 8), torch.tensor([1, 4, 2])


@functools.cache
def _net():
    torch.manual_seed(0)
    return with_values(fx.symbolic_trace(Net().eval()), *INPUTS, dynamic=(0, 2, 3))


def make_net():
    gm = copy.deepcopy(_net())  # values take half a second
    gm.meta = dict(gm.meta)
    return gm


@pytest.fixture
def net():
    return make_net()


def one_node(op, target, *args, **kwargs):
    """A graph of one call on the input x."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.create_node(op, target, tuple(x if a == "x" else a for a in args), kwargs)
    graph.output(node)
    for each in graph.nodes:
        each.meta["val"] = torch.empty(2)
    return fx.GraphModule(nn.Module(), graph)


@few
@given(st.lists(structures, min_size=1, max_size=3), st.dictionaries(st.just("key"), structures))
def test_node_arguments_come_back(args, kwargs):
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.relu, (x, *args, [x, (x,), slice(x, None)]), kwargs)
    graph.output(node)
    for each in graph.nodes:
        each.meta["val"] = 1
    again = list(from_json(through_text(to_json(fx.GraphModule({}, graph)))).graph.nodes)[1]
    # fx itself makes a torch.Size in a node's arguments a tuple
    plain = fx.node.map_arg(node.args, lambda n: n.name), fx.node.map_arg(node.kwargs, str)
    found = fx.node.map_arg(again.args, lambda n: n.name), fx.node.map_arg(again.kwargs, str)
    assert repr(found) == repr(plain)


@pytest.mark.parametrize("value", [object(), torch.zeros(1), 1j, {1, 2}, range(3), print])
def test_other_values_are_refused_naming_node_and_argument(value):
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.relu, (x,))
    node.meta["val"] = x.meta["val"] = 1
    graph.output(node)
    gm = fx.GraphModule(nn.Module(), graph)
    node._update_args_kwargs((x, [1, value]), {})  # past the checks of fx
    with pytest.raises(ArtifactError, match=r"relu: argument 1\[1\]: a saved model cannot hold"):
        to_json(gm)


def test_a_graph_comes_back_bit_identical(net):
    again = round_trip(net)
    assert torch.equal(again(*INPUTS), net(*INPUTS))
    assert again.code == net.code
    assert [n.name for n in again.graph.nodes] == [n.name for n in net.graph.nodes]
    assert not any(module.training for module in again.modules())
    assert again.shift.requires_grad is False and again.lin.weight.requires_grad is True
    assert to_json(again) == to_json(net)


def test_a_loaded_graph_can_be_saved_copied_and_run_at_other_sizes(net):
    again = copy.deepcopy(round_trip(round_trip(net)))
    x, t = torch.randn(1, 3, 12, 6), torch.tensor([9])
    assert torch.equal(again(x, t), net(x, t))


def test_metadata_comes_back(net):
    relu = next(n for n in net.graph.nodes if n.op == "call_module")
    relu.meta["nn_module_stack"] = {"": ("", Net), "conv@1": ("conv", "torch.nn.Conv2d")}
    relu.meta["source"], relu.meta[FEATURE] = "net.py:12", "down.0"
    relu.meta["other"] = object()
    net.meta |= {
        "timestep": "t",
        "timesteps": torch.tensor([0.1, 1e30], dtype=torch.float64),
        "passes": [{"name": "fold", "error": math.inf, "sizes": (1, 2)}],
        "unsaved": object(),
    }
    again = round_trip(net)
    loaded = next(n for n in again.graph.nodes if n.op == "call_module").meta
    assert loaded["nn_module_stack"] == {
        "": ("", f"{__name__}.Net"),
        "conv@1": ("conv", "torch.nn.Conv2d"),
    }
    assert (loaded["source"], loaded[FEATURE]) == ("net.py:12", "down.0")
    assert "other" not in loaded and "unsaved" not in again.meta
    assert again.meta["stage"] is Stage.CAPTURED and again.meta["timestep"] == "t"
    assert torch.equal(again.meta["timesteps"], net.meta["timesteps"])
    assert again.meta["timesteps"].dtype == torch.float64
    assert again.meta["passes"] == net.meta["passes"]


def test_unknown_and_missing_keys_are_named(net):
    data = to_json(net)
    with pytest.raises(ArtifactError, match=r"graph: unknown keys \['code'\]"):
        from_json(data | {"code": "x"})
    with pytest.raises(ArtifactError, match=r"graph: missing keys \['symbols'\]"):
        from_json({k: v for k, v in data.items() if k != "symbols"})
    with pytest.raises(ArtifactError, match=r"graph.modules: expected dict, found \[\]"):
        from_json(data | {"modules": []})


def test_graphs_that_cannot_be_saved_say_why(net):
    node = next(n for n in net.graph.nodes if n.op == "call_module")
    value = node.meta.pop("val")
    with pytest.raises(ArtifactError, match=r"conv: no meta\['val'\]"):
        to_json(net)
    node.meta["val"] = object()
    with pytest.raises(ArtifactError, match=r"conv: meta\['val'\]: a saved model cannot hold"):
        to_json(net)
    node.meta["val"] = value
    net.offset = nn.Buffer(torch.eye(3).to_sparse())
    with pytest.raises(ArtifactError, match=r"offset: a .*cannot be saved"):
        to_json(net)
    net.graph.set_codegen(fx.graph._PyTreeCodeGen(None))
    with pytest.raises(ArtifactError, match="code generator"):
        to_json(net)
