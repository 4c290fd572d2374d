"""Compute how far a convolution pads its input."""

from __future__ import annotations

from collections.abc import Sequence


def padding_widths(
    padding: Sequence[int] | str, kernel_size: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """The padding before and after each spatial dimension, for sizes, "same" or "valid"."""
    if not isinstance(padding, str):
        return [(n, n) for n in padding]
    total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    return [(n // 2, n - n // 2) if padding == "same" else (0, 0) for n in total]


def functional_widths(widths: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The widths in the order of torch.nn.functional.pad: last dimension first."""
    return tuple(width for pair in reversed(widths) for width in pair)
