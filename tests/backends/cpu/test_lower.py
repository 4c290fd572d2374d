"""The lowering for the CPU: what every layer becomes with kernels and without, and why."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.backends.codes import nets
from tests.backends.codes.nets import EIGHT, LINEARS, C, conv, net, norm
from tests.backends.cpu.cases import needs_kernels
from tests.backends.cuda.test_lower import Net, converted, data, everywhere, quantized
from tests.toys import ToyDiT, seeded, tiny_unet2d
from tfmq_fx import ActivationSpec, BackendError, LayerConfig, WeightSpec
from tfmq_fx.backends.codes.choice import Choice
from tfmq_fx.backends.codes.layers import ConcatLayer, quantize_input
from tfmq_fx.backends.codes.problem import Tile
from tfmq_fx.backends.cpu import kernels
from tfmq_fx.backends.cpu import lower as lowering
from tfmq_fx.backends.cpu.attention import attention
from tfmq_fx.backends.cpu.autotune import untimed_choice
from tfmq_fx.backends.cpu.codes_layer import CpuCodesLayer
from tfmq_fx.backends.cpu.lower import freezes, kernel_obstacle, lower
from tfmq_fx.backends.cpu.onednn import OnednnLayer
from tfmq_fx.backends.float_layers import DequantizedLayer, FloatLayer
from tfmq_fx.capture.capture import capture
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.quant.sqnr import sqnr

TIMES = (0, 3, 7)
DYNAMIC = ActivationSpec(dynamic=True, per_timestep=False)
LACKS = "integer kernels need avx512_vnni, which the processor lacks"


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """oneDNN's products as on processors with VNNI; others are those of test_saturation."""
    monkeypatch.setattr(lowering, "onednn_is_exact", lambda: True)


@pytest.fixture
def without_kernels(monkeypatch):
    """A machine that does not run the kernels of this package."""

    def load():
        raise AssertionError("nothing to load")

    monkeypatch.setattr(kernels, "unavailable", lambda: LACKS)
    monkeypatch.setattr(kernels, "load", load)


def on(gm, choose=untimed_choice):
    return lower(gm, choose=choose)


def kinds(gm):
    """What layers became, by kind."""
    found = {}
    for module in gm.modules():
        if type(module) in (CpuCodesLayer, OnednnLayer, FloatLayer, DequantizedLayer):
            found[type(module)] = found.get(type(module), 0) + 1
    return found


def reasons(lowered):
    return {d.site: d.reason.removeprefix("runs in floating point: ") for d in lowered.declined}


def closeness(model, lowered):
    """Signal to noise in dB between both, at the lowest over timesteps; a batch of several too."""
    found = []
    with torch.no_grad():
        for x, t in [*data(seed=1), (data(seed=2)[0][0], torch.tensor([0, 7, 3, 7]))]:
            found.append(sqnr(model(x, t), lowered.gm(x, t)[0]))
    return min(found)


# The same codes but for a few values that float sums put on the other side of a boundary, each of
# them a step off in up to 144 results of the next layer: far below the noise of rounding itself,
# 40 dB in 8 bits and 20 in 4, where every code is off by up to half a step.
SAME = 45


@needs_kernels
@pytest.mark.parametrize("kind", ["w8a8", "w4a8", "static", "w4a6"])
def test_every_layer_runs_on_a_kernel_and_agrees_with_eager(kind):
    model = quantized(kind)
    lowered = on(model.gm)
    assert stage_of(lowered.gm) is Stage.LOWERED and stage_of(model.gm) is Stage.QUANTIZED
    assert lowered.declined == [] and lowered.details["integer"] == lowered.changed == 4
    assert lowered.details["onednn"] == lowered.details["weight_only"] == []
    assert lowered.details["micros"] == {} and kinds(lowered.gm) == {CpuCodesLayer: 4}
    assert closeness(model, lowered) > SAME
    codes = lowered.gm.graph.find_nodes(op="call_function", target=quantize_input)
    assert codes and all(n.meta["val"].dtype == torch.uint8 for n in codes)


@pytest.mark.parametrize("kind", ["w8a8", "w4a8", "static", "w4a6"])
def test_without_kernels_every_layer_runs_on_onednn(without_kernels, kind):
    model = quantized(kind)
    lowered = on(model.gm)
    assert lowered.declined == [] and lowered.details["integer"] == lowered.changed == 4
    assert lowered.details["onednn"] == ["enter", "down", "leave", "last"]
    assert lowered.details["attention"] == 0 and kinds(lowered.gm) == {OnednnLayer: 4}
    assert not any(lowered.details["fused"][name] for name in ("fuse_norms", "requantize"))
    assert closeness(model, lowered) > SAME


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
def test_ranges_measured_at_every_call_run_on_kernels(bits):
    model = converted(overrides=everywhere(WeightSpec(bits=bits), DYNAMIC))
    lowered = on(model.gm)
    assert lowered.declined == [] and kinds(lowered.gm) == {CpuCodesLayer: 4}
    assert closeness(model, lowered) > SAME


def test_without_kernels_ranges_measured_at_every_call_are_in_float(without_kernels):
    model = converted(overrides=everywhere(WeightSpec(), DYNAMIC))
    lowered = on(model.gm)
    assert reasons(lowered) == dict.fromkeys(["enter", "down", "leave", "last"], LACKS)
    assert kinds(lowered.gm) == {FloatLayer: 4} and lowered.details["integer"] == 0
    assert closeness(model, lowered) > SAME  # some processors add in another order than the model


class Odd(nn.Module):
    """Layers whose channels kernels do not take, then one that they do."""

    def __init__(self):
        super().__init__()
        self.rgb = nn.Conv2d(3, 16, 3, padding=1)
        self.groups = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.six = nn.Linear(16, 6)
        self.wide = nn.Linear(6, 16)
        self.last = nn.Linear(16, 8)

    def forward(self, x, t):
        h = torch.tanh(self.rgb(x[:, :3]) * (1 + t[:, None, None, None].float()))
        h = torch.tanh(self.groups(h)).flatten(2).transpose(1, 2)
        return self.last(torch.tanh(self.wide(torch.tanh(self.six(h)))))


@needs_kernels
@pytest.mark.parametrize("ranges", [ActivationSpec(), DYNAMIC])
def test_channels_that_kernels_do_not_take_run_on_onednn(ranges):
    settings = everywhere(WeightSpec(), ranges)
    model = converted(model=seeded(Odd).eval(), overrides=settings)
    lowered = on(model.gm)
    if ranges.dynamic:
        assert reasons(lowered) == {
            "rgb": "the kernels read channels in fours, not 3",
            "groups": "a convolution of 4 groups",
            "wide": "the kernels read channels in fours, not 6",
        }
    else:
        assert lowered.declined == [] and lowered.details["integer"] == 5
        assert lowered.details["onednn"] == ["rgb", "groups", "wide"]
    assert kinds(lowered.gm)[CpuCodesLayer] == 2 and closeness(model, lowered) > SAME


@needs_kernels
def test_results_in_other_dtypes_are_told():
    layer = quantized("w8a8").gm.leave
    for node in (nodes := [*quantized("w8a8").gm.graph.find_nodes(op="call_module")][:1]):
        value = node.meta["val"]
    assert kernel_obstacle(layer, nodes) is None
    for dtype in (torch.float16, torch.float64):
        other = type("Node", (), {"meta": {"val": value.to(dtype)}})()
        wanted = f"its results have dtypes {dtype}"
        assert kernel_obstacle(layer, [other]) == wanted
    mixed = "its results have dtypes torch.float16, torch.float32"
    half = type("Node", (), {"meta": {"val": value.half()}})()
    assert kernel_obstacle(layer, [half, *nodes]) == mixed


def test_half_precision_models_run_on_onednn():
    class Half(Net):
        def forward(self, x, t):
            h = torch.tanh(self.enter(x.half()) * (1 + t[:, None, None, None].half()))
            h = torch.tanh(self.down(h))
            return self.last(torch.relu(self.leave(h.flatten(2).transpose(1, 2)))).float()

    model = converted(
        model=seeded(Half).eval().half(), overrides=everywhere(WeightSpec(), ActivationSpec())
    )
    lowered = on(model.gm)
    assert lowered.declined == [] and kinds(lowered.gm) == {OnednnLayer: 4}
    # results are rounded to 11 bits of 8-bit noise's signal
    assert closeness(model, lowered) > 40


@needs_kernels
def test_models_in_bfloat16_run_on_kernels():
    class Half(Net):
        def forward(self, x, t):
            h = torch.tanh(self.enter(x.bfloat16()) * (1 + t[:, None, None, None].bfloat16()))
            h = torch.tanh(self.down(h))
            return self.last(torch.relu(self.leave(h.flatten(2).transpose(1, 2)))).float()

    model = converted(
        model=seeded(Half).eval().bfloat16(), overrides=everywhere(WeightSpec(), ActivationSpec())
    )
    lowered = on(model.gm)
    assert lowered.declined == [] and kinds(lowered.gm) == {CpuCodesLayer: 4}
    # eager sums in bfloat16, 2**-9 apart: the noise of its own rounding
    assert closeness(model, lowered) > 30


def chosen(engines, micros=None):
    def choose(problem, dtype):
        name = "conv" if problem.taps == (3, 3) else "linear"
        return Choice(engines[name], Tile(), micros or {"float": 5.04, "onednn": 7.0, "cpu": 6.02})

    return choose


@needs_kernels
def test_layers_run_on_what_is_chosen():
    model = quantized("w8a8")
    lowered = on(model.gm, chosen({"conv": "float", "linear": "onednn"}))
    assert kinds(lowered.gm) == {DequantizedLayer: 2, OnednnLayer: 2}
    slower = "bf16 took 5.0 us, int8 6.0 us"
    assert reasons(lowered) == {"enter": slower, "down": slower}
    assert lowered.details["integer"] == 2 and lowered.details["onednn"] == ["leave", "last"]
    assert closeness(model, lowered) > 25  # of bf16 and inputs that are not rounded: 8-bit noise
    lowered = on(model.gm, chosen({"conv": "onednn", "linear": "cpu"}))
    assert kinds(lowered.gm) == {OnednnLayer: 2, CpuCodesLayer: 2} and lowered.declined == []
    assert lowered.details["micros"]["last"]["cpu"] == 6.02 and "enter" not in lowered.details[
        "micros"
    ]  # fmt: skip
    assert closeness(model, lowered) > SAME


@needs_kernels
def test_float_that_was_tried_alone_is_named():
    choose = chosen({"conv": "float", "linear": "float"}, {"float": 5.0})
    assert set(reasons(on(quantized("w8a8").gm, choose)).values()) == {
        "bf16 took 5.0 us, int8 inf us"
    }


@needs_kernels
def test_ranges_measured_at_every_call_have_no_kernel_of_onednn():
    model = converted(overrides=everywhere(WeightSpec(), DYNAMIC))
    lowered = on(model.gm, chosen({"conv": "onednn", "linear": "onednn"}))
    assert kinds(lowered.gm) == {CpuCodesLayer: 4}
    layers = [m for m in lowered.gm.modules() if isinstance(m, CpuCodesLayer)]
    assert {m.codes_dtype for m in layers} == {torch.uint8}
    assert closeness(model, lowered) > SAME


@needs_kernels
def test_the_sizes_asked_for_are_those_of_the_capture():
    asked = []

    def choose(problem, dtype):
        asked.append((problem.batch, problem.height, problem.width, problem.channels, dtype))
        return untimed_choice(problem, dtype)

    on(quantized("w8a8").gm, choose)
    assert [each[1:4] for each in asked] == [(11, 11, 4), (9, 9, 16), (1, 16, 32), (1, 16, 16)]
    assert {(each[0], each[4]) for each in asked} == {(4, torch.float32)}


@pytest.mark.parametrize("there", [True, False])
def test_what_runs_in_floating_point_is_listed_with_its_reason(request, there):
    if not there:
        request.getfixturevalue("without_kernels")
    four = WeightSpec(bits=4, group_size=16)
    model = converted(
        overrides={
            "enter": LayerConfig(weights=WeightSpec(), activations=ActivationSpec(bits=16)),
            "down": LayerConfig(weights=WeightSpec(), activations=None),
            "leave": LayerConfig(weights=four, activations=ActivationSpec()),
            "last": LayerConfig(weights=WeightSpec(), activations=None),
        },
    )
    lowered = on(model.gm)
    assert reasons(lowered) == {
        "enter": "activations have 16 bits",
        "down": "activations are in floating point",
        "leave": "weights have scales per group",
    }
    assert lowered.details["weight_only"] == ["last"]
    assert type(lowered.gm.last.weight).__name__ == "Int8Tensor"
    fp8 = on(quantized("fp8").gm)
    assert set(reasons(fp8).values()) == {"no fp8 kernel on cpu"}
    assert kinds(fp8.gm) == {FloatLayer: 4}


def weight_bytes(gm):
    layers = [m for m in gm.modules() if isinstance(m, CpuCodesLayer)]
    return sum(layer.weight.nbytes for layer in layers)


@needs_kernels
def test_four_bit_weights_take_half_the_bytes():
    eight, four = (on(quantized(kind).gm).gm for kind in ("w8a8", "w4a8"))
    panels = [-(-n // 64) * 64 for n in (16, 32, 16, 8)]
    depths = [4 * 9, 16 * 9, 32, 16]
    expected = sum(n * d for n, d in zip(panels, depths, strict=True))
    assert weight_bytes(eight) == expected and weight_bytes(four) * 2 == expected
    assert four.enter.weight.dtype == torch.uint8 and four.enter.zero.shape == (64,)


def test_the_model_is_left_alone():
    for kind in ("w8a8", "w4a8"):
        model = quantized(kind)
        before = {k: v.clone() for k, v in model.gm.state_dict().items()}
        code = model.gm.code
        on(model.gm)
        assert model.gm.code == code
        assert all(torch.equal(v, before[k]) for k, v in model.gm.state_dict().items())


@needs_kernels
def test_kernels_that_do_not_compile_stop_the_lowering(monkeypatch):
    def fail():
        raise BackendError("kernels.cpp does not compile")

    monkeypatch.setattr(kernels, "load", fail)
    with pytest.raises(BackendError, match="does not compile"):
        on(quantized("w8a8").gm)


def test_what_inductor_must_freeze(monkeypatch):
    assert freezes(on(quantized("w8a8").gm).gm) == (kernels.unavailable() is not None)
    gm = on(quantized("fp8").gm).gm
    assert not freezes(gm)  # little is in floating point
    monkeypatch.setattr(lowering, "MOST_LOOSE", 1000)
    assert freezes(gm)
    monkeypatch.setattr(kernels, "unavailable", lambda: LACKS)
    assert freezes(on(quantized("w8a8").gm).gm)


# ---- nets with something to fuse

PACKED = dataclasses.replace(EIGHT, weights=WeightSpec(bits=4, search=1))
STATIC = dataclasses.replace(EIGHT, activations=ActivationSpec(per_timestep=False))


def fused(function, layers=EIGHT, plan=None, **modules):
    """Fusions of a net, by name, and how near its result is to the quantized graph's, in dB."""
    gm = nets.quantized(nets.captured(net(function, **modules)), layers, plan)
    lowered = on(gm)
    assert lowered.declined == []
    pairs = zip(nets.results(gm), nets.results(lowered.gm), strict=True)
    return lowered, min(sqnr(a, b) for a, b in pairs)


def residual(m, x, row):
    return m.b(torch.tanh(m.a(x) + row[:, :, None, None])) + x


def normed(m, x, row):
    h = m.a(torch.nn.functional.silu(m.norm(x) * (1 + row[:, :, None, None])))
    return m.b(m.silu(m.other(h)))


def joined(m, x, row):
    tokens = x.flatten(2).transpose(1, 2)
    y = torch.tanh(m.q(tokens)) * m.k(tokens) + torch.sin(m.v(tokens))
    return y.transpose(1, 2).reshape(x.shape)


def parts(m, x, row):
    return m.wide(m.silu(m.norm_wide(torch.cat([x, torch.sin(x)], 1))))


def chunked(m, x, row):
    scale, shift = m.more(row)[:, :, None, None].chunk(2, 1)
    return m.wide(m.norm_wide(torch.cat([x, torch.sin(x)], 1)) * (1 + scale) + shift)


def split(m, x, row):
    return m.wide(torch.cat([x, torch.sin(x)], 1))


def mlp(m, x, row):
    tokens = x.flatten(2).transpose(1, 2)
    y = m.down(m.gelu(m.up(tokens)))
    return y.transpose(1, 2).reshape(x.shape)


CONVS = {"a": conv, "b": conv}
NORMS = {**CONVS, "norm": norm, "other": norm, "silu": nn.SiLU}
WIDE = {"wide": lambda: conv(width=2 * C), "norm_wide": lambda: norm(2 * C), "silu": nn.SiLU}
MLP = {"up": lambda: nn.Linear(C, 2 * C), "down": lambda: nn.Linear(2 * C, C)}
FUSED = {
    "residual": (residual, CONVS, {"absorb_rows": 1, "absorb_residuals": 1}),
    "norm": (normed, NORMS, {"fuse_norms": 2}),
    "siblings": (joined, LINEARS, {"share_quantize": 2, "join_siblings": 2}),
    "concat": (split, WIDE, {"merge_concat": 1}),
    "parts": (parts, WIDE, {"fuse_norms": 1, "merge_concat": 1, "concat": 1}),
    "chunks": (
        chunked,
        {**WIDE, "more": lambda: nn.Linear(C, 4 * C)},
        {"fuse_norms": 1, "merge_concat": 1, "concat": 1},
    ),
    "gelu": (mlp, {**MLP, "gelu": nn.GELU}, {"activations": 1, "requantize": 1}),
    "tanh gelu": (
        mlp,
        {**MLP, "gelu": lambda: nn.GELU(approximate="tanh")},
        {"activations": 1, "requantize": 1},
    ),
}


@needs_kernels
@pytest.mark.parametrize("layers", [EIGHT, PACKED, STATIC], ids=["w8a8", "w4a8", "static"])
@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused_computes_the_same(name, layers):
    function, modules, counts = FUSED[name]
    lowered, closeness = fused(function, layers, **modules)
    found = lowered.details["fused"]
    assert {key: found[key] for key in counts} == counts
    assert closeness > SAME


@needs_kernels
@pytest.mark.parametrize("bits", [(3, 5, 8), (2, 4, 6), (4, 3, 4)])
def test_layers_of_one_input_may_have_different_bits(bits):
    def at(count):
        return dataclasses.replace(EIGHT, weights=WeightSpec(bits=count, search=1))

    plan = dict(zip("qkv", map(at, bits), strict=True))
    assert fused(joined, EIGHT, plan, **LINEARS)[1] > SAME
    parts = {"wide.0": at(bits[0]), "wide.1": at(bits[1])}
    assert fused(split, EIGHT, parts, **WIDE)[1] > SAME


@needs_kernels
def test_parts_of_a_concatenation_run_as_one_layer_on_two_segments():
    lowered, closeness = fused(split, PACKED, **WIDE)
    (layer,) = [m for m in lowered.gm.modules() if isinstance(m, ConcatLayer)]
    assert [part.weight.dtype for part in (layer.first, layer.second)] == [torch.uint8] * 2
    assert not any(name.endswith(("wide.0", "wide.1")) for name, _ in lowered.gm.named_modules())
    mixed = {"wide.0": EIGHT, "wide.1": PACKED}
    lowered, closeness = fused(split, EIGHT, mixed, **WIDE)
    (layer,) = [m for m in lowered.gm.modules() if isinstance(m, ConcatLayer)]
    kinds = {part.weight.dtype for part in (layer.first, layer.second)}
    assert kinds == {torch.uint8, torch.int8} and closeness > SAME


@needs_kernels
def test_siblings_are_judged_by_the_kernel_that_runs_them():
    """oneDNN would be faster on the joint layer, but it is not what runs it."""

    def choose(problem, dtype):
        joint = problem.out_channels == 3 * C
        micros = {"float": 90.0, "onednn": 5.0 if joint else 50.0, "cpu": 40.0 if joint else 10.0}
        return Choice("onednn" if joint else "cpu", Tile(), micros)

    gm = nets.quantized(nets.captured(net(joined, **LINEARS)), EIGHT)
    assert on(gm, choose).details["fused"]["join_siblings"] == 0
    lowered = on(gm, lambda *given: dataclasses.replace(choose(*given), micros={}))
    assert lowered.details["fused"]["join_siblings"] == 2
    assert lowered.gm.get_submodule("q_k_v").choice.engine == "cpu"


@needs_kernels
def test_a_unet_is_fused_throughout(monkeypatch):
    model = tiny_unet2d().eval()
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 7])
    gm = capture(model, {"sample": x, "timestep": t}, timestep="timestep").gm
    gm = nets.quantized(gm)
    lowered = on(gm)
    fused = lowered.details["fused"]
    assert lowered.declined == [] and lowered.details["onednn"] == ["conv_in"]
    norms = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    assert fused["fuse_norms"] == norms
    resnets = sum(type(m).__name__ == "ResnetBlock2D" for m in model.modules())
    blocks = sum(type(m).__name__ == "Attention" for m in model.modules())
    assert fused["absorb_rows"] == resnets
    assert fused["absorb_residuals"] == resnets + blocks
    assert fused["join_siblings"] == 2 * blocks
    assert lowered.details["attention"] == blocks > 0
    with torch.no_grad():
        exact, expected = model(x, t).sample, gm(x, t)[0]
        # attention in bfloat16 moves codes, which adds a part of the noise of rounding to them
        assert sqnr(expected, lowered.gm(x, t)[0]) > sqnr(exact, expected) + 3
        monkeypatch.setattr(lowering, "use_kernel", lambda gm: 0)
        assert sqnr(expected, on(gm).gm(x, t)[0]) > SAME


@needs_kernels
def test_a_transformer_attends_on_the_kernel_and_elsewhere_on_wider_heads(monkeypatch):
    model = seeded(ToyDiT).eval()
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 7]), torch.tensor([3, 4])
    gm = nets.quantized(capture(model, {"x": x, "t": t, "y": y}, timestep="t").gm)
    lowered = on(gm)
    calls = lowered.gm.graph.find_nodes(op="call_function", target=attention)
    assert lowered.details["attention"] == len(calls) == len(model.blocks)
    assert lowered.details["padded_attention"] == 0
    assert lowered.details["fused"]["activations"] == len(model.blocks)
    with torch.no_grad():
        assert sqnr(gm(x, t, y)[0], lowered.gm(x, t, y)[0]) > 35
    monkeypatch.setattr(kernels, "unavailable", lambda: LACKS)
    lowered = on(gm)
    assert lowered.details["attention"] == 0
    assert lowered.details["padded_attention"] == len(model.blocks)
