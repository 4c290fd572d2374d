"""nn: quantized layers compute what their integers say, for every kind of layer and padding."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.layer_config import WeightSpec
from tfmq_fx.quant.affine import activation_scales, quantize, weight_groups, weight_qparams
from tfmq_fx.quant.gptq import round_nearest
from tfmq_fx.quant.modules import (
    QuantConv1d,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
    kind_of,
)
from tfmq_fx.quant.quant_layer import QuantLayer

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (3, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv1d same, dilated": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 5)),
    "conv2d strided, valid": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding="valid"), (2, 4, 7, 5)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, (3, 1), groups=2, padding=(2, 0)), (2, 4, 7, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 7, 5)),
    "conv2d circular": (
        lambda: nn.Conv2d(4, 6, (3, 5), padding=(1, 2), padding_mode="circular"),
        (2, 4, 7, 5),
    ),
    "conv2d reflect, same": (
        lambda: nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode="reflect"),
        (2, 4, 7, 5),
    ),
    "conv2d replicate, valid": (
        lambda: nn.Conv2d(4, 6, 3, padding="valid", padding_mode="replicate"),
        (2, 4, 7, 5),
    ),
    "conv3d": (
        lambda: nn.Conv3d(2, 4, 3, stride=(1, 2, 1), padding=1, dilation=(1, 1, 2)),
        (2, 2, 4, 6, 7),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_settings_go_by_torchs_names(name):
    layer = LAYERS[name][0]()
    made = quantized(layer)
    assert made.settings
    for setting in made.settings:
        assert getattr(made, setting) == getattr(layer, setting), setting


def quantized(layer, *, bits=8, act_bits=None, per_timestep=False, spec=None, **formats):
    """The quantized form of a float layer, weights rounded to nearest."""
    spec = spec or WeightSpec(bits=bits, format=formats.get("weight_format", "int"))
    made = kind_of(layer).from_float(
        layer, weight_bits=bits, act_bits=act_bits, per_timestep=per_timestep, **formats
    )
    grid = weight_qparams(layer.weight, spec)
    codes = round_nearest(layer.weight.detach().flatten(1), grid)
    made.set_weight(codes.view(layer.weight.shape), grid)
    return made


def make(name, seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        build, shape = LAYERS[name]
        return build().eval(), torch.randn(shape)


def with_weight(layer, weight):
    """The float layer with another weight."""
    other = copy.deepcopy(layer)
    other.weight.data = weight.to(layer.weight.dtype)
    return other


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_only_layer_is_the_float_layer_on_the_restored_weight(name, bits):
    layer, x = make(name)
    made = quantized(layer, bits=bits)
    found = made(x)
    # the same torch operation on the same operands
    assert torch.equal(found, with_weight(layer, made.weight)(x))
    assert made.weight_codes().dtype == torch.int8
    scale = made.weight_scale.view(-1, *[1] * (layer.weight.dim() - 1))
    assert torch.equal(made.weight_codes().float() * scale, made.weight)


@pytest.mark.parametrize("act_bits", [4, 8, 16])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_an_integer_layer_is_the_float_layer_on_the_restored_input(name, act_bits):
    layer, x = make(name)
    made = quantized(layer, act_bits=act_bits)
    made.set_static_range(8 / 2**act_bits, 2 ** (act_bits - 1))  # covers about [-4, 4]
    seen = made.quantized_input(x)
    inside = x.abs() < 3.5
    # round(x / s) moves x by s / 2; x * (1 / s) is off by 2^-22 of itself besides
    assert float((seen - x)[inside].abs().max()) <= 8 / 2**act_bits / 2 + 4 * 2**-22
    expected = with_weight(layer, made.weight)(seen)
    # Codes times weights, scaled afterwards, against scaled inputs: the same sum of up to 54
    # products of magnitude |x| |w| <= 4 * 0.5, each rounded three times in float32 (2^-24).
    assert float((made(x) - expected).abs().max()) <= 54 * 4 * 0.5 * 3 * 2**-24 + 2**-22


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d circular", "conv3d"])
def test_scales_per_timestep_equal_static_ranges_row_by_row(name):
    layer, x = make(name)
    made = quantized(layer, act_bits=8, per_timestep=True)
    made.set_static_range(123.0, 100)
    scales = torch.linspace(0.01, 0.05, len(x))
    rows = []
    for i, scale in enumerate(scales.tolist()):
        static = quantized(layer, act_bits=8)
        static.set_static_range(scale, 100)
        rows.append(static(x[i : i + 1]))
    # a row alone may add in another order than in a batch: some 54 products, |sum of codes * w|
    # below 54 * 155 * 0.5, each rounded to 2^-24
    bound = 54 * 155 * 0.5 * 0.05 * 54 * 2**-24
    assert float((made(x, scales) - torch.cat(rows)).abs().max()) <= bound
    assert not torch.equal(made(x, scales), made(x, scales.flip(0)))
    with pytest.raises(ConfigError, match="it needs a scale"):
        made(x)


FP8 = {"weight_format": "fp8", "act_format": "fp8", "act_bits": 8}


@pytest.mark.parametrize("name", LAYERS)
def test_fp8_weights_are_the_nearest_floats_of_their_channel(name):
    layer, x = make(name)
    made = quantized(layer, weight_format="fp8")
    codes, rows = made.weight_codes(), layer.weight.detach().flatten(1)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == layer.weight.shape
    assert made.codes.dtype == torch.uint8 and made.codes.numel() == layer.weight.numel()
    scale = rows.abs().amax(1, keepdim=True) / 448
    assert torch.equal(made.weight_scale, scale[:, 0]) and not made.weight_zero.any()
    assert torch.equal(codes.flatten(1).float().abs().amax(1), torch.full((len(rows),), 448.0))
    assert torch.equal(made.weight.flatten(1), codes.flatten(1).float() * scale)
    # 3 bits of mantissa: half a step is 2^-4 of the value, or of 2^-6, the least normal
    error = (made.weight.flatten(1) - rows).abs() / scale
    assert bool((error <= 2**-4 * (rows.abs() / scale).clamp(min=2**-6) * (1 + 2**-20)).all())
    assert torch.equal(made(x), with_weight(layer, made.weight)(x))  # the same operation


def test_a_channel_of_zeros_and_values_beyond_the_largest_are_fp8_too():
    layer = nn.Linear(4, 2)
    layer.weight.data[0] = 0
    made = quantized(layer, **FP8)
    assert not made.weight[0].any() and float(made.weight_scale[0]) == 1
    made.set_static_range(1.0, 0)
    seen = made.quantized_input(torch.tensor([-1e9, -448, 449, 17, 2**-9, 2**-11]))
    # 17 lies between 16 and 18, even mantissa wins; 2^-9 is the least float
    assert seen.tolist() == [-448, -448, 448, 16, 2**-9, 0]


def by_hand(layer, x, dims, steps):
    """The float layer on x rounded to `steps` integers either way of 0 in each slice of x."""
    scale = x.abs().amax(dims, keepdim=True) / steps
    return scale, torch.round(x * (1 / scale)) * scale


@pytest.mark.parametrize("act_bits", [4, 6, 8, 16])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_dynamic_ranges_are_those_of_each_token_or_sample(name, act_bits):
    layer, x = make(name)
    made = quantized(layer, act_bits=act_bits, dynamic=True)
    dims = -1 if isinstance(layer, nn.Linear) else tuple(range(1, x.dim()))
    x = x * torch.linspace(0.1, 50, len(x)).view(-1, *[1] * (x.dim() - 1))
    scale, seen = by_hand(layer, x, dims, 2 ** (act_bits - 1) - 1)
    assert torch.equal(made.measured_scale(x), scale)
    assert torch.equal(made.quantized_input(x), seen)
    assert int(made.act_zero) == 2 ** (act_bits - 1) and made.range_kind() == "dynamic"
    expected = with_weight(layer, made.weight)(seen)
    # as for static ranges: up to 54 products of |x| |w| <= 200 * 0.5, each rounded three times
    assert float((made(x) - expected).abs().max()) <= 54 * 200 * 0.5 * 3 * 2**-24


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d circular", "conv3d"])
@torch.no_grad()
def test_dynamic_fp8_is_static_fp8_at_the_scale_of_the_slice(name):
    layer, x = make(name)
    made, static = quantized(layer, **FP8, dynamic=True), quantized(layer, **FP8)
    for row in x:
        static.set_static_range(float(row.abs().max() / 448), 0)
        assert torch.equal(made(row[None]), static(row[None]))


@pytest.mark.parametrize("act_format", ["int", "fp8"])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_dynamic_zeros_stay_zero_and_half_precision_stays_finite(name, act_format):
    layer, x = make(name)
    formats = {"weight_format": act_format, "act_format": act_format}
    made = quantized(layer, act_bits=8, dynamic=True, **formats)
    bias = made.bias.view(made.bias_shape)
    assert torch.equal(made(torch.zeros_like(x)) - bias, torch.zeros_like(made(x)))
    assert not made.quantized_input(x * 0 + 1e-42).isnan().any()
    half = made.to(torch.float16)
    large = (x * 1e4).to(torch.float16)
    assert half.quantized_input(large).dtype == torch.float16
    assert bool(torch.isfinite(half.quantized_input(large)).all())


def test_padding_stays_exactly_zero_whatever_the_zero_point():
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    made = quantized(layer, act_bits=8)
    made.set_static_range(0.1, 37)
    assert torch.equal(made(torch.zeros(1, 1, 4, 4)), torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "how",
    [
        {"bits": 4},
        {"act_bits": 8, "per_timestep": True},
        {"act_bits": 8, "dynamic": True},
        {"weight_format": "fp8"},
        FP8 | {"per_timestep": True},
        FP8 | {"dynamic": True},
    ],
    ids=str,
)
def test_spec_and_state_dict_rebuild_a_layer(name, how):
    layer, x = make(name)
    made, per_timestep = quantized(layer, **how), how.get("per_timestep", False)
    if made.act_format == "int" and not made.dynamic:
        made.set_static_range(0.04, 120)
    rebuilt = type(made).from_spec(made.spec())
    rebuilt.load_state_dict(made.state_dict(), strict=True)
    arguments = (x, torch.full((len(x),), 0.03)) if per_timestep else (x,)
    assert torch.equal(rebuilt(*arguments), made(*arguments))
    assert rebuilt.spec() == made.spec() and repr(rebuilt) == repr(made)
    assert torch.equal(copy.deepcopy(made)(*arguments), made(*arguments))


def test_a_spec_of_an_earlier_version_means_integers():
    made = quantized(nn.Linear(6, 4), act_bits=8)
    old = {k: v for k, v in made.spec().items() if k not in ("weight_format", "act_format")}
    del old["dynamic"]
    assert QuantLinear.from_spec(old).spec() == made.spec()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_leave_scales_and_codes_alone(dtype):
    made = quantized(nn.Linear(8, 4), act_bits=8)
    made.set_static_range(1 / 3, 7)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    made.to(dtype)
    for name, value in made.state_dict().items():
        if name == "bias":
            assert value.dtype == dtype and made.dtype == dtype
        else:
            assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    assert QuantLinear.from_spec(made.spec()).bias.dtype == dtype
    assert quantized(nn.Linear(8, 4, bias=False)).to(dtype).dtype == dtype


def test_an_empty_layer_moves_off_the_meta_device():
    with torch.device("meta"):
        made = QuantLinear.from_spec(quantized(nn.Linear(8, 4)).spec())
    made = made.to_empty(device="cpu")
    assert {b.device.type for b in made.buffers()} == {"cpu"}
    assert made.weight_scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act_bits", [None, 8, 16])
@pytest.mark.parametrize("per_timestep", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_half_precision_layers_answer_in_their_dtype(name, dtype, act_bits, per_timestep):
    if act_bits is None and per_timestep:
        return
    layer, x = make(name)
    made = quantized(layer, act_bits=act_bits, per_timestep=per_timestep)
    scale = 8 / 2 ** (act_bits or 8)
    made.set_static_range(scale, 2 ** ((act_bits or 8) - 1))
    arguments = (torch.full((len(x),), scale),) if per_timestep else ()
    x = x.to(dtype).float()
    expected = made(x, *arguments)
    half = made.to(dtype)
    found = half(x.to(dtype), *arguments)
    assert found.dtype == dtype
    seen = half.quantized_input(x.to(dtype), *arguments)
    assert seen.dtype == dtype
    # bias and output are rounded to dtype (half an eps of |y| <= 4 each); where only weights are
    # integers, so are the 36 weights of |w| <= 0.5 that meet |x| <= 4
    rounded = 36 * 4 * 0.5 if act_bits is None else 0
    bound = torch.finfo(dtype).eps / 2 * (4 + 4 + rounded)
    assert float((found.float() - expected).abs().max()) <= bound


def test_codes_that_do_not_fit_are_refused():
    layer = nn.Linear(6, 4)
    made, grid = quantized(layer), weight_qparams(layer.weight, WeightSpec(bits=4))
    with pytest.raises(ConfigError, match=r"codes of shape \(4, 6\) at 4 bits do not fit"):
        made.set_weight(torch.zeros(4, 6), grid)
    with pytest.raises(ConfigError, match="has no scale per timestep"):
        QuantLinear(weight_shape=(2, 2), weight_bits=8, act_bits=None, per_timestep=True, bias=True)
    sizes = {"weight_shape": (2, 2), "bias": True}
    for wrong, text in [
        ({"dynamic": True, "per_timestep": True}, "have no scale per timestep"),
        ({"dynamic": True, "act_bits": None}, "has no scale per timestep or call"),
        ({"weight_format": "fp8", "weight_bits": 4}, "fp8 weights have 8 bits and one scale"),
        ({"weight_format": "fp8", "weight_groups": 2}, "fp8 weights have 8 bits and one scale"),
        ({"act_format": "fp8", "act_bits": 16}, "fp8 activations have 8 bits, not 16"),
    ]:
        common = {"weight_bits": 8, "act_bits": 8, "per_timestep": False}
        with pytest.raises(ConfigError, match=text):
            QuantLinear(**sizes, **(common | wrong))
    with pytest.raises(ConfigError, match=r"\(4, 6\) at fp8 do not fit a layer of .* at 8 bits"):
        made.set_weight(torch.zeros(4, 6), weight_qparams(layer.weight, WeightSpec(format="fp8")))
    with pytest.raises(TypeError, match="use QuantLinear"):
        QuantLayer(
            weight_shape=(2, 2), weight_bits=8, act_bits=None, per_timestep=False, bias=True
        )(torch.zeros(1, 2))


def test_kinds_go_by_the_forward_that_runs():
    class Named(nn.Conv1d):
        pass

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * F.linear(x, self.weight, self.bias)

    assert kind_of(nn.Linear(2, 2)) is QuantLinear
    assert kind_of(Named(2, 2, 1)) is QuantConv1d
    assert kind_of(nn.Conv2d(2, 2, 1)) is QuantConv2d
    assert kind_of(Scaled(2, 2)) is None
    assert kind_of(nn.ConvTranspose2d(2, 2, 1)) is QuantConvTranspose2d
    assert kind_of(nn.GroupNorm(1, 2)) is None


def test_an_asymmetric_eight_bit_layer_cannot_wrap_round():
    # codes less the zero point must fit int8: 8-bit grids are symmetric even for one-sided weights
    layer = nn.Linear(50, 2).requires_grad_(False)
    layer.weight.uniform_(1, 2)
    made = quantized(layer)
    assert float((made.weight - layer.weight).abs().max()) <= 2 / 127 / 2 * (1 + 2**-20)


def test_layers_say_what_they_are():
    made = quantized(nn.Conv2d(3, 5, 3), bits=4, act_bits=8)
    assert repr(made) == "QuantConv2d(5x3x3x3, weights 4 bits, activations 8 bits static)"
    assert made.range_kind() == "static" and made.weight_shape_numel() == 135
    assert quantized(nn.Linear(2, 2)).range_kind() == "none"
    made = quantized(nn.Linear(2, 2), **FP8, dynamic=True)
    assert repr(made) == "QuantLinear(2x2, weights fp8, activations fp8 dynamic)"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    "layer", [nn.Linear(12, 5), nn.Conv2d(12, 5, 3), nn.Conv2d(12, 4, 3, groups=2)]
)
def test_grouped_weights_stand_for_what_their_runs_of_channels_round_to(layer, bits):
    spec = WeightSpec(bits=bits, group_size=3)
    weight = layer.weight.detach()
    groups = weight_groups(weight.shape, spec)
    assert groups == weight.shape[1] // 3
    grid = weight_qparams(weight, spec)
    made = kind_of(layer).from_float(
        layer, weight_bits=bits, act_bits=None, per_timestep=False, weight_groups=groups
    )
    made.set_weight(round_nearest(weight.flatten(1), grid).view(weight.shape), grid)
    alone = dataclasses.replace(spec, group_size=None)
    for g in range(groups):
        part = weight[:, 3 * g : 3 * g + 3]
        own = weight_qparams(part, alone)
        scale, zero = own.over(part[0].numel())
        expected = (round_nearest(part.flatten(1), own) - zero) * scale
        assert torch.equal(made.weight[:, 3 * g : 3 * g + 3].flatten(1), expected)
    rebuilt = type(made).from_spec(made.spec())
    rebuilt.load_state_dict(made.state_dict())
    x = torch.randn(2, 12, *[4] * (weight.dim() - 2))
    assert torch.equal(rebuilt(x), made(x))


def test_a_group_size_that_divides_no_input_keeps_one_scale_per_channel():
    assert weight_groups((5, 7), WeightSpec(bits=4, group_size=3)) == 1


@pytest.mark.parametrize("how", ["static", "per timestep", "dynamic", "fp8", "fp8 dynamic"])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(how, bad):
    """No code stands for an infinity: clipped to the largest it would look like a number."""
    layer = nn.Linear(6, 4)
    format = "fp8" if "fp8" in how else "int"
    made = QuantLinear.from_float(
        layer,
        weight_bits=8,
        act_bits=8,
        per_timestep=how == "per timestep",
        dynamic="dynamic" in how,
        act_format=format,
    )
    grid = weight_qparams(layer.weight, WeightSpec(bits=8))
    made.set_weight(quantize(layer.weight.detach(), *grid.over(6), 8), grid)
    made.set_static_range(0.1, 0 if format == "fp8" or "dynamic" in how else 100)
    if "dynamic" in how and format == "int":
        made.set_static_range(0.1, 128)
    x = torch.randn(3, 5, 6)
    x[1, 2, 3] = bad
    scale = (torch.full((3,), 0.1),) if how == "per timestep" else ()
    y = made(x, *scale)
    hit = torch.zeros(3, 5, dtype=torch.bool)
    hit[1, 2] = True
    assert torch.equal(~y.isfinite(), hit[..., None].expand(y.shape))
    x[1, 2, 3] = 1e30  # large, and finite: clipped
    assert made(x, *scale).isfinite().all()


def test_a_scale_below_the_smallest_has_a_finite_inverse():
    layer = nn.Linear(6, 4)
    made = QuantLinear.from_float(layer, weight_bits=8, act_bits=8, per_timestep=False)
    grid = weight_qparams(layer.weight, WeightSpec(bits=8))
    made.set_weight(quantize(layer.weight.detach(), *grid.over(6), 8), grid)
    made.set_static_range(1e-42, 3)
    assert made(torch.zeros(2, 6)).isfinite().all()
    low, high = torch.tensor([0.0, -1e-41]), torch.tensor([1e-41, 0.0])
    for format in ("int", "fp8"):
        scales, _ = activation_scales(low, high, bits=8, format=format)
        assert (1 / scales).isfinite().all()
