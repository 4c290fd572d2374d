"""Test whether the libraries that multiply 8-bit codes do so exactly on this machine.

On processors without VNNI, oneDNN and OpenVINO multiply unsigned by signed bytes in pairs whose sum
is kept in 16 bits and saturates there (`vpmaddubsw`): 255 * 127 * 2 does not fit. Instead of a
list of processors, each library multiplies a few codes once in a process, and the sums are checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.quant.affine import levels
from tfmq_fx.quant.quant_layer import QuantLayer

_MOST = 2**15 - 1  # of 16 bits
_CHANNELS, _OUT, _SIZE = 64, 32, 6
_SUM = 255 * 127 * _CHANNELS  # of a tap


def fits_pairs(codes: Tensor, top: int) -> bool:
    """Whether the sum of any two products of weight codes (less zero points) and input codes of 0
    to `top` fits in 16 bits, so that sums that keep pairs in 16 bits are exact."""
    low, high = (int(value) for value in codes.aminmax()) if codes.numel() else (0, 0)
    return 2 * top * max(-low, high) <= _MOST


def saturates(layer: QuantLayer, library: str, exact: Callable[[], bool]) -> str | None:
    """Why a library must not multiply the codes of a layer on integers here, or None where it may.

    exact: whether its products are exact; called only for layers whose codes could saturate.
    """
    bits = layer.act_bits
    if bits is None or fits_pairs(layer.weight_codes(), levels(bits)) or exact():
        return None
    return (
        f"{library} adds products of {layer.weight_bits}-bit weights in 16 bits on this processor, "
        "where they saturate"
    )


@functools.cache
def onednn_is_exact() -> bool:
    """Whether oneDNN sums products of 8-bit codes exactly, in linear layers and convolutions."""
    ops: Any = torch.ops.onednn
    rows = torch.full((16, _CHANNELS), 255, dtype=torch.uint8)
    images = torch.full((2, _CHANNELS, _SIZE, _SIZE), 255, dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    scale, zero = torch.ones(_OUT), torch.zeros(_OUT, dtype=torch.int64)
    rest: Any = (1.0, 0, torch.float32, "none", [], "")
    with torch.no_grad():
        matrix = torch.full((_OUT, _CHANNELS), 127, dtype=torch.int8)
        packed = ops.qlinear_prepack(matrix, list(rows.shape))
        sums = ops.qlinear_pointwise(rows, 1.0, 0, packed, scale, zero, None, *rest)
        if not (sums == _SUM).all():
            return False
        for taps in (1, 3):
            filters = torch.full((_OUT, _CHANNELS, taps, taps), 127, dtype=torch.int8)
            geometry = ([1, 1], [0, 0], [1, 1], 1)
            packed = ops.qconv_prepack(filters, scale, 1.0, 0, *geometry, list(images.shape))
            arguments = (images, 1.0, 0, packed, scale, zero, None, *geometry)
            if not (ops.qconv_pointwise(*arguments, *rest) == _SUM * taps**2).all():
                return False
    return True


@functools.cache
def openvino_is_exact() -> bool:
    """Whether OpenVINO sums products of 8-bit codes exactly, in linear layers and convolutions."""
    return all(_openvino_sums_are(taps) for taps in (0, 1, 3))


def _openvino_sums_are(taps: int) -> bool:
    """Whether OpenVINO sums a convolution, or for 0 taps a matrix product, exactly."""
    import numpy as np
    import openvino
    from openvino import opset15 as ops

    spatial = [taps, taps] if taps else []
    shape = [2, _CHANNELS, _SIZE, _SIZE] if taps else [16, _CHANNELS]
    x = ops.parameter(shape, np.float32)
    low, high = np.float32(0), np.float32(255)
    codes = ops.fake_quantize(x, low, high, low, high, 256)
    weight = ops.constant(np.full([_OUT, _CHANNELS, *spatial], 127, np.int8))
    scale = ops.constant(np.ones([_OUT, 1, *(1 for _ in spatial)], np.float32))
    filters = ops.multiply(ops.convert(weight, np.float32), scale)
    if taps:
        y = ops.convolution(codes, filters, [1, 1], [0, 0], [0, 0], [1, 1])
    else:
        y = ops.matmul(codes, filters, False, True)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(openvino.Model([y], [x]), "CPU", settings)
    (sums,) = model([np.full(shape, 255, np.float32)]).values()
    return bool((sums == _SUM * max(1, taps) ** 2).all())
