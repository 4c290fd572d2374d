import copy
import functools
import importlib
import itertools
import json
import math
import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    guard_bool,
)

import tfmq_fx.nn
from tfmq_fx.affine import QParams
from tfmq_fx.dialect import Stage, check
from tfmq_fx.errors import ArtifactError
from tfmq_fx.graph_json import decode, encode, from_json, tensors_of, to_json
from tfmq_fx.ops import timestep_row
from tfmq_fx.tables import QuantTimestepTable

few = settings(deadline=None, max_examples=60)


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


def through_text(data):
    return json.loads(json.dumps(data, allow_nan=False))


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


def edited(gm, **changes):
    """The saved form of a one-node graph, with the call replaced."""
    data = to_json(gm)
    data["nodes"][1].update(changes)
    return through_text(data)


SAFE = one_node("call_function", torch.relu, "x")


# ---------------------------------------------------------------- values

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.just(...),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64]),
    st.sampled_from([torch.device("cpu"), torch.device("cuda:1"), torch.device("cuda")]),
    st.sampled_from([torch.channels_last, torch.contiguous_format, torch.preserve_format]),
    st.sampled_from([torch.strided, torch.sparse_coo]),
    st.lists(st.integers(0, 9)).map(torch.Size),
    st.builds(slice, st.none() | st.integers(), st.none() | st.integers(), st.none()),
)
structures = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text() | st.integers(), inner, max_size=4),
    ),
    max_leaves=12,
)


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (
            math.isnan(a) and math.isnan(b) or (a, math.copysign(1, a)) == (b, math.copysign(1, b))
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return a == b


@few
@given(structures)
def test_values_come_back_equal_and_of_the_same_type(value):
    assert same(decode(through_text(encode(value, "x")), "x"), value)


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


def test_damaged_values_are_refused():
    for data in (
        {"tuple": 3},
        {"pickle": "x"},
        {"dtype": "load"},
        {"dtype": "Tensor"},
        {},
        {"a": 1, "b": 2},
    ):
        with pytest.raises(ArtifactError, match="damaged value"):
            decode(data, "x")


# ---------------------------------------------------------------- graphs


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


def test_behaviour_of_modules_comes_back(net):
    again = round_trip(net)
    assert again.conv.padding_mode == "reflect" and again.conv.bias is None
    assert again.norm.eps == 1e-3 and again.act.inplace and again.drop.p == 0.3
    assert again.up.scale_factor == 2.0 and again.emb.padding_idx == 2
    assert again.ln.elementwise_affine is False and again.ln.weight is None


LEAVES = [
    nn.Conv1d(4, 4, 3, padding="same", dilation=2, groups=2),
    nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1),
    nn.Conv3d(1, 2, 3, bias=False, padding_mode="circular", padding=1),
    nn.Linear(4, 2, dtype=torch.float64),
    nn.BatchNorm2d(4, momentum=None, affine=False),
    nn.GELU("tanh"),
    nn.LeakyReLU(0.3),
    nn.Softmax(-1),
    nn.PReLU(4),
    nn.Identity(),
    nn.RMSNorm(4, eps=None),
    nn.AdaptiveAvgPool2d((1, None)),
    nn.MaxPool2d([2, 2], ceil_mode=True),
    nn.PixelShuffle(2),
    nn.ZeroPad2d((1, 0, 1, 0)),
    nn.Unflatten(1, (2, 2)),
    nn.Embedding(4, 2, max_norm=1.0),
    nn.MultiheadAttention(8, 2, batch_first=True),
    nn.Hardtanh(-2.0, 2.0),
    nn.Linear(4, 2).to(torch.bfloat16),
]


def of_module(module, name="leaf"):
    root = nn.Module()
    root.add_module(name, module.eval())
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_module(name, (x,))
    graph.output(node)
    node.meta["val"] = x.meta["val"] = torch.empty(2)
    return fx.GraphModule(root, graph)


@pytest.mark.parametrize("module", LEAVES, ids=lambda m: type(m).__name__)
def test_every_leaf_module_is_rebuilt_as_it_was(module):
    again = round_trip(of_module(module)).leaf
    assert repr(again) == repr(module) and type(again) is type(module)
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
        assert again.state_dict()[name].dtype == value.dtype
    internal = set(vars(nn.Module()))
    for name in set(vars(module)) - internal:
        assert getattr(again, name) == getattr(module, name)


def test_loading_leaves_the_random_state_alone(net):
    data = to_json(net)
    before = torch.get_rng_state()
    from_json(data)
    assert torch.equal(torch.get_rng_state(), before)


def test_shared_modules_stay_shared():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x))

    gm = with_values(fx.symbolic_trace(Twice().eval()), torch.randn(2, 4))
    _, second = [n for n in gm.graph.nodes if n.op == "call_module"]
    second.target = "b"
    gm.add_submodule("b", gm.a)
    gm.recompile()
    again = round_trip(gm)
    assert again.a is again.b


def test_parts_of_a_called_module_may_be_read_and_called():
    gm = of_module(nn.Linear(2, 2))
    _, linear, output = gm.graph.nodes
    with gm.graph.inserting_before(output):
        weight = gm.graph.get_attr("leaf.weight")
        total = gm.graph.call_function(torch.matmul, (linear, weight))
    total.meta["val"] = torch.empty(2)
    output.args = (total,)
    gm.recompile()
    again = round_trip(gm)
    value = torch.randn(3, 2)
    assert torch.equal(again(value), gm(value))


def test_buffers_outside_the_state_dict_stay_outside():
    gm = fx.symbolic_trace(Net().eval())
    with_values(gm, *INPUTS)
    gm.register_buffer("offset", gm.offset, persistent=False)
    again = from_json(through_text(to_json(gm)))
    assert "offset" not in again.state_dict() and "offset" in dict(again.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.bool, torch.complex64])
def test_empty_tensors_have_shape_and_dtype(dtype):
    root = nn.Module()
    root.a = nn.Module()
    root.a.register_buffer("0", torch.zeros(2, 0, 3).to(dtype))
    graph = fx.Graph()
    graph.output(graph.get_attr("a.0"))
    gm = fx.GraphModule(root, graph)
    found = tensors_of(from_json(through_text(to_json(gm))))
    assert found["a.0"].dtype == dtype and found["a.0"].shape == (2, 0, 3)


def test_quantized_layers_and_look_ups_come_back():
    layer = tfmq_fx.nn.QuantLinear.from_float(
        nn.Linear(4, 3), weight_bits=4, act_bits=8, per_timestep=False
    )
    layer.set_weight(
        torch.randint(0, 16, (3, 4)), QParams(torch.rand(3) + 0.1, torch.full((3,), 7), 4)
    )
    layer.set_static_range(0.05, 3)
    root = nn.Module()
    root.layer = layer
    root.register_buffer("rows", torch.randn(2, 4))
    root.register_buffer("known", torch.tensor([0, 5]))
    graph = fx.Graph()
    t = graph.placeholder("t")
    row = graph.call_function(timestep_row, (graph.get_attr("rows"), graph.get_attr("known"), t))
    out = graph.call_module("layer", (row,))
    graph.output(out)
    gm = with_values(fx.GraphModule(root, graph), torch.tensor([5, 0, 5]))
    gm.meta["stage"] = Stage.QUANTIZED
    again = round_trip(gm)
    assert type(again.layer) is tfmq_fx.nn.QuantLinear
    assert torch.equal(again(torch.tensor([5, 0])), gm(torch.tensor([5, 0])))
    check(again, Stage.QUANTIZED)


@pytest.mark.parametrize("bits", [4, 8])
def test_cached_tables_come_back(bits):
    torch.manual_seed(0)
    keys, rows = torch.tensor([1, 5, 9]), [torch.randn(3, 5), torch.randn(3, 2)]
    gm = of_module(QuantTimestepTable.from_rows(keys, rows, bits=bits))
    gm.meta["stage"] = Stage.FOLDED
    assert torch.equal(round_trip(gm)(keys[:2]), gm(keys[:2]))
    assert "leaf.feature" not in tensors_of(gm)  # computed by the constructor


# ---------------------------------------------------------------- metadata


def test_metadata_comes_back(net):
    relu = next(n for n in net.graph.nodes if n.op == "call_module")
    relu.meta["nn_module_stack"] = {"": ("", Net), "conv@1": ("conv", "torch.nn.Conv2d")}
    relu.meta["source"], relu.meta["temporal_feature"] = "net.py:12", "down.0"
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
    assert (loaded["source"], loaded["temporal_feature"]) == ("net.py:12", "down.0")
    assert "other" not in loaded and "unsaved" not in again.meta
    assert again.meta["stage"] is Stage.CAPTURED and again.meta["timestep"] == "t"
    assert torch.equal(again.meta["timesteps"], net.meta["timesteps"])
    assert again.meta["timesteps"].dtype == torch.float64
    assert again.meta["passes"] == net.meta["passes"]


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
    monkeypatch.delitem(tfmq_fx.graph_json._EXPRESSIONS, "Mult")
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
    ["__import__('os').system('x')", "s0.real", "9**9**9", "(lambda: 1)()", "[1]", "s9", "s0 +"],
)
def test_expressions_are_not_evaluated_as_code(net, text):
    data = through_text(to_json(net))
    data["nodes"][0]["val"]["tensor"]["shape"][0] = text
    with pytest.raises(ArtifactError, match="damaged"):
        from_json(data)


# ---------------------------------------------------------------- what is refused

FORBIDDEN = [
    ("torch.load", torch.load),
    ("os.system", os.system),
    ("builtins.eval", eval),
    ("builtins.exec", exec),
    ("builtins.__import__", __import__),
    ("builtins.setattr", setattr),
    ("torch.hub.load", torch.hub.load),
    ("torch.save", torch.save),
    ("torch.from_file", torch.from_file),
    ("torch.compile", torch.compile),
    ("torch.Tensor.__reduce_ex__", torch.Tensor.__reduce_ex__),
    ("operator.attrgetter", __import__("operator").attrgetter),
    ("operator.methodcaller", __import__("operator").methodcaller),
    ("torch.nn.functional.boolean_dispatch", F.boolean_dispatch),
    ("torch.ops.aten.from_file.default", torch.ops.aten.from_file.default),
    ("torch.ops.aten.save.default", torch.ops.aten.save.default),
    ("torch.ops.profiler._record_function_enter.default", None),
    ("torch.ops.load_library", torch.ops.load_library),
    ("tfmq_fx.graph_json.from_json", from_json),
    ("tfmq_fx.graph_json.importlib.import_module", importlib.import_module),
    ("tfmq_fx.__main__.main", None),
    ("tfmq_fx..x", None),
    ("", None),
]


@pytest.mark.parametrize(("name", "function"), FORBIDDEN, ids=[n or "empty" for n, _ in FORBIDDEN])
def test_functions_off_the_list_are_refused_both_ways(name, function):
    with pytest.raises(
        ArtifactError, match="relu: (a saved graph may not call|there is no|cannot import)"
    ):
        from_json(edited(SAFE, target=name))
    if function is not None:
        gm = one_node("call_function", function, "x")
        with pytest.raises(ArtifactError, match="may not call|there is no operator"):
            to_json(gm)


@pytest.mark.parametrize(
    "method",
    ["__reduce_ex__", "__class__", "apply_", "numpy", "data_ptr", "shape", "no_such", "a;b", "a.b"],
)
def test_methods_off_the_list_are_refused_both_ways(method):
    with pytest.raises(ArtifactError, match=f"may not call method {method!r}"):
        from_json(edited(SAFE, op="call_method", target=method))
    gm = one_node("call_method", "relu", "x")
    next(n for n in gm.graph.nodes if n.op == "call_method").target = method
    with pytest.raises(ArtifactError, match=f"may not call method {method!r}"):
        to_json(gm)


@pytest.mark.parametrize("name", ["__class__", "__globals__", "grad_fn", "data", {"node": "x"}, 3])
def test_only_plain_attributes_are_read(name):
    args = [{"node": "x"}, name]
    with pytest.raises(ArtifactError, match="relu: a saved graph may not read attribute"):
        from_json(edited(SAFE, target="builtins.getattr", args=args))
    if type(name) is str:
        with pytest.raises(ArtifactError, match="may not read attribute"):
            to_json(one_node("call_function", getattr, "x", name))
    assert (
        round_trip(one_node("call_function", getattr, "x", "dtype"))(torch.ones(1)) is torch.float32
    )


def test_kept_writes_come_back_and_call_no_other_method():
    effects = pytest.importorskip("tfmq_fx.effects")
    gm = one_node("call_function", effects.inplace_, "x", "add_", 2)
    list(gm.graph.nodes)[1].meta["writes"] = True
    again = round_trip(gm)
    assert list(again.graph.nodes)[1].meta["writes"] is True
    assert again(torch.ones(1)) == 3
    name = "tfmq_fx.effects.inplace_"
    for method in ("__reduce_ex__", "apply_", "__getattribute__", {"node": "x"}):
        with pytest.raises(ArtifactError, match="may not call method|must be named by the graph"):
            from_json(edited(SAFE, target=name, args=[{"node": "x"}, method]))
    with pytest.raises(ArtifactError, match="must be named by the graph"):
        kwargs = {"method": "__reduce_ex__"}
        from_json(edited(SAFE, target=name, args=[{"node": "x"}], kwargs=kwargs))


class Foreign(nn.Linear):
    """Not a torch.nn class, though it looks like one."""


def test_modules_of_other_packages_are_refused_both_ways():
    with pytest.raises(ArtifactError, match=r"leaf: a saved graph may not hold a .*\.Foreign"):
        to_json(of_module(Foreign(2, 2)))
    for name in ("subprocess.Popen", "torch.nn.utils.prune.Identity", f"{__name__}.Foreign", "x"):
        data = to_json(of_module(nn.SiLU()))
        data["modules"]["leaf"]["class"] = name
        with pytest.raises(ArtifactError, match="leaf: a saved graph may not hold"):
            from_json(data)
    for name in ("torch.nn.modules.module.warnings", "torch.nn.modules.linear.Tensor"):
        data["modules"]["leaf"]["class"] = name
        with pytest.raises(ArtifactError, match="leaf: there is no module class"):
            from_json(data)


def test_own_modules_need_a_spec(monkeypatch):
    class Fake(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.register_buffer("table", torch.zeros(size, dtype=torch.uint8))

        def spec(self):
            return {"size": len(self.table)}

        @classmethod
        def from_spec(cls, spec):
            return cls(**spec)

        def forward(self, x):
            return x + self.table

    fake = types.ModuleType("tfmq_fx.fake")
    Fake.__module__, Fake.__qualname__ = "tfmq_fx.fake", "Fake"
    fake.Fake = Fake
    monkeypatch.setitem(sys.modules, "tfmq_fx.fake", fake)
    gm = of_module(Fake(3))
    again = round_trip(gm)
    assert type(again.leaf) is Fake and torch.equal(again(torch.ones(3)), torch.ones(3))
    data = to_json(gm)
    data["modules"]["leaf"]["spec"] = {"sise": 3}
    with pytest.raises(ArtifactError, match="damaged: TypeError"):
        from_json(data)
    Fake.spec = lambda self: {"size": object()}
    with pytest.raises(ArtifactError, match="leaf: spec.. of tfmq_fx.fake.Fake is not JSON-ready"):
        to_json(gm)
    del Fake.from_spec
    with pytest.raises(ArtifactError, match="modules of class tfmq_fx.fake.Fake cannot be saved"):
        to_json(gm)


def test_modules_changed_by_hand_are_refused():
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ArtifactError, match="leaf.*hooks cannot be saved"):
        to_json(of_module(hooked))
    changed = nn.Conv2d(2, 2, 3)
    changed._reversed_padding_repeated_twice = [1, 1, 1, 1]
    with pytest.raises(ArtifactError, match="'_reversed_padding_repeated_twice' of the torch"):
        to_json(of_module(changed))
    resized = nn.Linear(2, 2)
    resized.weight = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ArtifactError, match="holds tensors"):
        to_json(of_module(resized))
    with pytest.raises(ArtifactError, match="with its parts cannot be rebuilt"):
        to_json(of_module(nn.Sequential(nn.SiLU())))


INJECTIONS = [
    ("nodes", 0, {"target": "x, y=print('x')"}),
    ("nodes", 0, {"target": "class"}),
    ("nodes", 1, {"kwargs": {"a=print('x'), b": 1}}),
    ("nodes", 1, {"kwargs": {"lambda": 1}}),
    ("nodes", 1, {"op": "get_attr", "target": 'a"); print("x'}),
    ("nodes", 1, {"op": "get_attr", "target": "__class__"}),
    ("nodes", 1, {"op": "call_module", "target": "a.__init__"}),
    ("nodes", 1, {"op": "call_method", "target": "relu", "args": []}),
    ("nodes", 1, {"op": "import", "target": "os"}),
    ("nodes", 1, {"args": [{"node": "later"}]}),
    ("nodes", 1, {"name": "x"}),
    ("nodes", 1, {"extra": 1}),
]


@pytest.mark.parametrize(("table", "index", "change"), INJECTIONS)
def test_nothing_but_names_gets_into_generated_code(table, index, change, capsys):
    data = through_text(to_json(SAFE))
    data[table][index].update(change)
    with pytest.raises(ArtifactError):
        from_json(data)
    assert capsys.readouterr().out == ""


def test_node_names_are_made_into_identifiers(capsys):
    data = json.loads(json.dumps(to_json(SAFE)).replace('"relu"', '"relu = print(1)\\n    y"'))
    gm = from_json(data)
    gm(torch.ones(1))
    assert capsys.readouterr().out == ""


def test_tensors_must_be_those_of_the_graph(net):
    data = through_text(to_json(net))
    spare = {"shape": [1], "dtype": "float32", "parameter": False, "requires_grad": False}
    for name in ("spare", "conv.bias", "conv.spare", "conv.part.spare", "conv.forward"):
        changed = data | {"tensors": data["tensors"] | {name: spare | {"persistent": True}}}
        with pytest.raises(ArtifactError, match="spare|bias|conv.part|conv.forward"):
            from_json(changed)
    shape = data["tensors"]["conv.weight"] | {"shape": [1 << 50]}
    with pytest.raises(ArtifactError):
        from_json(data | {"tensors": data["tensors"] | {"conv.weight": shape}})
    fewer = {k: v for k, v in data["tensors"].items() if k != "norm.weight"}
    with pytest.raises(ArtifactError, match=r"does not list \(\['norm.weight'\]\)"):
        from_json(data | {"tensors": fewer})


def test_unknown_and_missing_keys_are_named(net):
    data = to_json(net)
    with pytest.raises(ArtifactError, match=r"graph: unknown keys \['code'\]"):
        from_json(data | {"code": "x"})
    with pytest.raises(ArtifactError, match=r"graph: missing keys \['symbols'\]"):
        from_json({k: v for k, v in data.items() if k != "symbols"})
    with pytest.raises(ArtifactError, match="damaged"):
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
    with pytest.raises(ArtifactError, match="offset: a .*cannot be saved"):
        to_json(net)
    net.graph.set_codegen(fx.graph._PyTreeCodeGen(None))
    with pytest.raises(ArtifactError, match="code generator"):
        to_json(net)
