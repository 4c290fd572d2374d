"""Random arguments for the CUDA ops."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from tfmq_fx.backends.codes.arithmetic import pack_weight
from tfmq_fx.backends.codes.problem import Tile
from tfmq_fx.quant.affine import FP8


def codes(shape, format, generator):
    if format == "fp8":
        return (torch.randn(shape, generator=generator) * 50).clamp(-448, 448).to(FP8)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def conv_arguments(
    *,
    batch=2,
    size=(5, 6),
    channels=(7,),
    out_channels=9,
    taps=(3, 3),
    stride=(1, 1),
    dilation=(1, 1),
    format="int8",
    half=32,
    ranges="sample",
    bias=True,
    row=True,
    residual=True,
    requantize=False,
    sliced=False,
    dtype=torch.float32,
    tile=None,
    seed=0,
):
    """Arguments of `conv2d_triton` as a dict; `channels`: of each segment."""
    generator = torch.Generator().manual_seed(seed)
    high, wide = (
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(size, taps, stride, dilation, strict=True)
    )

    def uniform(*shape):
        return torch.rand(shape, generator=generator) * 0.01 + 1e-4

    counts = {"all": 1, "sample": batch, "row": batch * high * wide}
    out_dtype = dtype if not requantize else FP8 if format == "fp8" else torch.int8
    whole = codes((batch, *size, sum(channels)), "fp8" if format == "fp8" else "int8", generator)
    given = {
        "xs": [part if sliced else part.clone() for part in whole.split(list(channels), 3)],
        "weights": [],
        "zeros": [],
        "weight_scales": [uniform(out_channels) for _ in channels],
        "offsets": [
            torch.randint(-9999, 9999, (out_channels,), generator=generator, dtype=torch.int32)
            for _ in channels
        ],
        "scales": [uniform(counts[ranges]) for _ in channels],
        "bias": torch.randn(out_channels, generator=generator) if bias else None,
        "row": torch.randn(batch, out_channels, generator=generator) if row else None,
        "residual": None,
        "out_scale": uniform(batch) * 50 if requantize else None,
        "out_zero": 100,
        "out_levels": 255,
        "stride": list(stride),
        "dilation": list(dilation),
        "halves": [half if format == "int4" else 0] * len(channels),
        "dtype": out_dtype,
        "tile": tile or Tile(16, 16, 2 * half if format == "int4" else 32, 2, 1, 4, 2),
    }
    if residual:
        given["residual"] = torch.randn(batch, high, wide, out_channels, generator=generator)
    for count in channels:
        shape = (out_channels, *taps, count)
        if format == "int4":
            nibbles = torch.randint(0, 16, shape, generator=generator)
            given["weights"].append(pack_weight(nibbles, half))
            zero = torch.randint(0, 16, (out_channels,), generator=generator)
            given["zeros"].append(zero.to(torch.uint8))
        else:
            given["weights"].append(codes(shape, format, generator))
            given["zeros"].append(torch.zeros(out_channels, dtype=torch.uint8))
    return given


@st.composite
def convolutions(draw):
    """Settings of `conv_arguments`: every format, geometry and epilogue, few channels."""
    taps = draw(st.sampled_from([(1, 1), (3, 3), (2, 3), (1, 5)]))
    dilation = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    least = [d * (k - 1) + 1 for d, k in zip(dilation, taps, strict=True)]
    segments = draw(st.integers(1, 2))
    return {
        "batch": draw(st.integers(1, 3)),
        "size": tuple(draw(st.integers(n, n + 4)) for n in least),
        "channels": tuple(draw(st.integers(1, 70)) for _ in range(segments)),
        "out_channels": draw(st.integers(1, 40)),
        "taps": taps,
        "stride": draw(st.sampled_from([(1, 1), (2, 2), (1, 2)])),
        "dilation": dilation,
        "format": draw(st.sampled_from(["int8", "fp8", "int4"])),
        "half": draw(st.sampled_from([32, 64])),
        "ranges": draw(st.sampled_from(["all", "sample", "row"])),
        "bias": draw(st.booleans()),
        "row": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "sliced": draw(st.booleans()),
        "seed": draw(st.integers(0, 999)),
    }
