"""The lowering for CUDA, tried on the CPU: what every layer becomes, and why some stay in float."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

from tests.toys import seeded
from tfmq_fx import (
    ActivationSpec,
    BackendError,
    LayerConfig,
    WeightSpec,
    calibrate,
    compile,
    convert,
    prepare,
)
from tfmq_fx.backends import backend
from tfmq_fx.backends.codes.choice import Choice
from tfmq_fx.backends.codes.layers import quantize_input
from tfmq_fx.backends.cuda.autotune import untimed_choice
from tfmq_fx.backends.cuda.codes_layer import CudaCodesLayer
from tfmq_fx.backends.cuda.lower import lower
from tfmq_fx.backends.float_layers import FloatLayer
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.ir.graph import device_of
from tfmq_fx.ir.node_info import size_hint
from tfmq_fx.quant.sqnr import sqnr

TIMES = (0, 3, 7)
HOPPER, ADA, AMPERE, TURING = (9, 0), (8, 9), (8, 0), (7, 5)


class Net(nn.Module):
    """Convolutions of several kinds, then linear layers."""

    def __init__(self, **options):
        super().__init__()
        self.enter = nn.Conv2d(4, 16, 3, padding=1, **options)
        self.down = nn.Conv2d(16, 32, 3, stride=2)
        self.leave = nn.Linear(32, 16)
        self.last = nn.Linear(16, 8)

    def forward(self, x, t):
        h = torch.tanh(self.enter(x) * (1 + t[:, None, None, None].float()))
        h = torch.tanh(self.down(h))
        return self.last(torch.relu(self.leave(h.flatten(2).transpose(1, 2))))


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 4, 9, 9, generator=generator), torch.full((4,), t)) for t in TIMES]


def converted(config="w8a8", model=None, **options):
    model = model or seeded(Net).eval()
    prepared = prepare(model, data()[0], timesteps=TIMES, config=config, **options)
    return convert(calibrate(prepared, data(), progress=False), progress=False)


def everywhere(weights, activations):
    return {"*": LayerConfig(weights=weights, activations=activations)}


KINDS = {
    "w8a8": everywhere(WeightSpec(), ActivationSpec()),
    "w4a8": everywhere(WeightSpec(bits=4), ActivationSpec()),
    "static": everywhere(WeightSpec(), ActivationSpec(per_timestep=False)),
    "fp8": everywhere(WeightSpec(format="fp8"), ActivationSpec(format="fp8")),
    "w4a6": everywhere(WeightSpec(bits=4), ActivationSpec(bits=6)),
}


@functools.cache
def quantized(kind):
    """A converted model, made once: lowering leaves it alone."""
    return converted(overrides=KINDS[kind])


def on(gm, capability=HOPPER, choose=untimed_choice):
    return lower(gm, choose=choose, capability=capability)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_runs_on_a_kernel_and_agrees_with_eager(kind):
    model = quantized(kind)
    lowered = on(model.gm)
    assert stage_of(lowered.gm) is Stage.LOWERED and stage_of(model.gm) is Stage.QUANTIZED
    assert lowered.declined == [] and lowered.details["integer"] == 4
    assert lowered.details["torchao"] == [] and lowered.details["micros"] == {}
    layers = [m for m in lowered.gm.modules() if isinstance(m, CudaCodesLayer)]
    assert len(layers) == 4
    x, t = data(seed=1)[1]
    t = torch.tensor(TIMES)[[0, 2, 1, 2]]
    with torch.no_grad():
        # the same codes but for a few values that float sums put on the other side of a boundary:
        # far below the noise of rounding itself, 40 dB in 8 bits, 20 in 4 and 30 in fp8
        assert sqnr(model(x, t), lowered.gm(x, t)[0]) > (40 if kind == "fp8" else 50)


def test_dynamic_linear_layers_run_on_torchao_and_convolutions_on_kernels():
    dynamic = ActivationSpec(dynamic=True, per_timestep=False)
    lowered = on(converted(overrides=everywhere(WeightSpec(), dynamic)).gm)
    assert lowered.details["torchao"] == ["leave", "last"] and lowered.details["integer"] == 2
    assert type(lowered.gm.leave.weight).__name__ == "Int8Tensor"


def test_weight_only_linear_layers_run_on_torchao():
    lowered = on(converted("w8a16").gm)
    assert lowered.details["torchao"] == ["leave", "last"]
    reason = "runs in floating point: activations are in floating point"
    assert [[d.site, d.reason] for d in lowered.declined] == [["enter", reason], ["down", reason]]


@pytest.mark.parametrize(
    "kind, capability, runs",
    [
        ("w8a8", HOPPER, True),
        ("w8a8", ADA, True),
        ("w8a8", AMPERE, True),
        ("w8a8", TURING, False),
        ("fp8", HOPPER, True),
        ("fp8", ADA, True),
        ("fp8", AMPERE, False),
    ],
)
def test_devices_run_what_their_tensor_cores_can(kind, capability, runs):
    lowered = on(quantized(kind).gm, capability)
    assert lowered.details["integer"] == (4 if runs else 0)
    if not runs:
        have = f"{capability[0]}.{capability[1]}"
        name, need = ("fp8", "8.9") if kind == "fp8" else ("int8", "8.0")
        wanted = f"runs in floating point: {name} kernels need compute capability {need}, "
        assert {d.reason for d in lowered.declined} == {f"{wanted}this device has {have}"}
        assert isinstance(lowered.gm.down, FloatLayer)


def test_layers_that_are_faster_in_float_stay_there_and_the_report_says_so():
    def choose(problem, dtype):
        micros = {"float": 10.0, "triton": 12.5 if problem.taps == (3, 3) else 4.0}
        engine = min(micros, key=micros.get)
        return dataclasses.replace(untimed_choice(problem, dtype), engine=engine, micros=micros)

    lowered = on(quantized("w8a8").gm, choose=choose)
    reason = "runs in floating point: float32 took 10.0 us, the kernels 12.5 us"
    assert [[d.site, d.reason] for d in lowered.declined] == [["enter", reason], ["down", reason]]
    assert lowered.details["integer"] == 2
    assert lowered.details["micros"]["last"] == {"float": 10.0, "triton": 4.0}


def test_a_device_that_could_run_no_tile_says_so():
    def choose(problem, dtype):
        return Choice("float", untimed_choice(problem, dtype).tile, {"float": 10.0})

    lowered = on(quantized("w8a8").gm, choose=choose)
    assert {d.reason for d in lowered.declined} == {
        "runs in floating point: float32 took 10.0 us, the kernels inf us"
    }


def test_the_sizes_asked_for_are_those_of_the_capture():
    asked = []

    def choose(problem, dtype):
        asked.append((problem.batch, problem.height, problem.width, problem.channels, dtype))
        return untimed_choice(problem, dtype)

    on(quantized("w8a8").gm, choose=choose)
    assert asked == [
        (4, 11, 11, 4, torch.float32),  # borders included
        (4, 9, 9, 16, torch.float32),
        (4, 1, 16, 32, torch.float32),
        (4, 1, 16, 16, torch.float32),
    ]


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_other_padding_than_by_zeros_is_done_before_codes_are_made(mode):
    model = converted(model=seeded(Net, padding_mode=mode).eval(), overrides=KINDS["w8a8"])
    lowered = on(model.gm)
    assert lowered.details["integer"] == 4
    x, t = data(seed=1)[1]
    with torch.no_grad():
        assert sqnr(model(x, t), lowered.gm(x, t)[0]) > 50


def test_grouped_convolutions_and_grouped_weights_stay_in_float():
    model = converted(
        model=seeded(Net, groups=2).eval(),
        overrides={
            "*": LayerConfig(
                weights=WeightSpec(bits=4, group_size=16), activations=ActivationSpec()
            ),
            "enter": LayerConfig(weights=WeightSpec(), activations=ActivationSpec()),
            "last": LayerConfig(weights=WeightSpec(), activations=ActivationSpec(bits=16)),
        },
    )
    found = {
        d.site: d.reason.removeprefix("runs in floating point: ") for d in on(model.gm).declined
    }
    assert found.pop("enter") == "a convolution of 2 groups"
    assert found.pop("last") == "activations have 16 bits"
    # 16 input channels are one group of 16
    assert found == {"leave": "weights have scales per group"}


def test_codes_are_nodes_of_the_graph_with_values():
    lowered = on(quantized("w8a8").gm)
    codes = list(lowered.gm.graph.find_nodes(op="call_function", target=quantize_input))
    assert codes and all(n.meta["val"].dtype == torch.int8 for n in codes)
    assert size_hint(codes[0].meta["val"].shape[1]) == 11


def test_the_model_is_left_alone():
    model = quantized("w4a8")
    before = {k: v.clone() for k, v in model.gm.state_dict().items()}
    code = model.gm.code
    on(model.gm)
    assert model.gm.code == code
    assert all(torch.equal(v, before[k]) for k, v in model.gm.state_dict().items())


def test_where_a_graph_lies():
    model = converted()
    assert device_of(model.gm) == torch.device("cpu")
    assert device_of(model.gm.to("meta")) == torch.device("meta")


def test_devices_that_no_backend_serves_are_named():
    with pytest.raises(BackendError, match="compiles for cpu and cuda, the model is on meta"):
        backend("inductor", torch.device("meta"))
    assert backend("eager", torch.device("meta"))
    model = converted()
    model.gm.to("meta")
    with pytest.raises(BackendError, match="the model is on meta"):
        compile(model, "inductor")
    compiled = compile(model, "auto")
    assert compiled.backend == "eager" and "on meta" in compiled.declined[0][1]


def test_cuda_without_triton_says_what_to_install(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a)
    )
    with pytest.raises(BackendError, match=r"pip install 'tfmq-fx\[cuda\]'"):
        backend("inductor", torch.device("cuda"))
