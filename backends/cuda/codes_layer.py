"""Run layers on codes on CUDA by a Triton kernel, or by torch's own matrix product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tfmq_fx.backends.codes.arithmetic import finish, pack_weight, row_scales
from tfmq_fx.backends.codes.layers import CodesLayer, Epilogue
from tfmq_fx.quant.affine import FP8

from .conv import conv2d


class CudaCodesLayer(CodesLayer):
    """A layer on codes in int8 or fp8 for `conv2d`, 4-bit weights packed two to a byte."""

    def stored_weight(self, codes: Tensor, zero: Tensor) -> Tensor:
        """The weights as `conv2d` reads them: of 4 bits in uint8, packed by `pack_weight`."""
        if not self.problem.half:
            return codes
        unsigned = codes.to(torch.int16) + zero.to(torch.int16)[:, None, None, None]
        return pack_weight(unsigned, self.problem.half)

    @property
    def takes_second_segment(self) -> bool:
        """Whether its kernel adds the sum of another layer: not where programs share a sum, and not
        in torch's product."""
        return self.choice.engine == "triton" and self.choice.tile.split == 1

    def run(
        self,
        layers: Sequence[CodesLayer],
        codes: list[Tensor],
        scales: list[Tensor],
        epilogue: Epilogue,
    ) -> Tensor:
        """As `CodesLayer.run`, by one Triton kernel, or a product of torch for each layer."""
        added = (self.bias, *epilogue)
        result = (self.out_zero, self.out_levels)
        if all(layer.choice.engine == "torch" for layer in layers):
            sums = [_product(*each) for each in zip(layers, codes, scales, strict=True)]
            return finish(sum(sums[1:], sums[0]), *added, *result, self.out_dtype)
        y: Tensor = conv2d(
            codes,
            [layer.weight for layer in layers],
            [layer.zero for layer in layers],
            [layer.weight_scale for layer in layers],
            [layer.offset for layer in layers],
            scales,
            *added,
            *result,
            list(self.problem.stride),
            list(self.problem.dilation),
            [layer.problem.half for layer in layers],
            self.out_dtype,
            list(self.choice.tile),
        )
        return y


def _product(layer: CodesLayer, codes: Tensor, scale: Tensor) -> Tensor:
    """The sums of a layer in units of its output, (B, 1, T, O) float32, by torch's own kernels."""
    shape = (*codes.shape[:3], layer.weight.shape[0])
    rows, weight = codes.reshape(-1, codes.shape[3]), layer.weight.flatten(1)
    units = row_scales(scale, codes)
    if layer.codes_dtype == FP8:
        y = torch._scaled_mm(
            rows,
            weight.t(),
            scale_a=units.reshape(-1, 1),
            scale_b=layer.weight_scale.unsqueeze(0),
            out_dtype=torch.bfloat16,
        )
        return y.view(shape).float()
    sums = torch._int_mm(rows, weight.t()).view(shape) + layer.offset
    return sums.float() * (units * layer.weight_scale)
