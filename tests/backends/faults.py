"""A model that is wrong in one layer, as kernels have been or may be."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx


class Faulty(fx.Interpreter):
    """Runs a quantized graph with one layer computed by `fault(layer, x, scale)`."""

    def __init__(self, gm, name, fault):
        super().__init__(gm)
        self.name, self.fault = name, fault

    def call_module(self, target, args, kwargs):
        layer = self.fetch_attr(target)
        run = self.fault if target == self.name else type(layer).__call__
        return run(layer, *args, **kwargs)


def with_bias(layer, sums):
    return sums if layer.bias is None else sums + layer.bias.view(layer.bias_shape)


def one_more(layer, x, scale=None):
    """Every code of the input is one too many."""
    used = layer.broadcast_scale(x, scale)
    sums = layer.apply_op(layer.input_codes(x, used) + 1, layer.weight, None)
    return with_bias(layer, sums * used)


def scale_off(layer, x, scale=None):
    """The scale of the weights is off by 5 %."""
    return with_bias(layer, 1.05 * (layer(x, scale) - with_bias(layer, torch.zeros(()))))


def swapped(layer, x, scale=None):
    """Two channels of the result are in each other's place."""
    y = layer(x, scale)
    dim = 1 if y.dim() == 4 else -1
    order = torch.arange(y.shape[dim])
    order[:2] = order[:2].flip(0)
    return y.index_select(dim, order)


def saturating(layer, x, scale=None):
    """Products are added by twos in 16 bits, as processors without VNNI do."""
    used = layer.broadcast_scale(x, scale)
    codes, zero = layer.input_codes(x, used) + layer.act_zero, float(layer.act_zero)
    rows, sizes = layer.weight_codes().float().flatten(1), None
    if codes.dim() == 4:
        codes = F.pad(codes, layer.pad_widths, value=zero)
        sizes = [
            (n - k) // s + 1
            for n, k, s in zip(codes.shape[2:], layer.kernel_size, layer.stride, strict=True)
        ]
        codes = F.unfold(codes, layer.kernel_size, stride=layer.stride).transpose(1, 2)
    pairs = torch.einsum(
        "...kp,okp->...ok", codes.unflatten(-1, (-1, 2)), rows.unflatten(1, (-1, 2))
    )
    sums = pairs.clamp(-(2**15), 2**15 - 1).sum(-1) - zero * rows.sum(1)
    if sizes is not None:
        sums = sums.transpose(1, 2).unflatten(2, sizes)
    return with_bias(layer, sums * layer.weight_scale.view(layer.bias_shape) * used)
