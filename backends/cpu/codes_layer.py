"""Run layers on codes by the CPU kernels of this package."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tfmq_fx.backends.codes.choice import Choice
from tfmq_fx.backends.codes.layers import CodesLayer, Epilogue

from . import kernels


class CpuCodesLayer(CodesLayer):
    """A layer on codes in uint8 for `kernels.cpu_conv`, its weights in panels after `to_panels`.

    activation: of the sums before they are written: "none", "silu", "gelu" or "gelu_tanh".
    """

    integer_dtype = torch.uint8
    activation = "none"

    @classmethod
    def with_own_engine(cls, choice: Choice) -> Choice:
        """The choice with the engine "cpu", the only one for these layers."""
        return dataclasses.replace(choice, engine="cpu")

    def to_panels(self) -> None:
        """Reorder the weights for the kernel, after all fusions."""
        if self.problem.half:
            codes = self.weight.to(torch.int16) + self.zero.to(torch.int16)[:, None, None, None]
            self.weight = kernels.packed_panels(codes.to(torch.uint8))
            self.zero = F.pad(self.zero, (0, -len(self.zero) % kernels.WIDE))
        else:
            self.weight = kernels.panels(self.weight)
        self.bias = None if self.bias is None else self.bias.float()

    def run(
        self,
        layers: Sequence[CodesLayer],
        codes: list[Tensor],
        scales: list[Tensor],
        epilogue: Epilogue,
    ) -> Tensor:
        """As `CodesLayer.run`, by one call of `kernels.cpu_conv`."""
        row, residual, out_scale = epilogue
        y: Tensor = kernels.cpu_conv(
            codes,
            [layer.weight for layer in layers],
            [layer.zero for layer in layers],
            [layer.weight_scale for layer in layers],
            [layer.offset for layer in layers],
            scales,
            self.bias,
            None if row is None else row.to(self.dtype),
            None if residual is None else residual.to(self.dtype),
            out_scale,
            self.out_zero,
            self.out_levels,
            len(self.weight_scale),
            list(self.problem.taps),
            list(self.problem.stride),
            list(self.problem.dilation),
            self.dtype,
            self.activation,
        )
        return y
