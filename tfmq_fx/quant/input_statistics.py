"""Statistics of a layer's inputs over calibration: Gram matrices and means, from sampled rows.

A row is what one output position of the layer reads: the features of a linear layer, or the patch
under a convolution's kernel, in the order of the flattened weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .modules import QuantConv
from .quant_layer import QuantLayer


def input_rows(layer: QuantLayer, x: Tensor, picks: Tensor | None = None) -> Tensor:
    """Rows (groups, n, in) of an input x of `layer`.

    picks: (n,) indices of the rows wanted, of the batch times the output positions; all by default.
    """
    if not isinstance(layer, QuantConv):
        rows = x.reshape(-1, x.shape[-1])
        return (rows if picks is None else rows[picks])[None]
    kernel = layer.weight_shape[2:]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, [width for pair in reversed(layer.borders()) for width in pair], mode=mode)
    for i, (size, stride, dilation) in enumerate(
        zip(kernel, layer.stride, layer.dilation, strict=True)
    ):
        x = x.unfold(2 + i, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # x: (B, C, *positions, *kernel) -> (B * positions, C, *kernel)
    spatial = len(kernel)
    x = x.permute(0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
    lead = x.shape[: 1 + spatial]
    if picks is None:
        x = x.reshape(-1, *x.shape[1 + spatial :])
    else:
        x = x[torch.unravel_index(picks.to(x.device), lead)]
    return x.reshape(len(x), layer.groups, -1).transpose(0, 1)


def row_count(layer: QuantLayer, x: Tensor) -> int:
    """How many rows `input_rows` finds in x."""
    if not isinstance(layer, QuantConv):
        return x[..., 0].numel()
    count = x.shape[0]
    for i, (before, after) in enumerate(layer.borders()):
        reach = layer.dilation[i] * (layer.weight_shape[2 + i] - 1) + 1
        count *= (x.shape[2 + i] + before + after - reach) // layer.stride[i] + 1
    return count


@dataclass(slots=True)
class InputStatistics:
    """Sums over rows q of the inputs of one layer, as it sees them, and f, as full precision has
    them, each row times its weight (1 by default).

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
        """Statistics of no rows, for a layer of `weight`."""
        groups, _, width = weight.shape
        flat = torch.zeros(groups, width, dtype=torch.float64, device=weight.device)
        square = flat.new_zeros(groups, width, width)
        return cls(weight.float(), square, flat.new_zeros(weight.shape), flat, flat.clone())

    def add(self, quantized: Tensor, full: Tensor, weights: Tensor | None = None) -> None:
        """Add rows (groups, n, in) of both models; weights: (n,) of each row."""
        self.add_sums(self.sums(quantized, full, weights))

    def sums(self, quantized: Tensor, full: Tensor, weights: Tensor | None = None) -> Iterator[Any]:
        """What such rows add to `gram`, `gap`, `sum_q`, `sum_f` and `rows`, in turn."""
        q, f = quantized.float(), full.float()
        seen = q if weights is None else q * weights[:, None]
        yield _product(seen.mT, q)
        yield _product(((f - q) @ self.weight.mT).mT, seen)
        yield seen.sum(1, dtype=torch.float64)
        f = f if weights is None else f * weights[:, None]
        yield f.sum(1, dtype=torch.float64)
        yield q.shape[1] if weights is None else float(weights.double().sum())

    def add_sums(self, sums: Iterator[Any]) -> None:
        """Add what `sums` gave, here or in another process; one of them is in memory at a time."""
        for total in (self.gram, self.gap, self.sum_q, self.sum_f):
            total += next(sums)
        self.rows += next(sums)

    def center_(self) -> None:
        """Take the sums about the means: what is left for weights where a bias takes up the mean.

        `sum_q` and `sum_f` stay as they are.
        """
        mean = (self.sum_q / self.rows)[:, None, :]
        self.gram.baddbmm_(self.sum_q[:, :, None], mean, alpha=-1)
        lacking = self.weight.double() @ (self.sum_f - self.sum_q)[:, :, None]
        self.gap.baddbmm_(lacking, mean, alpha=-1)

    def aligned_weight(self, damping: float) -> Tensor:
        """The weight (groups, out, in) that best gives W f from q: the What that minimises
        sum |What q - W f|^2 + damping mean(diag gram) |What - W|^2, in closed form.

        Raises torch.linalg.LinAlgError where the damped Gram matrix is not positive definite.
        """
        changes = []
        for gram, gap in zip(self.gram, self.gap, strict=True):
            diagonal, given = gram.diagonal(), gram.diagonal().clone()
            mean = float(given.mean())
            # in place, and back: a Gram matrix is the largest thing there is
            diagonal += max(damping, 1e-8) * mean if mean > 0 else 1.0
            try:
                factor = torch.linalg.cholesky(gram)
            finally:
                diagonal.copy_(given)
            changes.append(torch.cholesky_solve(gap.T, factor).T.to(self.weight))
        return self.weight + torch.stack(changes)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, or in float64 where that overflows."""
    found = a @ b
    return found if bool(torch.isfinite(found).all()) else a.double() @ b.double()
