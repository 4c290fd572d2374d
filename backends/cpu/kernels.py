"""Define the kernels of `kernels.cpp` as torch operators, compiled for this machine at first
use."""

from __future__ import annotations

import functools
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfmq_fx.core.errors import BackendError

from . import library

WIDE = 64  # outputs of a panel of weights
DTYPES = (torch.float32, torch.bfloat16)  # that the kernels read and write
_FLAGS = ("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16")
_SCHEMAS = {
    "cpu_conv": "(Tensor[] xs, Tensor[] weights, Tensor[] zeros, Tensor[] weight_scales, "
    "Tensor[] offsets, Tensor[] scales, Tensor? bias, Tensor? row, Tensor? residual, "
    "Tensor? out_scale, int out_zero, int out_levels, SymInt out, int[] taps, int[] stride, "
    "int[] dilation, ScalarType dtype, str activation='none') -> Tensor",
    "cpu_norm": "(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, Tensor? factor, "
    "Tensor? shift, bool silu, Tensor[] scales, int[] zeros, int[] sizes, int levels, int[] pads, "
    "Tensor? more=None) -> Tensor",
    "cpu_attention": "(Tensor q, Tensor k, Tensor v, float scale) -> Tensor",
    "cpu_nan_count": "() -> int",
}
_LIBRARY = torch.library.Library("tfmq_fx", "FRAGMENT")
_PLAIN = torch.library.Library("tfmq_fx_plain", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    _PLAIN.define(_name + _schema)
cpu_conv = torch.ops.tfmq_fx.cpu_conv.default
"""The sums of up to two convolutions on codes in uint8, with `codes.arithmetic.finish` after them.

weights: one of `panels` for each segment.  zeros: (O padded to 64,) uint8, of packed weights.
out: channels O of the result.  taps: height and width of the filters.
activation: of the sums, before they are written: "none", "silu", "gelu", "gelu_tanh".
"""
cpu_norm = torch.ops.tfmq_fx.cpu_norm.default
"""The codes in uint8 of silu(group_norm(x) * factor + shift), x (B, H, W, C); with 0 groups of x.
more: (B, H, W, C'), channels that follow those of x, as if both were concatenated."""
cpu_attention = torch.ops.tfmq_fx.cpu_attention.default
"""softmax(q k^T scale) v for q (B, H, L, D), k, v (B, H, K, D): (B, H, L, D), heads innermost but
for channels. Products are of bfloat16, summed in float32, so are scores and their softmax."""
cpu_nan_count = torch.ops.tfmq_fx.cpu_nan_count.default
"""How many calls of these by this thread have met a NaN, of which they made code 0."""


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot run on this machine, or None where they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"integer kernels need Linux on x86-64, this is {sys.platform} {platform.machine()}"
    if limit := limited():
        return f"integer kernels need AVX-512, and ATEN_CPU_CAPABILITY={limit} forbids it"
    try:
        flags = set(processor().split())
    except OSError as error:
        return f"what the processor can do is not known: {error}"
    if missing := [flag for flag in _FLAGS if flag not in flags]:
        return f"integer kernels need {', '.join(missing)}, which the processor lacks"
    return None


def limited() -> str | None:
    """The value of ATEN_CPU_CAPABILITY, which limits torch's instructions, where it forbids
    AVX-512; else None."""
    limit = os.environ.get("ATEN_CPU_CAPABILITY", "")
    return limit if limit in ("default", "avx2") else None


def processor() -> str:
    """The name of the processor and its flags. Raises OSError where Linux does not report them."""
    if sys.platform != "linux":
        return f"{platform.machine()} {platform.processor()}"
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return f"{facts.get('model name')} {facts.get('flags')}"


@functools.cache
def load() -> None:
    """Compile the kernels, if that has not been done here, and register them with torch.

    Raises BackendError with what the compiler says where it fails.
    """
    if reason := unavailable():
        raise BackendError(reason)
    library.load(library.NATIVE, processor())


@functools.cache
def load_plain() -> None:
    """Compile the same kernels in plain C++ and register them as `torch.ops.tfmq_fx_plain`.

    They run on any x86-64 processor and are slow: for checking the ones that are used.
    """
    library.load(library.PLAIN, platform.machine())


def panels(weight: Tensor) -> Tensor:
    """int8 weights (O, R, S, C) as the kernels read them: (O / 64, R * S, C / 4, 64, 4), missing
    outputs filled with zeros. C must be a multiple of 4."""
    out, high, wide, channels = weight.shape
    filled = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, -out % WIDE))
    runs = filled.view(-1, WIDE, high * wide, channels // 4, 4)
    return runs.permute(0, 2, 3, 1, 4).contiguous()


def packed_panels(codes: Tensor) -> Tensor:
    """4-bit codes (O, R, S, C), uint8, as the kernels read them: (O / 64, R * S, C / 4, 128), the
    later half of the 256 codes in the high bits."""
    halves = panels(codes).flatten(3).unflatten(3, (2, 128))
    packed: Tensor = halves[..., 0, :] | (halves[..., 1, :] << 4)
    return packed


def _fake_conv(xs: Sequence[Tensor], *settings: Any) -> Tensor:
    """The shape of `cpu_conv`'s result; settings: its arguments in the order of `_SCHEMAS`."""
    out_scale, _, _, out, taps, stride, dilation, dtype = settings[8:16]
    x = xs[0]
    high, wide = (
        (x.shape[i + 1] - dilation[i] * (taps[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    result = torch.uint8 if out_scale is not None else dtype
    return x.new_empty((x.shape[0], high, wide, out), dtype=result)


def _fake_norm(x: Tensor, *settings: Any) -> Tensor:
    """The shape of `cpu_norm`'s result; settings: its arguments in the order of `_SCHEMAS`."""
    sizes, _, (left, right, top, bottom) = settings[9:12]
    batch, height, width, _ = x.shape
    shape = (batch, top + height + bottom, left + width + right, sum(sizes))
    return x.new_empty(shape, dtype=torch.uint8)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    batch, heads, queries, _ = q.shape
    return q.new_empty((batch, queries, heads, v.shape[3])).permute(0, 2, 1, 3)


torch.library.register_fake("tfmq_fx::cpu_conv", _fake_conv, lib=_LIBRARY)
torch.library.register_fake("tfmq_fx::cpu_norm", _fake_norm, lib=_LIBRARY)
torch.library.register_fake("tfmq_fx::cpu_attention", _fake_attention, lib=_LIBRARY)


def fast_dtype() -> torch.dtype:
    """The dtype in which the processor multiplies floats fastest."""
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported() and not limited()
    return torch.bfloat16 if fast else torch.float32
