"""Accumulate statistics of a layer's inputs: Gram matrices and sums over sampled rows.

A row is the input of one output position of the layer: the features of a linear layer, or the patch
under a convolution's kernel, in the order of the flattened weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .modules import QuantConv, QuantConvTranspose
from .quant_layer import QuantLayer


def input_rows(layer: QuantLayer, x: Tensor, picks: Tensor | None = None) -> Tensor:
    """The rows (groups, n, in) of an input x of `layer`.

    picks: (n,) indices into the batch times the output positions; all rows by default.
    """
    if not isinstance(layer, QuantConv):
        rows = x.reshape(-1, x.shape[-1])
        return (rows if picks is None else rows[picks])[None]
    kernel, strides = layer.weight_shape[2:], layer.stride
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    transposed = isinstance(layer, QuantConvTranspose)
    if transposed:  # a convolution of x with gaps, by the flipped kernel
        x, strides = _with_gaps(x, strides), (1,) * len(strides)
    x = F.pad(x, layer.pad_widths, mode=mode)
    for i, (size, stride, dilation) in enumerate(zip(kernel, strides, layer.dilation, strict=True)):
        x = x.unfold(2 + i, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # x: (B, C, *positions, *kernel) -> (B * positions, C, *kernel)
    spatial = len(kernel)
    if transposed:
        x = x.flip(tuple(range(2 + spatial, 2 + 2 * spatial)))
    x = x.permute(0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
    lead = x.shape[: 1 + spatial]
    if picks is None:
        x = x.reshape(-1, *x.shape[1 + spatial :])
    else:
        x = x[torch.unravel_index(picks.to(x.device), lead)]
    return x.reshape(len(x), layer.groups, -1).transpose(0, 1)


def _with_gaps(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x (B, C, *positions) with stride - 1 zeros between the positions of each dimension."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    spread[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = x
    return spread


def row_count(layer: QuantLayer, x: Tensor) -> int:
    """The number of rows that `input_rows` returns for x."""
    weight = torch.empty(layer.weight_shape, device="meta")
    outputs = layer.apply_op(torch.empty(x.shape, device="meta"), weight, None)
    return outputs.numel() // layer.weight_shape[0]


@dataclass(slots=True)
class InputStatistics:
    """Weighted sums over the input rows of one layer: q in the quantized model, f in the
    full-precision one.

    weight: (groups, out, in) float, W of the full-precision layer.  gram: (groups, in, in), sum of
    q q^T.  gap: (groups, out, in), sum of W (f - q) q^T.  sum_q, sum_f: (groups, in).  rows: the
    sum of the weights.  All sums are float64; products of one call's rows are float32.
    """

    weight: Tensor
    gram: Tensor
    gap: Tensor
    sum_q: Tensor
    sum_f: Tensor
    rows: float = 0.0

    @classmethod
    def empty(cls, weight: Tensor) -> InputStatistics:
        """Statistics of no rows, for a layer with this weight."""
        groups, _, width = weight.shape
        flat = torch.zeros(groups, width, dtype=torch.float64, device=weight.device)
        square = flat.new_zeros(groups, width, width)
        return cls(weight.float(), square, flat.new_zeros(weight.shape), flat, flat.clone())

    def sums(self, quantized: Tensor, full: Tensor, weights: Tensor | None = None) -> Iterator[Any]:
        """The contributions of rows (groups, n, in) of both models to `gram`, `gap`, `sum_q`,
        `sum_f` and `rows`, in turn; weights: (n,), one for each row."""
        q, f = quantized.float(), full.float()
        seen = q if weights is None else q * weights[:, None]
        yield _product(seen.mT, q)
        yield _product(((f - q) @ self.weight.mT).mT, seen)
        yield seen.sum(1, dtype=torch.float64)
        f = f if weights is None else f * weights[:, None]
        yield f.sum(1, dtype=torch.float64)
        yield q.shape[1] if weights is None else float(weights.double().sum())

    def add_sums(self, sums: Iterator[Any]) -> None:
        """Add contributions from `sums`, of this process or another; one is in memory at a time."""
        for total in (self.gram, self.gap, self.sum_q, self.sum_f):
            total += next(sums)
        self.rows += next(sums)

    def center_(self) -> None:
        """Centre `gram` and `gap` on the means, for a layer whose bias corrects the mean error.

        `sum_q` and `sum_f` stay as they are.
        """
        mean = (self.sum_q / self.rows)[:, None, :]
        self.gram.baddbmm_(self.sum_q[:, :, None], mean, alpha=-1)
        lacking = self.weight.double() @ (self.sum_f - self.sum_q)[:, :, None]
        self.gap.baddbmm_(lacking, mean, alpha=-1)

    def aligned_weight(self, damping: float) -> Tensor:
        """The weight (groups, out, in) that reproduces W f best from q: the What that minimises
        sum |What q - W f|^2 + damping mean(diag gram) |What - W|^2, in closed form.

        Raises torch.linalg.LinAlgError where the damped Gram matrix is not positive definite.
        """
        changes = []
        for gram, gap in zip(self.gram, self.gap, strict=True):
            diagonal, undamped = gram.diagonal(), gram.diagonal().clone()
            mean = float(undamped.mean())
            # in place, and back: a copy of a Gram matrix may not fit into memory
            diagonal += max(damping, 1e-8) * mean if mean > 0 else 1.0
            try:
                factor = torch.linalg.cholesky(gram)
            finally:
                diagonal.copy_(undamped)
            changes.append(torch.cholesky_solve(gap.T, factor).T.to(self.weight))
        return self.weight + torch.stack(changes)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, or in float64 where that overflows."""
    product = a @ b
    return product if bool(torch.isfinite(product).all()) else a.double() @ b.double()
