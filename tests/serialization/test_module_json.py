import pytest
import torch
from torch import fx, nn

import tfmq_fx.quant.modules
import tfmq_fx.quant.timestep_table
from tests.serialization.test_graph_json import INPUTS, Net, make_net, round_trip, with_values
from tests.serialization.test_json_values import through_text
from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.verifier import check
from tfmq_fx.quant.affine import QParams
from tfmq_fx.quant.timestep_lookup import timestep_row
from tfmq_fx.quant.timestep_table import QuantTimestepTable
from tfmq_fx.serialization.graph_json import from_json, to_json
from tfmq_fx.serialization.module_json import tensors_of


@pytest.fixture
def net():
    return make_net()


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
    layer = tfmq_fx.quant.modules.QuantLinear.from_float(
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
    assert type(again.layer) is tfmq_fx.quant.modules.QuantLinear
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


SPECS = [
    ({"rows": "2"}, "rows: expected int"),
    ({"rows": 0}, "0 rows"),
    ({"rows": 1 << 50}, "out of range"),
    ({"widths": [1 << 61]}, "larger than any tensor"),
    ({"widths": [2.5]}, "no list of sizes"),
    ({"bits": 5}, "holds 4 or 8 bits"),
    ({"dtype": "load"}, "damaged value"),
    ({"dtype": "int8"}, "no floating dtype"),
    ({"sise": 3}, "damaged: TypeError"),
]


@pytest.mark.parametrize(("change", "message"), SPECS, ids=lambda item: str(item)[:30])
def test_what_our_modules_are_built_from_is_checked(change, message):
    gm = of_module(QuantTimestepTable.from_rows(torch.tensor([1]), [torch.randn(1, 4)], bits=8))
    gm.meta["stage"] = Stage.FOLDED
    data = through_text(to_json(gm))
    data["modules"]["leaf"]["spec"] |= change
    with pytest.raises(ArtifactError, match=f"graph.modules.leaf.*{message}"):
        from_json(data)


def test_only_our_listed_modules_are_saved(monkeypatch):
    class Fake(nn.Module):
        """Has what ours have, and is none of them."""

        def spec(self):
            return {}

        @classmethod
        def from_spec(cls, spec):
            return cls()

    Fake.__module__, Fake.__qualname__ = "tfmq_fx.quant.timestep_table", "Fake"
    monkeypatch.setattr(tfmq_fx.quant.timestep_table, "Fake", Fake, raising=False)
    with pytest.raises(ArtifactError, match=r"may not hold a tfmq_fx.quant.timestep_table.Fake"):
        to_json(of_module(Fake()))


def test_constructors_that_build_any_number_of_parts_are_refused():
    data = through_text(to_json(of_module(nn.SiLU())))
    for kind, arguments in (
        ("transformer.Transformer", {"num_encoder_layers": 10**8}),
        ("transformer.TransformerEncoder", {"encoder_layer": 1, "num_layers": 10**8}),
        ("rnn.LSTM", {"input_size": 1, "hidden_size": 1, "num_layers": 10**8}),
    ):
        data["modules"]["leaf"] = {"class": f"torch.nn.modules.{kind}", "arguments": arguments}
        with pytest.raises(ArtifactError, match=r"may not hold|num_layers: more|unknown keys"):
            from_json(data)


def test_modules_changed_by_hand_are_refused():
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ArtifactError, match=r"leaf.*hooks cannot be saved"):
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


def test_tensors_must_be_those_of_the_graph(net):
    data = through_text(to_json(net))
    spare = {"shape": [1], "dtype": "float32", "parameter": False, "requires_grad": False}
    for name in ("spare", "conv.bias", "conv.spare", "conv.part.spare", "conv.forward"):
        changed = data | {"tensors": data["tensors"] | {name: spare | {"persistent": True}}}
        with pytest.raises(ArtifactError, match=r"spare|bias|conv.part|conv.forward"):
            from_json(changed)
    shape = data["tensors"]["conv.weight"] | {"shape": [1 << 50]}
    with pytest.raises(ArtifactError):
        from_json(data | {"tensors": data["tensors"] | {"conv.weight": shape}})
    fewer = {k: v for k, v in data["tensors"].items() if k != "norm.weight"}
    with pytest.raises(ArtifactError, match=r"does not list \(\['norm.weight'\]\)"):
        from_json(data | {"tensors": fewer})
