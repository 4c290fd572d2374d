"""Lower weight-only linear layers to torchao's int8 tensors.

y = linear_q(x)    ->    y = F.linear(x, Int8Tensor(codes, scale)): one matmul on int8 weights
"""

from __future__ import annotations

from torch import nn

from tfmq_fx.nn import QuantLinear


def to_torchao(layer: QuantLinear) -> nn.Linear:
    """A torch.nn.Linear whose weight is a torchao Int8Tensor with the codes of `layer`.

    Weights of fewer bits are expanded to int8, their zero points subtracted. For layers whose
    activations stay in floating point.
    """
    from torchao.quantization import Int8Tensor

    out, width = layer.weight_shape
    made = nn.Linear(width, out, bias=False, device="meta", dtype=layer.dtype)
    weight = Int8Tensor(
        qdata=layer.weight_codes(),
        scale=layer.weight_scale.to(layer.dtype)[:, None],
        block_size=[1, width],
        dtype=layer.dtype,
    )
    made.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.clone(), requires_grad=False)
    return made.eval()
