"""torchao: weight-only linear layers keep their int8 codes, and compute the same."""

import pytest
import torch
from torch import nn

from tests.toys import seeded
from tfmq_fx.affine import QParams
from tfmq_fx.backends.torchao import to_torchao
from tfmq_fx.nn import QuantLinear


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
