"""inductor: quantized layers become int8 kernels, of this package or of oneDNN, and what does not
is told."""

import functools
import itertools

import pytest
import torch
from torch import nn

from tests.toys import seeded
from tfmq_fx import ActivationSpec, LayerConfig, WeightSpec, calibrate, compile, convert, prepare
from tfmq_fx.backends import inductor
from tfmq_fx.backends.cpu import autotune, kernels
from tfmq_fx.backends.cpu import lower as lowering
from tfmq_fx.backends.cpu.autotune import untimed_choice
from tfmq_fx.backends.cpu.codes_layer import CpuCodesLayer
from tfmq_fx.backends.cpu.lower import lower
from tfmq_fx.backends.cpu.onednn import OnednnLayer
from tfmq_fx.backends.float_layers import FloatLayer
from tfmq_fx.backends.inductor import unavailable
from tfmq_fx.backends.saturation import onednn_is_exact
from tfmq_fx.backends.support import obstacle
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.quant.modules import QuantConv1d, QuantConv2d, QuantLinear
from tfmq_fx.quant.quant_layer import QuantLayer

TIMES = (0, 3, 7)
REASON = unavailable()
needs_compiler = pytest.mark.skipif(REASON is not None, reason=str(REASON))


class Net(nn.Module):
    """A convolution, then a linear layer."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(4, 16, 3, padding=1)
        self.leave = nn.Linear(16, 8)

    def forward(self, x, t):
        h = torch.tanh(self.enter(x) * (1 + t[:, None, None, None].float()))
        return self.leave(h.mean((2, 3)))


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 4, 6, 6, generator=generator), torch.full((4,), t)) for t in TIMES]


def converted(model, config="w8a8", **options):
    prepared = prepare(model, data()[0], timesteps=TIMES, config=config, **options)
    return convert(calibrate(prepared, data(), progress=False), progress=False)


@functools.cache
def whole(bits=8):
    """The net with inputs of every layer in 8 bits; lowering leaves it alone."""
    layer = LayerConfig(weights=WeightSpec(bits=bits), activations=ActivationSpec())
    return converted(seeded(Net).eval(), overrides={"*": layer})


@pytest.fixture(scope="module")
def model():
    return whole()


@pytest.fixture(params=["ours", "onednn"])
def kernel(request, monkeypatch):
    """Whose kernels run layers: of this package, or oneDNN's."""
    if request.param == "onednn":
        monkeypatch.setattr(kernels, "unavailable", lambda: "no such instructions")
        monkeypatch.setattr(lowering, "onednn_is_exact", lambda: True)
    else:
        request.getfixturevalue("any_kernels")
    return request.param


LAYERS = {"ours": CpuCodesLayer, "onednn": OnednnLayer}


@needs_compiler
@pytest.mark.parametrize("bits", [6, 8])
def test_layers_become_int8_kernels_and_agree_with_eager(bits, kernel, dynamo, monkeypatch):
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setattr(lowering, "onednn_is_exact", onednn_is_exact)  # of this machine
    integer = kernel == "ours" or bits < 8 or onednn_is_exact()
    model = whole(bits)
    before = (config.freezing, config.cpp_wrapper, torch.get_default_dtype())
    compiled, code = run_and_get_code(compile, model, "inductor")  # which runs it, to compare
    assert compiled.backend == "inductor" and compiled.lowered == (2 if integer else 0)
    assert compiled.check.passed
    assert [name for name, _ in compiled.declined] == ([] if integer else ["enter", "leave"])
    x, t = data(seed=1)[0]
    t = torch.tensor(TIMES)[[0, 2, 1, 2]]
    found = compiled(x, t)
    if not integer:
        assert "pointwise" not in code[0].replace("_convolution_pointwise", "")
    elif kernel == "onednn":
        assert "qconv_pointwise" in code[0] and "qlinear_pointwise" in code[0]
        assert "cpu_conv" not in code[0]
    else:
        assert code[0].count("torch.ops.tfmq_fx.cpu_conv.default(") == 2
        assert "qconv_pointwise" not in code[0] and "qlinear_pointwise" not in code[0]
    expected = model(x, t)
    # The same integers up to float rounding before each round(): where that falls on the other
    # side, one input code of the last layer is off by one, and the output by one step times the
    # largest weight; 1e-5 for the order of float sums.
    scales = model.gm.activation_scales.max()
    step = float(scales * model.gm.leave.weight.abs().max())
    assert (found - expected).abs().max() <= step + 1e-5
    assert (found - expected).abs().median() < 1e-5
    for x, t in data(seed=2):  # other values of t and other inputs: the same kernels
        assert (compiled(x, t) - model(x, t)).abs().max() <= step + 1e-5
    assert before == (config.freezing, config.cpp_wrapper, torch.get_default_dtype())


@needs_compiler
def test_weight_only_linear_layers_run_on_int8_weights():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.leave = nn.Linear(32, 16)

        def forward(self, x, t):
            return self.leave(x + t[:, None].float())

    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    calls = [(x, torch.full((4,), t)) for t in TIMES]
    prepared = prepare(seeded(Linear).eval(), calls[0], timesteps=TIMES, config="w8a16")
    model = convert(calibrate(prepared, calls, progress=False), progress=False)
    compiled = compile(model, "inductor")
    assert compiled.lowered == 0 and compiled.declined == []
    assert type(compiled.gm.leave.weight).__name__ == "Int8Tensor"
    for x, t in calls:
        # one sum of 32 products, scaled after it instead of before
        terms = (x + t[:, None]).abs() @ model.gm.leave.weight.abs().T
        assert (compiled(x, t) - model(x, t)).abs().max() <= 32 * 2**-22 * terms.max()


@needs_compiler
def test_inputs_of_any_layout_run_in_the_same_code(model, dynamo):
    x, t = data(seed=1)[0]
    compiled = compile(model, "inductor", trial=False)
    expected = compiled(x, t)
    every = torch.zeros(4, 8, 12, 18)
    every[:, ::2, ::2, ::3] = x
    given = [every[:, ::2, ::2, ::3], x.clone().requires_grad_(), nn.Parameter(x.clone())]
    for order in itertools.permutations(range(4)):
        back = [order.index(i) for i in range(4)]
        given.append(x.permute(order).contiguous().permute(back))
    with torch.inference_mode():
        given.append(x.clone())
        assert torch.equal(compiled(x, t), expected)
    for value in given:
        found = compiled(value, t)
        assert torch.equal(found, expected)
    spread = x[:1].expand(4, -1, -1, -1)
    assert torch.equal(compiled(spread, t), compiled(spread.clone(), t))
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_lowering_gives_the_same_numbers_before_it_is_compiled(model, kernel):
    lowered = lower(model.gm, choose=untimed_choice)
    assert stage_of(lowered.gm) is Stage.LOWERED and stage_of(model.gm) is Stage.QUANTIZED
    assert lowered.changed == 2 and lowered.details["integer"] == 2
    assert lowered.details["onednn"] == (["enter", "leave"] if kernel == "onednn" else [])
    assert isinstance(lowered.gm.enter, LAYERS[kernel]) and isinstance(model.gm.enter, QuantConv2d)
    step = float(model.gm.activation_scales.max() * model.gm.leave.weight.abs().max())
    with torch.no_grad():
        for x, t in data(seed=1):
            (found,) = lowered.gm(x, t)
            assert (found - model(x, t)).abs().max() <= step + 1e-5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("per_timestep", [True, False])
def test_four_bit_weights_and_static_ranges_are_lowered_too(bits, per_timestep, kernel):
    acts = ActivationSpec(per_timestep=per_timestep)
    layer = LayerConfig(weights=WeightSpec(bits=bits), activations=acts)
    model = converted(seeded(Net).eval(), overrides={"*": layer})
    lowered = lower(model.gm, choose=untimed_choice)
    assert lowered.declined == [] and isinstance(lowered.gm.enter, LAYERS[kernel])
    packed = kernel == "ours" and bits == 4
    assert lowered.gm.enter.weight.dtype == (torch.uint8 if packed else torch.int8)
    x, t = data()[1]
    with torch.no_grad():
        # calibration data: one code off by one, as above
        scale = model.gm.activation_scales if per_timestep else model.gm.leave.act_scale
        step = float(scale.max() * model.gm.leave.weight.abs().max())
        assert (lowered.gm(x, t)[0] - model(x, t)).abs().max() <= step + 1e-5


def test_what_runs_in_floating_point_is_listed_with_its_reason(kernel):
    model = converted(seeded(Net).eval())  # 16 bits enter the first layer
    compiled = compile(model, "eager")
    lowered = lower(model.gm, choose=untimed_choice)
    reason = "runs in floating point: activations have 16 bits"
    assert [[d.site, d.reason] for d in lowered.declined] == [["enter", reason]]
    assert isinstance(lowered.gm.enter, FloatLayer)
    assert isinstance(lowered.gm.leave, LAYERS[kernel])
    x, t = data()[1]
    step = float(model.gm.activation_scales.max() * model.gm.leave.weight.abs().max())
    with torch.no_grad():
        assert (lowered.gm(x, t)[0] - compiled(x, t)).abs().max() <= step + 1e-5


def quantized(kind, source, act_bits=8, **options):
    layer = kind.from_float(source, weight_bits=8, act_bits=act_bits, per_timestep=False)
    return layer.to(options["device"]) if options else layer


@pytest.mark.parametrize(
    "layer, reason",
    [
        (quantized(QuantLinear, nn.Linear(4, 4)), None),
        (quantized(QuantConv2d, nn.Conv2d(4, 4, 3)), None),
        (quantized(QuantLinear, nn.Linear(4, 4), None), "activations are in floating point"),
        (quantized(QuantLinear, nn.Linear(4, 4), 16), "activations have 16 bits"),
        (quantized(QuantConv1d, nn.Conv1d(4, 4, 3)), "exist for 2-d convolutions only"),
        (
            quantized(QuantConv2d, nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
            "padding mode 'circular'",
        ),
        (quantized(QuantLinear, nn.Linear(4, 4), device="meta"), "no int8 kernel on meta"),
        (
            QuantLayer(
                weight_shape=(4, 4), weight_bits=8, act_bits=8, per_timestep=False, bias=False
            ),
            "no int8 kernel for QuantLayer",
        ),
    ],
)
def test_every_obstacle_is_named(layer, reason):
    found = obstacle(layer)
    assert found is None if reason is None else reason in found


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    from torch._inductor import cpp_builder

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "no-such-compiler")
    assert "'no-such-compiler' is not installed" in unavailable()

    def fail():
        raise ValueError

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", fail)
    assert unavailable() == "torch.compile needs a C++ compiler and found none (ValueError)"


def test_freezing_is_on_for_the_call_alone_and_for_onednn_alone(model, kernel, monkeypatch):
    from torch._inductor import config

    seen = []

    def compiled(gm, **options):
        assert options == {"fullgraph": True, "mode": "default"}
        return lambda *inputs: seen.append((config.freezing, torch.is_grad_enabled()))

    monkeypatch.setattr(torch, "compile", compiled)
    before = config.freezing
    runner, _ = inductor.compile_graph(model.gm, mode="default")
    assert seen == [] and config.freezing == before
    runner(*data()[0])
    assert seen == [(kernel == "onednn", False)] and config.freezing == before


def test_modules_are_not_guarded_and_options_go_on_to_torch(model, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda gm, **options: seen.append(options))
    inductor.compile_graph(model.gm, dynamic=False, options={"max_autotune": True})
    unguarded = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    assert seen == [
        {"fullgraph": True, "dynamic": False, "options": unguarded | {"max_autotune": True}}
    ]


@pytest.mark.parametrize("trial, made", [(True, 1), (False, 0), (None, 0)])
def test_kernels_are_chosen_by_trial_where_that_is_asked_for(model, monkeypatch, trial, made):
    asked = []

    def timed_chooser():
        asked.append(trial)
        return untimed_choice

    monkeypatch.setattr(autotune, "timed_chooser", timed_chooser)
    monkeypatch.setattr(torch, "compile", lambda gm, **options: None)
    inductor.compile_graph(model.gm, trial=trial)
    assert len(asked) == made


def test_artifacts_are_of_the_first_call_and_of_the_cpu(model, monkeypatch, tmp_path):
    read = []

    def with_artifact(path, call):
        read.append(path)
        return call()

    monkeypatch.setattr(inductor, "with_artifact", with_artifact)
    monkeypatch.setattr(torch, "compile", lambda gm, **options: lambda *inputs: "result")
    runner, _ = inductor.compile_graph(model.gm, artifact=str(tmp_path / "model.bin"))
    assert read == []
    assert [runner(*data()[0]) for _ in range(2)] == ["result"] * 2
    assert read == [tmp_path / "model.bin"]
    monkeypatch.setattr(inductor, "device_of", lambda gm: torch.device("cuda"))
    with pytest.raises(ConfigError, match="this model is on CUDA"):
        inductor.compile_graph(model.gm, artifact="model.bin")
