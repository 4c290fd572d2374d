"""Run a 16-bit low-rank branch beside a layer, and compute its factors (SVDQuant)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfmq_fx.core.padding import functional_widths, padding_widths

from .base import FixedDtypeModule, plain_spec

_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_CONVOLUTION_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
_STORED = (torch.float16, torch.bfloat16)


def low_rank_factors(weight: Tensor, importance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors down (rank, in, ...) and up (out, rank), float64, whose product approximates
    `weight`.

    weight: (out, in, ...).  importance: (in,), >= 0, the root mean square of each input channel.
    up @ down is the rank-`rank` matrix L that minimises |(W - L) diag(s)|: the truncated SVD of
    W diag(s), times diag(1 / s).  It is computed as U U^T W, U being the leading left singular
    vectors, so that a channel of importance 0 divides nothing.  Each component is balanced between
    the two factors by a power of two.
    """
    w = weight.double()
    s = importance.double() if bool(importance.any()) else torch.ones_like(importance).double()
    # The scale of s changes nothing, and squares must not overflow.
    scaled = (w * (s / s.max()).view(-1, *[1] * (w.dim() - 2))).flatten(1)
    w, (out, width) = w.flatten(1), scaled.shape
    if out <= width:
        u = torch.linalg.eigh(scaled @ scaled.T).eigenvectors[:, -rank:]
    else:  # the smaller Gram matrix, whose eigenvectors scaled @ v leads back
        v = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -rank:]
        u = torch.linalg.qr(scaled @ v).Q
    down = u.T @ w
    ratio = down.abs().amax(1) / u.abs().amax(0)
    balance = torch.where(ratio > 0, ratio, 1.0).log2().div(2).round().exp2()
    return (down / balance[:, None]).view(rank, *weight.shape[1:]), u * balance


class LowRank(FixedDtypeModule):
    """Compute up(down(x)) without bias: (B, ..., in) -> (B, ..., out), or convolve (B, in, ...).

    `down` (rank, in, *kernel) is a layer like the one it stands beside, `up` (out, rank) mixes the
    channels of its result.  Both are frozen parameters of 16 bits: float16 unless the model itself
    is in bfloat16.  float16 has three bits more, which the layer beside would have to make up for;
    its range is enough for factors that are balanced.  They keep that dtype whatever the model is
    cast to, as the layer beside holds what their rounding left; the forward runs in x's dtype.
    """

    def __init__(
        self,
        *,
        rank: int,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int] = (),
        stride: Sequence[int] = (),
        padding: Sequence[int] | str = (),
        dilation: Sequence[int] = (),
        padding_mode: str = "zeros",
        dtype: torch.dtype = torch.float16,
    ) -> None:
        """Create a linear layer for kernel_size (), a convolution for 1 to 3 sizes."""
        super().__init__()
        self.kernel_size, self.stride = tuple(kernel_size), tuple(stride)
        self.padding = padding if isinstance(padding, str) else tuple(padding)
        self.dilation, self.padding_mode = tuple(dilation), padding_mode
        shapes = (rank, in_channels, *self.kernel_size), (out_channels, rank)
        self.down, self.up = (
            nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False) for shape in shapes
        )

    @classmethod
    def from_layer(cls, layer: Any, down: Tensor, up: Tensor) -> Self:
        """Create the branch beside `layer` from its factors, rounded to 16 bits."""
        dtype = layer.weight.dtype if layer.weight.dtype in _STORED else torch.float16
        settings: dict[str, Any] = {}
        if not isinstance(layer, nn.Linear):
            settings = {name: getattr(layer, name) for name in _CONVOLUTION_SETTINGS}
        branch = cls(
            rank=len(down),
            in_channels=down.shape[1],
            out_channels=len(up),
            **settings,
            dtype=dtype,
        ).to(down.device)
        branch.down.data, branch.up.data = down.to(dtype).contiguous(), up.to(dtype).contiguous()
        return branch.train(layer.training)

    def product(self) -> Tensor:
        """The weight of up and down combined: (out, in, *kernel), float64."""
        product = self.up.double() @ self.down.double().flatten(1)
        return product.view(-1, *self.down.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """The branch's output on x, in x's dtype."""
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if not self.kernel_size:
            return F.linear(F.linear(x, down), up)
        convolution = _CONVOLUTIONS[len(self.kernel_size) - 1]
        padding = self.padding
        if self.padding_mode != "zeros":
            widths = padding_widths(self.padding, self.kernel_size, self.dilation)
            x, padding = F.pad(x, functional_widths(widths), mode=self.padding_mode), "valid"
        h = convolution(x, down, None, self.stride, padding, self.dilation)
        return convolution(h, up.view(*up.shape, *[1] * len(self.kernel_size)))

    def spec(self) -> dict[str, Any]:
        """The constructor arguments, JSON-ready, for `from_spec`, which leaves the factors 0."""
        return {
            "rank": len(self.down),
            "in_channels": self.down.shape[1],
            "out_channels": len(self.up),
            **plain_spec(self, *_CONVOLUTION_SETTINGS),
            "dtype": str(self.down.dtype).removeprefix("torch."),
        }

    def extra_repr(self) -> str:
        kernel = f", kernel {'x'.join(map(str, self.kernel_size))}" if self.kernel_size else ""
        return f"{self.down.shape[1]} -> {len(self.down)} -> {len(self.up)}{kernel}"
