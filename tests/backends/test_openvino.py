"""openvino: quantized layers become its int8 kernels, answers are the reference's, and what cannot
run is told."""

import copy
import dataclasses
import importlib.util
import threading

import pytest
import torch
from torch import nn

from tests.prologue.bound.toys import TOKENS, WIDTH, Conditional
from tests.toys import ToyDiT, seeded, tiny_unet2d
from tfmq_fx import (
    PRESETS,
    ActivationSpec,
    LayerConfig,
    WeightSpec,
    bind_request,
    calibrate,
    compile,
    convert,
    prepare,
)
from tfmq_fx.backends.openvino import lower as lowering
from tfmq_fx.backends.openvino.layers import (
    ChannelsLastNorm,
    IntegerLayer,
    fake_quantize,
    float_reason,
)
from tfmq_fx.backends.openvino.lower import lower, unavailable
from tfmq_fx.backends.saturation import openvino_is_exact
from tfmq_fx.core.errors import BackendError, ConfigError, InputError
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.quant.modules import QUANTIZED
from tfmq_fx.quant.sqnr import sqnr

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, while exporting


TIMES = (0, 3, 7)
EIGHT = LayerConfig(weights=WeightSpec(), activations=ActivationSpec())


class Net(nn.Module):
    """A convolution, then a linear layer."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(4, 16, 3, padding=1)
        self.leave = nn.Linear(16, 8)

    def forward(self, x, t):
        h = torch.tanh(self.enter(x) * (1 + t[:, None, None, None].to(x.dtype)))
        return self.leave(h.mean((2, 3)))


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 4, 6, 6, generator=generator), torch.full((4,), t)) for t in TIMES]


def converted(model, calls, config="w8a8", **options):
    recipe = PRESETS[config]
    spec = dataclasses.replace(recipe.reconstruction, rounding="nearest", iters=0)
    temporal = dataclasses.replace(recipe.temporal, mode="table")
    recipe = dataclasses.replace(recipe, reconstruction=spec, temporal=temporal)
    prepared = prepare(model, calls[0], timesteps=TIMES, config=recipe, **options)
    return convert(calibrate(prepared, calls, progress=False), progress=False)


def net(**options):
    return converted(seeded(Net).eval(), data(), **options)


def compiled(model, **options):
    return compile(model, "openvino", **({"precision": "f32"} | options))


def nodes(runner):
    """(kind, implementation, shape) of each operation of the last compiled model."""
    request, _ = list(runner.runner.compiled.values())[-1]
    for op in request.get_compiled_model().get_runtime_model().get_ops():
        kind, implementation = (op.get_rt_info()[k].value for k in ("layerType", "primitiveType"))
        if op.get_output_size():
            yield kind, implementation, op.get_output_partial_shape(0)


def kernels(runner):
    """Convolutions and matrix products, True for those of integers."""
    return [
        implementation.lower().endswith("i8")
        for kind, implementation, _ in nodes(runner)
        if kind in ("Convolution", "FullyConnected", "MatMul")
    ]


def integer(*bits):
    """Which layers of these weights and 8-bit inputs run on integers on this processor."""
    return [b < 8 or openvino_is_exact() for b in bits]


def step(model):
    """One input code of the last layer, at its largest weight."""
    scale = model.gm.leave.act_scale
    if model.gm.leave.per_timestep:
        scale = model.gm.activation_scales.max()
    return float(scale * model.gm.leave.weight.abs().max())


@pytest.fixture(scope="module")
def model():
    return net(overrides={"enter": EIGHT})


@pytest.fixture(scope="module")
def runner(model):
    return compiled(model)


def test_layers_become_int8_kernels_and_agree_with_eager(model, runner):
    assert runner.backend == "openvino" and runner.lowered == sum(integer(8, 8))
    assert len(runner.declined) == 2 - runner.lowered
    # The same integers up to float rounding before each round(): where that falls on the other
    # side, one input code of the last layer is off by one, and the output by one step times the
    # largest weight; 1e-5 for the order of float sums.
    for x, t in [(data(seed=1)[0][0], torch.tensor(TIMES)[[0, 2, 1, 2]]), *data(seed=2)]:
        error = (runner(x, t) - model(x, t)).abs()
        assert error.max() <= step(model) + 1e-5
        assert error.median() < 1e-5
    assert kernels(runner) == integer(8, 8)


def test_the_batch_is_free_and_shapes_are_kept_within_bounds(model, runner):
    assert runner.runner.free_sizes
    generator = torch.Generator().manual_seed(3)
    for batch in (1, 2, 3, 5, 6, 7):
        x = torch.randn(batch, 4, 6, 6, generator=generator)
        t = torch.tensor(TIMES)[torch.arange(batch) % 3]
        assert (runner(x, t) - model(x, t)).abs().max() <= step(model) + 1e-5
    assert len(runner.runner.compiled) == 4


def test_an_unknown_timestep_is_no_other_one(model, runner):
    x, _ = data()[0]
    other = copy.deepcopy(model)
    assert torch.equal(runner(x, torch.full((4,), 5)), other(x, 5))  # by the converted model
    with pytest.raises(InputError, match="no table row for timestep 5"):
        runner.runner(x, torch.full((4,), 5))  # in the callable itself, too


def test_outputs_are_the_callers_and_inputs_are_left_alone(model, runner):
    (x, t), (other, u) = data(seed=4)[:2]
    before, first = x.clone(), runner(x, t)
    kept = first.clone()
    runner(other, u)
    assert torch.equal(first, kept) and torch.equal(x, before)
    assert torch.equal(runner(x, t), kept)
    strided = x.transpose(2, 3).contiguous().transpose(2, 3)  # equal values, other strides
    assert not strided.is_contiguous() and torch.equal(runner(strided, t), kept)


def test_threads_take_turns(model, runner):
    calls = data(seed=5)
    expected = [runner(x, t) for x, t in calls]
    found = {}

    def work(i):
        for _ in range(20):
            found[i] = runner(*calls[i])
            assert torch.equal(found[i], expected[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(3))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("act_bits", [6, 8])
@pytest.mark.parametrize("per_timestep", [True, False])
def test_few_bits_and_static_ranges_run_on_integers_too(bits, act_bits, per_timestep):
    acts = ActivationSpec(bits=act_bits, per_timestep=per_timestep)
    layer = LayerConfig(weights=WeightSpec(bits=bits), activations=acts)
    model = net(overrides={"*": layer})
    runner = compiled(model)
    on_integers = integer(bits if act_bits == 8 else 4)[0]
    assert runner.lowered == (2 if on_integers else 0)
    assert len(runner.declined) == (0 if on_integers else 2)
    for x, t in data(seed=1):  # values beyond the calibrated range among them
        assert (runner(3 * x, t) - model(3 * x, t)).abs().max() <= step(model) + 1e-5
    assert kernels(runner) == [on_integers] * 2


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv1d(8, 8, 3, padding=1), (2, 8, 10)),
        (nn.Conv3d(8, 8, 3, padding=1), (2, 8, 4, 4, 4)),
        (nn.Conv2d(8, 8, 3, padding=1, groups=2), (2, 8, 6, 6)),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), (2, 8, 6, 6)),
        (nn.Conv2d(8, 8, 4, padding="same", stride=1), (2, 8, 6, 6)),
        (nn.Conv2d(8, 8, 3, dilation=2, bias=False), (2, 8, 6, 6)),
        (nn.Linear(8, 8), (2, 5, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("per_timestep", [True, False])
def test_convolutions_of_any_kind_run_on_integers(layer, shape, per_timestep):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.leave = layer

        def forward(self, x, t):
            return self.leave(x * 2.0) + t.view(-1, *[1] * (x.dim() - 1)) * 0.1

    acts = ActivationSpec(per_timestep=per_timestep)
    bits = 8 if openvino_is_exact() else 6  # which run on integers here
    plan = LayerConfig(weights=WeightSpec(bits=bits), activations=acts)
    generator = torch.Generator().manual_seed(0)
    calls = [(torch.randn(shape, generator=generator), torch.full((2,), t)) for t in TIMES]
    model = converted(One(), calls, overrides={"*": plan})
    runner = compiled(model)
    assert runner.lowered == 1 and runner.declined == []
    for x, t in calls:
        assert (runner(x, t) - model(x, t)).abs().max() <= step(model) + 1e-5
    assert kernels(runner) == [True]


def test_lowering_gives_the_same_numbers_before_it_is_converted(model, monkeypatch):
    monkeypatch.setattr(lowering, "openvino_is_exact", lambda: True)
    lowered = lower(model.gm)
    assert stage_of(lowered.gm) is Stage.LOWERED and stage_of(model.gm) is Stage.QUANTIZED
    assert lowered.changed == 2 and lowered.details["integer"] == 2
    assert isinstance(lowered.gm.enter, IntegerLayer)
    with torch.no_grad():
        for x, t in data(seed=1):
            assert (lowered.gm(x, t)[0] - model(x, t)).abs().max() <= step(model) + 1e-5


def test_what_computes_in_floating_point_is_listed_with_its_reason():
    last = LayerConfig(weights=WeightSpec(bits=6), activations=ActivationSpec())
    model = net(overrides={"leave": last})  # 16 bits enter the first layer
    runner = compiled(model)
    reason = "runs in floating point: activations have 16 bits"
    assert runner.lowered == 1 and runner.declined == [["enter", reason]]
    for x, t in data(seed=1):
        assert (runner(x, t) - model(x, t)).abs().max() <= step(model) + 1e-5


@pytest.mark.parametrize(
    "how, reason",
    [
        ({"act_bits": 8}, None),
        ({"act_bits": 4}, None),
        ({"act_bits": 16}, "activations have 16 bits"),
        ({"act_bits": None}, "activations are in floating point"),
        ({"act_bits": 8, "dynamic": True}, "ranges measured at run time"),
        ({"act_bits": 8, "weight_groups": 2}, "weights have scales per group"),
        ({"act_bits": 8, "act_format": "fp8"}, "no fp8 kernel on cpu"),
    ],
    ids=str,
)
@pytest.mark.parametrize("source", [nn.Linear(4, 4), nn.Conv1d(4, 4, 3), nn.Conv3d(4, 4, 3)])
def test_every_obstacle_is_named(source, how, reason):
    layer = QUANTIZED[type(source)].from_float(
        source, weight_bits=8, **({"per_timestep": False} | how)
    )
    assert float_reason(layer) == reason


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.leave = nn.Linear(32, 16)

    def forward(self, x, t):
        return self.leave(x + t[:, None].float())


@pytest.mark.parametrize("weights", [WeightSpec(), WeightSpec(bits=4, group_size=16)], ids=str)
def test_weight_only_linear_layers_keep_int8_weights(weights):
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    calls = [(x, torch.full((4,), t)) for t in TIMES]
    plan = LayerConfig(weights=weights, activations=None)
    model = converted(seeded(Line).eval(), calls, "w8a16", overrides={"*": plan})
    runner = compiled(model)
    assert runner.lowered == 0 and runner.declined == []
    for x, t in calls:
        # one sum of 32 products, in another order
        terms = (x + t[:, None]).abs() @ model.gm.leave.weight.abs().T
        assert (runner(x, t) - model(x, t)).abs().max() <= 32 * 2**-22 * terms.max()
    assert kernels(runner) == [False]
    assert ("Const", "unknown_i8", [16, 32]) in list(nodes(runner))


def test_options_are_checked(model):
    with pytest.raises(ConfigError, match="has no option mode; it takes precision, threads"):
        compile(model, "openvino", mode="max-autotune")
    with pytest.raises(ConfigError, match="precision='f16'; choose from auto, f32, bf16"):
        compile(model, "openvino", precision="f16")
    with pytest.raises(ConfigError, match="threads=0; at least 1"):
        compile(model, "openvino", threads=0)


def test_options_reach_openvino(model, tmp_path):
    runner = compiled(model, threads=1, cache_dir=tmp_path)
    x, t = data()[0]
    runner(x, t)
    ((request, _),) = runner.runner.compiled.values()
    made = request.get_compiled_model()
    assert made.get_property("INFERENCE_NUM_THREADS") == 1
    assert str(made.get_property("INFERENCE_PRECISION_HINT").get_type_name()) == "f32"
    assert list(tmp_path.glob("*.blob"))


def test_half_precision_models_keep_their_dtype():
    calls = [(x.bfloat16(), t) for x, t in data()]
    model = converted(seeded(Net).bfloat16().eval(), calls, overrides={"enter": EIGHT})
    runner = compiled(model, precision="auto")
    assert runner.lowered == sum(integer(8, 8))
    for x, t in data(seed=1):
        found, expected = runner(x.bfloat16(), t), model(x.bfloat16(), t)
        assert found.dtype == torch.bfloat16
        # between the layers bfloat16 rounds by 2^-9 of at most 1 (a mean of tanh), and may move a
        # code at that; the output, below 2, is rounded twice
        moved = 16 * 2**-8 * float(model.gm.leave.weight.abs().max())
        assert (found - expected).abs().max() <= moved + step(model) + 2 * 2**-8 * 2


def test_unsupported_operations_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.leave = nn.Linear(8, 8)

        def forward(self, x, t):
            return torch.special.bessel_j0(self.leave(x)) * t[:, None]

    calls = [(torch.randn(2, 8), torch.full((2,), t)) for t in TIMES]
    model = converted(seeded(Odd), calls)
    with pytest.raises(BackendError, match=r"it has no .*bessel_j0.*Use backend='inductor'"):
        compiled(model)(*calls[0])


def test_a_missing_package_is_told(model, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name)
    )
    with pytest.raises(BackendError, match=r"not installed \(pip install 'tfmq-fx\[openvino\]'\)"):
        compile(model, "openvino")
    assert unavailable(torch.device("cuda")) == "it runs on cpu, the model is on cuda"


def test_fake_quantization_is_the_reference():
    x = torch.linspace(-5, 5, 101)
    codes = (torch.round(x * (1 / 0.25)) + 3).clamp(0, 15)
    assert torch.equal(fake_quantize(x, 0.25, 3, 15), (codes - 3) * 0.25)
    assert fake_quantize(x.to("meta"), 0.25, 3, 15).shape == x.shape


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 5), (2, 8, 5, 7)], ids=str)
def test_channels_last_norms_are_group_norms(shape, affine):
    generator = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(2, 8, affine=affine)
    if affine:
        nn.init.normal_(norm.weight, generator=generator)
        nn.init.normal_(norm.bias, generator=generator)
    x = 3 + torch.randn(shape, generator=generator)
    found, expected = ChannelsLastNorm(norm)(x), norm(x)
    # E[x^2] is about 10, so that the variance, about 1, is off by some 10 roundings of 2^-24, for
    # values that are below 10
    assert (found - expected).abs().max() <= 10 * 20 * 2**-24 * 2
    assert ChannelsLastNorm(norm.bfloat16())(x.bfloat16()).dtype == torch.bfloat16


def agrees(runner, model, source, calls):
    """Both are about as far from full precision: codes that fall on the other side of a boundary
    in one layer move those of later ones, so that errors are alike in size, not in value."""
    for call in calls:
        exact = source(*call)
        exact = exact if isinstance(exact, torch.Tensor) else exact.sample
        found, expected = runner(*call), model(*call)
        if not isinstance(found, torch.Tensor):
            found, expected = found.sample, expected.sample
        assert sqnr(exact, found) > sqnr(exact, expected) - 3


@torch.no_grad()
def test_a_unet_of_diffusers_runs_end_to_end():
    source = tiny_unet2d()
    generator = torch.Generator().manual_seed(0)
    calls = [(torch.randn(2, 3, 16, 16, generator=generator), torch.tensor(t)) for t in TIMES]
    model = converted(source, calls)
    runner = compiled(model)
    agrees(runner, model, source, calls)
    assert sum(kernels(runner)) == runner.lowered
    assert (runner.lowered > 20) == openvino_is_exact() and runner.config is model.config
    agrees(compiled(model, precision="bf16"), model, source, calls)  # with OpenVINO's own norms


@torch.no_grad()
def test_a_transformer_runs_end_to_end():
    source = seeded(ToyDiT).eval()
    generator = torch.Generator().manual_seed(0)
    calls = [
        (
            torch.randn(2, 3, 8, 8, generator=generator),
            torch.full((2,), t),
            torch.tensor([1, 2]),
        )
        for t in TIMES
    ]
    model = converted(source, calls)
    runner = compiled(model)
    agrees(runner, model, source, calls)
    assert sum(kernels(runner)) == runner.lowered


@torch.no_grad()
def test_a_bound_model_runs_on_what_its_prologue_gives():
    source = seeded(Conditional).eval()
    text = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    calls = [(2 * text, torch.full((2,), t), torch.tensor([1, 2]), text) for t in TIMES]
    model = bind_request(converted(source, calls))
    agrees(compiled(model), model, source, calls)
