"""Random arguments for the CPU's ops, and those of the references that they are compared with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from tfmq_fx.backends.codes.arithmetic import STORED_ZERO
from tfmq_fx.backends.codes.problem import Tile
from tfmq_fx.backends.cpu import kernels

needs_kernels = pytest.mark.usefixtures("any_kernels")


def table(count, layout, generator):
    """`count` scales: contiguous, or a column of a table."""
    values = torch.rand(count, 3, generator=generator) * 0.01 + 1e-4
    return values[:, 1] if layout == "column" else values[:, 1].contiguous()


def conv_arguments(
    *,
    batch=2,
    size=(5, 6),
    channels=(8,),
    out=20,
    taps=(3, 3),
    stride=(1, 1),
    dilation=(1, 1),
    packed=(False, False),
    ranges=("sample", "all"),
    layout="dense",
    bias=True,
    row=True,
    residual=True,
    requantize=None,
    sliced=False,
    dtype=torch.float32,
    seed=0,
):
    """Arguments of `cpu_conv`, by name, and those of `conv2d_reference` that compute the same.

    channels, packed, ranges: of each segment.  requantize: the ranges of the result.
    """
    generator = torch.Generator().manual_seed(seed)
    high, wide = (
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(size, taps, stride, dilation, strict=True)
    )
    counts = {"all": 1, "sample": batch, "row": batch * high * wide}
    whole = torch.randint(0, 256, (batch, *size, sum(channels)), generator=generator)
    parts = whole.to(torch.uint8).split(list(channels), 3)
    segments = len(channels)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    ours = {
        "xs": [part if sliced else part.contiguous() for part in parts],
        "weights": [],
        "zeros": [],
        "weight_scales": [table(out, "dense", generator) for _ in channels],
        "offsets": [
            torch.randint(-9999, 9999, (out,), generator=generator, dtype=torch.int32)
            for _ in channels
        ],
        "scales": [table(counts[r], layout, generator) for r in ranges[:segments]],
        "bias": torch.randn(out, generator=generator) if bias else None,
        "row": normal(batch, out) if row else None,
        "residual": normal(batch, high, wide, out) if residual else None,
        "out_scale": table(counts[requantize], layout, generator) * 50 if requantize else None,
        "out_zero": 100,
        "out_levels": 250,
        "out": out,
        "taps": list(taps),
        "stride": list(stride),
        "dilation": list(dilation),
        "dtype": dtype,
    }
    filters = []
    for count, four in zip(channels, packed, strict=False):
        shape = (out, *taps, count)
        if four:
            codes = torch.randint(0, 16, shape, generator=generator).to(torch.uint8)
            zero = torch.randint(0, 16, (out,), generator=generator).to(torch.uint8)
            ours["weights"].append(kernels.packed_panels(codes))
            ours["zeros"].append(torch.nn.functional.pad(zero, (0, -out % kernels.WIDE), value=7))
            filters.append(codes.to(torch.int8) - zero.to(torch.int8)[:, None, None, None])
        else:
            weight = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
            ours["weights"].append(kernels.panels(weight))
            ours["zeros"].append(torch.zeros(1, dtype=torch.uint8))
            filters.append(weight)
    theirs = {name: value for name, value in ours.items() if name not in ("out", "taps")}
    theirs |= {
        "xs": [(part.short() - STORED_ZERO).to(torch.int8) for part in parts],
        "weights": filters,
        "offsets": [
            offset + STORED_ZERO * weight.sum((1, 2, 3), dtype=torch.int32)
            for offset, weight in zip(ours["offsets"], filters, strict=True)
        ],
        "halves": [0] * segments,
        "dtype": torch.int8 if requantize else dtype,
        "tile": Tile(),
    }
    return ours, theirs


@st.composite
def convolutions(draw):
    """Settings of `conv_arguments`: every geometry, layout and epilogue, few channels."""
    taps = draw(st.sampled_from([(1, 1), (3, 3), (5, 3), (1, 2)]))
    dilation = draw(st.sampled_from([(1, 1), (2, 1), (1, 3)]))
    least = [d * (k - 1) + 1 for d, k in zip(dilation, taps, strict=True)]
    segments = draw(st.integers(1, 2))
    ranges = st.sampled_from(["all", "sample", "row"])
    return {
        "batch": draw(st.integers(1, 3)),
        "size": tuple(draw(st.integers(n, n + 6)) for n in least),
        "channels": tuple(4 * draw(st.integers(1, 12)) for _ in range(segments)),
        "out": draw(st.integers(1, 150)),
        "taps": taps,
        "stride": draw(st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 1)])),
        "dilation": dilation,
        "packed": (draw(st.booleans()), draw(st.booleans())),
        "ranges": (draw(ranges), draw(ranges)),
        "layout": draw(st.sampled_from(["dense", "column"])),
        "bias": draw(st.booleans()),
        "row": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "sliced": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "seed": draw(st.integers(0, 999)),
    }


def norm_arguments(
    *,
    batch=2,
    size=(5, 7),
    groups=4,
    width=3,
    affine=True,
    modulated=True,
    silu=True,
    pads=(1, 1, 1, 1),
    per_sample=True,
    layout="dense",
    runs=1,
    dtype=torch.float32,
    mean=0.5,
    deviation=2.0,
    seed=0,
):
    """Arguments of `cpu_norm` as a dict; with 0 groups `width` channels and no norm."""
    generator = torch.Generator().manual_seed(seed)
    channels = max(1, groups) * width

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    runs = min(runs, channels)
    cut = max(1, channels // 3) if runs == 2 else channels
    affine, modulated = affine and groups > 0, modulated and groups > 0
    scales = [torch.rand(batch if per_sample else 1, 2, generator=generator) for _ in range(runs)]
    scales = [(1 + scale[:, 1]) * 0.02 for scale in scales]
    if layout == "column":
        scales = [torch.stack([scale, scale + 1], 1)[:, 0] for scale in scales]
    return {
        "x": (normal(batch, *size, channels) * deviation + mean).to(dtype),
        "groups": groups,
        "weight": normal(channels) if affine else None,
        "bias": normal(channels) if affine else None,
        "eps": 1e-5,
        "factor": 1 + 0.1 * normal(batch, channels) if modulated else None,
        "shift": normal(batch, channels) if modulated else None,
        "silu": silu,
        "scales": scales,
        "zeros": [40, 90][:runs],
        "sizes": [cut, channels - cut][:runs],
        "levels": 250,
        "pads": list(pads),
    }


@st.composite
def norms(draw):
    """Settings of `norm_arguments`."""
    return {
        "batch": draw(st.integers(1, 3)),
        "size": (draw(st.integers(1, 20)), draw(st.integers(1, 20))),
        "groups": draw(st.sampled_from([0, 1, 2, 8])),
        "width": draw(st.integers(1, 40)),
        "affine": draw(st.booleans()),
        "modulated": draw(st.booleans()),
        "silu": draw(st.booleans()),
        "pads": draw(st.sampled_from([(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 2, 3)])),
        "per_sample": draw(st.booleans()),
        "layout": draw(st.sampled_from(["dense", "column"])),
        "runs": draw(st.integers(1, 2)),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "mean": draw(st.sampled_from([0.5, -30.0])),
        "seed": draw(st.integers(0, 99)),
    }
