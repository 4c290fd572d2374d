"""torchao: linear layers keep their codes and scales, and compute the same."""

import importlib.metadata

import pytest
import torch
from torch import nn

from tests.quant.test_modules import quantized
from tests.toys import seeded
from tfmq_fx.backends.torchao import int4_obstacle, int4_parts, to_torchao, torchao_obstacle
from tfmq_fx.core.errors import BackendError
from tfmq_fx.core.layer_config import WeightSpec
from tfmq_fx.quant.affine import QParams, to_fp8, weight_groups, weight_qparams
from tfmq_fx.quant.gptq import round_nearest
from tfmq_fx.quant.modules import QuantLinear


def layer(bits, *, bias=True, dtype=torch.float32):
    made = QuantLinear.from_float(
        seeded(nn.Linear, 48, 32, bias=bias).to(dtype),
        weight_bits=bits,
        act_bits=None,
        per_timestep=False,
    )
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (32, 48), generator=generator)
    scale = torch.rand(32, generator=generator) * 0.01 + 0.001
    zero = torch.full((32,), 2 ** (bits - 1))
    made.set_weight(codes, QParams(scale, zero, bits))
    return made.eval()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_the_tensor_holds_the_codes_and_computes_the_same(bits, bias):
    from torchao.quantization import Int8Tensor

    source = layer(bits, bias=bias)
    made = to_torchao(source)
    assert isinstance(made.weight, Int8Tensor) and not made.training
    assert made.weight.qdata.dtype == torch.int8
    assert torch.equal(made.weight.qdata, source.weight_codes())
    assert torch.equal(made.weight.dequantize(), source.weight)
    assert not made.weight.requires_grad and (made.bias is not None) == bias
    x = torch.randn(5, 7, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = source(x), made(x)
    # one sum of 48 products, scaled after it instead of before: 48 * 2**-24 of its terms
    bound = 48 * 2**-23 * float((x.abs() @ source.weight.abs().T).max())
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_stays(dtype):
    source = layer(8, dtype=dtype)
    made = to_torchao(source)
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        expected, found = source(x), made(x)
    assert found.dtype == dtype
    # bfloat16 keeps 8 bits: scale, weight and result are each rounded by 2**-9
    bound = 4 * 2**-9 * float((x.abs().float() @ source.weight.abs().T).max())
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_the_original_keeps_its_bias():
    source = layer(8)
    made = to_torchao(source)
    assert made.bias.data_ptr() != source.bias.data_ptr()


FP8 = {"weight_format": "fp8", "act_format": "fp8", "act_bits": 8, "dynamic": True}
DYNAMIC = {"act_bits": 8, "dynamic": True}
STATIC = {"act_bits": 8}
GROUPED = {"bits": 4, "weight_groups": 2}


def made_of(width=48, out=32, *, bias=True, dtype=torch.float32, **how):
    return quantized(seeded(nn.Linear, width, out, bias=bias).to(dtype), **how).eval()


def inputs(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def summed(x, weight, eps=2.0**-23):
    """How far two ways to sum the products of x and a weight may be apart."""
    return weight.shape[1] * eps * float((x.abs().float() @ weight.abs().T).max())


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_dynamic_int8_rounds_rows_with_a_positive_peak_as_the_reference_does(bias):
    source = made_of(bias=bias, **DYNAMIC)
    lowered = to_torchao(source)
    assert torch.equal(lowered.weight.qdata, source.weight_codes())
    assert torch.equal(lowered.weight.scale[:, 0], source.weight_scale)
    x = inputs(5, 7, 48)
    x[..., 0] = x.abs().amax(-1) + 0.1
    torch.testing.assert_close(lowered(x), source(x), rtol=0, atol=summed(x, source.weight))
    # a negative peak is at -128 steps, and every value at most half a step of each off
    step = x.abs().amax(-1, keepdim=True) / 127
    bound = step * source.weight.abs().sum(1) + summed(x, source.weight)
    assert bool(((lowered(-x) - source(-x)).abs() <= bound).all())
    zeros = torch.zeros(2, 48)
    assert torch.equal(lowered(zeros), source(zeros))


@torch.no_grad()
def test_fp8_rows_are_rounded_from_x_over_scale():
    source = made_of(**FP8)
    lowered = to_torchao(source)
    assert torch.equal(lowered.weight.qdata.view(torch.uint8).flatten(), source.codes)
    assert torch.equal(lowered.weight.dequantize(), source.weight)
    x = inputs(5, 7, 48)
    x[0, 0] = 0
    scale = source.measured_scale(x)
    seen = to_fp8(x / scale).float() * scale
    assert float((seen != source.quantized_input(x)).float().mean()) < 0.01  # ties alone
    expected = source.apply_op(seen, source.weight, source.bias)
    torch.testing.assert_close(lowered(x), expected, rtol=0, atol=summed(x, source.weight))
    assert torch.equal(lowered(x)[0, 0], source.bias)


@pytest.mark.parametrize("how", [DYNAMIC, FP8])
@torch.no_grad()
def test_quantized_inputs_stay_in_bfloat16(how):
    source = made_of(dtype=torch.bfloat16, **how)
    x = inputs(5, 48, dtype=torch.bfloat16)
    found, expected = to_torchao(source)(x), source(x)
    assert found.dtype == torch.bfloat16
    # scales are rounded by 2^-8, which moves a code by one: 2^-3 of a value in fp8, a step of int8;
    # weights of 0.15 sum such moves of 48 values at random
    step = 2**-3 if source.act_format == "fp8" else 3 / 127
    assert float((found - expected).float().abs().max()) < step * 0.15 * 48**0.5 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_fp8_weights_alone_are_dequantized(dtype):
    source = made_of(dtype=dtype, weight_format="fp8")
    lowered, x = to_torchao(source), inputs(5, 7, 48, dtype=dtype)
    assert torch.equal(lowered.weight.dequantize(), source.weight.to(dtype))
    # the same operands; half precision rounds the product before the bias is added
    bound = summed(x, source.weight) + torch.finfo(dtype).eps * float(source(x).abs().max() + 1)
    torch.testing.assert_close(lowered(x), source(x), rtol=0, atol=bound)


def in_groups(bits, size):
    """A layer of 192 to 44 channels in bfloat16, with a scale for each `size` inputs."""
    spec = WeightSpec(bits=bits, group_size=size)
    linear = seeded(nn.Linear, 192, 44).to(torch.bfloat16)
    weight = linear.weight.detach().float()
    groups = weight_groups(weight.shape, spec)
    source = QuantLinear.from_float(
        linear, weight_bits=bits, act_bits=None, per_timestep=False, weight_groups=groups
    )
    grid = weight_qparams(weight, spec)
    source.set_weight(round_nearest(weight, grid), grid)
    return source


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [32, 64])
def test_int4_parts_stand_for_the_weight(bits, size):
    source = in_groups(bits, size)
    codes, pair = int4_parts(source)
    assert codes.shape == (48, 512) and codes.dtype == torch.uint8 and codes.is_contiguous()
    assert pair.shape == (1024 // size, 48, 2) and pair.dtype == torch.bfloat16
    whole = torch.stack([codes >> 4, codes & 15], 2).flatten(1).float()
    scale, zero = pair.float().repeat_interleave(size, 0).movedim(2, 0).mT
    found = (whole - 8) * scale + zero
    # scale and zero are rounded by 2^-8 of themselves, and are of up to 8 steps
    steps = 16 if bits == 4 else 8
    bound = float(source.weight_scale.max()) * steps * 2**-8
    torch.testing.assert_close(found[:44, :192], source.weight, rtol=0, atol=bound)
    assert bits == 4 or not zero.any()
    # the product of this machine reads scales and zeros as CUDA's does
    ops, x = torch.ops.aten, inputs(5, 1024, dtype=torch.bfloat16)
    packed = ops._convert_weight_to_int4pack_for_cpu(whole.int(), 8)
    y = ops._weight_int4pack_mm_for_cpu(x, packed, size, pair)
    expected = x.float() @ found.T
    # it may round weights and sums to bfloat16
    bound = 2 * 2**-8 * (x.float().abs() @ found.abs().T)
    assert bool(((y.float() - expected).abs() <= bound).all())
    assert not found[44:].any() and not found[:44, 192:].any()


@torch.no_grad()
def test_lowered_layers_compile_whole_with_free_rows():
    lowered = to_torchao(made_of(**DYNAMIC))
    compiled = torch.compile(lowered, backend="eager", fullgraph=True, dynamic=True)
    for rows in (40, 18, 3):
        x = inputs(rows, 2, 48)
        torch.testing.assert_close(compiled(x), lowered(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("how", "device", "reason"),
    [
        ({}, "cpu", None),
        ({}, "cuda", None),
        ({"weight_format": "fp8"}, "cuda", None),
        (DYNAMIC, "cpu", None),
        (DYNAMIC, "cuda", None),
        (FP8 | {"dtype": torch.bfloat16}, "cuda", None),
        (STATIC, "cuda", "static input ranges run on the kernels of this package"),
        (DYNAMIC | {"weight_format": "fp8"}, "cpu", "weights are fp8 and inputs int"),
        (DYNAMIC | {"act_bits": 16}, "cpu", "torchao rounds inputs to 8 bits, not 16"),
        (DYNAMIC | {"dtype": torch.float16}, "cpu", "not safe in float16"),
        (DYNAMIC, "mps", "no int8 kernel on mps"),
        (DYNAMIC | {"width": 12}, "cuda", "multiples of 8, not 12 inputs and 32 outputs"),
        (FP8 | {"out": 24}, "cuda", "multiples of 16, not 48 inputs and 24 outputs"),
        (FP8, "cuda", "fp8 rows are multiplied into bfloat16, not float32"),
    ],
    ids=str,
)
def test_obstacles_are_named(how, device, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    found = torchao_obstacle(made_of(**how), device)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("how", "device", "reason"),
    [
        (GROUPED | {"dtype": torch.bfloat16}, "cuda", None),
        (GROUPED | {"bits": 2, "dtype": torch.bfloat16}, "cuda", None),
        (GROUPED | {"dtype": torch.bfloat16}, "cpu", "no int4 kernel on cpu"),
        (GROUPED, "cuda", "int4 kernels multiply bfloat16, not float32"),
        (GROUPED | {"bits": 5, "dtype": torch.bfloat16}, "cuda", "do not hold int weights of 5"),
        ({"weight_format": "fp8"}, "cuda", "do not hold fp8 weights of 8 bits"),
        (GROUPED | STATIC, "cuda", "whose input is in floating point"),
    ],
    ids=str,
)
def test_int4_obstacles_are_named(how, device, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    groups = how.get("weight_groups", 1)
    source = made_of(width=64, **{key: how[key] for key in how if key != "weight_groups"})
    source.weight_groups = groups
    found = int4_obstacle(source, device)
    assert found is None if reason is None else reason in found


def test_old_devices_other_layers_groups_and_old_versions_are_named(monkeypatch):
    fp8 = made_of(dtype=torch.bfloat16, **FP8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert "fp8 kernels need compute capability 8.9, this device has 8.6" in torchao_obstacle(
        fp8, "cuda"
    )
    assert "linear layers alone" in torchao_obstacle(quantized(nn.Conv2d(2, 2, 1)), "cpu")
    grouped = QuantLinear.from_float(
        nn.Linear(48, 8), weight_bits=4, act_bits=None, per_timestep=False, weight_groups=4
    )
    assert torchao_obstacle(grouped, "cpu") == "no int4 kernel on cpu"
    grouped.dtype = torch.bfloat16
    assert torchao_obstacle(grouped, "cuda").endswith("(32, 64, 128, 256) inputs, not 12")
    with pytest.raises(BackendError, match=r"no torchao tensor for QuantLinear.*no int4 kernel"):
        to_torchao(grouped)
    grouped.act_bits, grouped.dynamic = 8, True
    assert torchao_obstacle(grouped, "cuda") == "weights have scales per group"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.16.0")
    assert torchao_obstacle(made_of(**DYNAMIC), "cpu") == (
        "torchao 0.16.0 is installed, quantized inputs need 0.18"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{}, {"weight_format": "fp8"}, DYNAMIC, FP8], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_on_cuda_layers_are_the_reference_up_to_their_rounding(how, compiled):
    source = made_of(256, 128, dtype=torch.bfloat16, **how).cuda()
    if reason := torchao_obstacle(source, "cuda"):
        pytest.skip(reason)
    lowered = to_torchao(source)
    run = torch.compile(lowered) if compiled else lowered
    for rows in (3, 300):
        x = inputs(rows, 256, dtype=torch.bfloat16).cuda()
        found, expected = run(x).float(), source(x).float()
        # bfloat16 scales move codes by one at most, as on the CPU; sums of 256 at random
        step = 0 if source.act_bits is None else 2**-3 if source.act_format == "fp8" else 4 / 127
        bound = step * 0.07 * 256**0.5 * 2 + 2**-7 * float(expected.abs().max() + 1)
        assert float((found - expected).abs().max()) < bound


@pytest.mark.gpu
@torch.no_grad()
def test_on_cuda_int4_is_the_reference_with_scales_in_bfloat16():
    source = in_groups(4, 64).cuda()
    if reason := int4_obstacle(source, "cuda"):
        pytest.skip(reason)
    x = inputs(40, 192, dtype=torch.bfloat16).cuda()
    found, expected = to_torchao(source)(x).float(), source(x).float()
    # scale and zero of each weight are rounded by 2^-8 of up to 16 steps, the output by 2^-8
    largest = source.weight_scale.amax(1)
    moved = 16 * 2**-8 * largest * x.float().abs().sum(1, keepdim=True)
    assert bool(((found - expected).abs() <= moved + 2**-7 * (expected.abs() + 1)).all())
