"""A quantized layer with another weight: the same input ranges, other codes."""

from __future__ import annotations

from torch import Tensor

from .affine import weight_qparams
from .config import WeightSpec
from .nn import QuantLayer
from .rounding import round_nearest


def emptied(layer: QuantLayer, **changes: object) -> QuantLayer:
    """A layer like `layer` whose weight is still empty; changes: of the arguments that made it."""
    made = type(layer).from_spec({**layer.spec(), **changes}).to(layer.codes.device)
    made.bias, made.act_scale, made.act_zero = layer.bias, layer.act_scale, layer.act_zero
    return made


def with_weight(
    layer: QuantLayer, weight: Tensor, bias: Tensor | None, spec: WeightSpec
) -> QuantLayer:
    """A layer like `layer` with the codes of `weight` (out, ...) by `spec`, rounded to nearest,
    and `bias` (out,)."""
    grid = weight_qparams(weight, spec)
    groups = 1 if grid.scale.dim() == 1 else grid.scale.shape[1]
    made = emptied(layer, weight_bits=spec.bits, weight_groups=groups, weight_format=spec.format)
    codes = round_nearest(weight.float().flatten(1), grid)
    made.set_weight(codes.view(weight.shape), grid)
    made.bias = bias
    return made
