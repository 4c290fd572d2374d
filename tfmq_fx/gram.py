"""Statistics of a layer's inputs over calibration: Gram matrices and means, from sampled rows.

A row is what one output position of the layer reads: the features of a linear layer, or the patch
under a convolution's kernel, in the order of the flattened weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .nn import QuantConv, QuantLayer


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
    """Sums over rows of the inputs of one layer, as it sees them and as full precision has them.

    gram: (groups, in, in) sum of q q^T; cross: (groups, in, in) sum of f q^T; mean_q, mean_f:
    (groups, in) sums of q and of f; all float64.  rows: how many rows.
    """

    gram: Tensor
    cross: Tensor
    sum_q: Tensor
    sum_f: Tensor
    rows: int = 0

    @classmethod
    def empty(cls, groups: int, width: int, device: torch.device) -> InputStatistics:
        """Statistics of no rows."""
        square = torch.zeros(groups, width, width, dtype=torch.float64, device=device)
        flat = torch.zeros(groups, width, dtype=torch.float64, device=device)
        return cls(square, square.clone(), flat, flat.clone())

    def add(self, quantized: Tensor, full: Tensor) -> None:
        """Add rows (groups, n, in) of both models."""
        q, f = quantized.float(), full.float()
        self.gram += (q.mT @ q).double()
        self.cross += (f.mT @ q).double()
        self.sum_q += q.double().sum(1)
        self.sum_f += f.double().sum(1)
        self.rows += q.shape[1]

    def centered(self) -> InputStatistics:
        """The same about the means: what is left for weights when a bias takes up the mean."""
        mean_q = self.sum_q / self.rows
        gram = self.gram - self.rows * mean_q[:, :, None] * mean_q[:, None, :]
        cross = self.cross - self.sum_f[:, :, None] * mean_q[:, None, :]
        return InputStatistics(gram, cross, self.sum_q, self.sum_f, self.rows)
