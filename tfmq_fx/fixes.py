"""What one layer of a quantized model could be instead, as replacements of its modules.

None of them is guessed: a layer in floating point gets the reference's weight, carried over to the
rewritten input, and a layer quantized again the ranges of the reference's own inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from .affine import activation_scales
from .config import WeightSpec
from .nn import QuantLayer
from .requantized import emptied, with_weight
from .site_parts import Column, Leaf

SEARCH = 40  # candidates of each clipped weight range: down to 0.61 of it


Ranges = Mapping[str, Mapping[int, tuple[float, float]]]
"""Lowest and highest input of each leaf, by path, at some positions of the set of timesteps."""


@dataclass(frozen=True, slots=True)
class Fix:
    """A change of a graph.  modules: by path.  columns: new columns (K,) of its buffers."""

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    columns: Mapping[Column, Tensor] = field(default_factory=dict)

    def apply_(self, gm: fx.GraphModule) -> Fix:
        """Put the change into `gm`, whose tensors are left alone; the change that takes it back."""
        before = Fix(
            {path: gm.get_submodule(path) for path in self.modules},
            {(table, i): gm.get_buffer(table)[:, i] for table, i in self.columns},
        )
        for path, module in self.modules.items():
            gm.set_submodule(path, module)
        for (table, i), values in self.columns.items():
            changed = gm.get_buffer(table).clone()
            changed[:, i] = values
            setattr(gm, table, changed)
        return before


class FloatWeights(nn.Module):
    """A quantized layer that multiplies with a weight in floating point: (x, scale) -> y."""

    def __init__(self, layer: QuantLayer, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.layer, self.weight, self.bias = layer, weight, bias

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The layer's output on x (B, ...), in x's dtype."""
        x = self.layer.quantized_input(x, scale)
        return self.layer.apply_op(x, self.weight.to(x.dtype), self.bias)


class Unrounded(nn.Module):
    """In the place of a rounding of values that has no weights: (x, ...) -> x."""

    def forward(self, x: Tensor, *ignored: Tensor) -> Tensor:
        """x."""
        return x


def float_weights(leaves: Iterable[Leaf]) -> Fix:
    """Weights and bias as the reference has them."""
    return Fix(
        {
            leaf.path: FloatWeights(leaf.layer, leaf.weight, leaf.bias)
            for leaf in leaves
            if leaf.weight is not None
        }
    )


def float_inputs(leaves: Iterable[Leaf]) -> Fix:
    """The layer's integer weights on its input as it is."""
    return Fix({leaf.path: _with_input(leaf.layer) for leaf in leaves})


def float_layer(leaves: Iterable[Leaf], products: Iterable[str]) -> Fix:
    """Nothing rounded: neither weights nor input, nor the products of attention in front of it."""
    given = {
        leaf.path: FloatWeights(_with_input(leaf.layer), leaf.weight, leaf.bias)
        for leaf in leaves
        if leaf.weight is not None
    }
    return Fix(given | {path: Unrounded() for path in products})


def more_bits(leaves: Iterable[Leaf], bits: int) -> Fix:
    """Weights of the reference rounded to nearest at `bits`, one scale for each channel."""
    return Fix(
        {
            leaf.path: _with_weight(leaf, WeightSpec(bits=bits, search=SEARCH))
            for leaf in leaves
            if leaf.weight is not None
        }
    )


def requantized(
    leaves: Iterable[Leaf], ranges: Ranges, tables: Mapping[str, Tensor], *, search: int = SEARCH
) -> Fix:
    """The same bits again: weights of the reference to nearest, input ranges as seen.

    tables: buffers (K, columns) that scales are columns of.  search: candidates of each clipped
    weight range.  Timesteps that share a scale share a range; those that were not seen keep theirs.
    """
    modules, columns = dict[str, nn.Module](), dict[Column, Tensor]()
    for leaf in leaves:
        if leaf.weight is None:
            continue
        made = _with_weight(leaf, _spec_of(leaf.layer, leaf.weight, search))
        seen, bits = ranges[leaf.path], made.act_bits
        modules[leaf.path] = made
        if bits is None or made.dynamic or not seen:
            continue
        groups = [list(seen)]
        if made.per_timestep:
            if leaf.column is None:  # its scales cannot be replaced: they are its own still
                made.act_zero = leaf.layer.act_zero
                continue
            old = tables[leaf.column[0]][:, leaf.column[1]]
            groups = [[i for i in seen if old[i] == s] for s in old[list(seen)].unique()]
        low = torch.tensor(
            [min(seen[i][0] for i in group) for group in groups], dtype=torch.float32
        )
        high = torch.tensor(
            [max(seen[i][1] for i in group) for group in groups], dtype=torch.float32
        )
        scale, zero = activation_scales(low, high, bits=bits, format=made.act_format)
        made.set_static_range(float(scale.max()), zero)
        if made.per_timestep and leaf.column is not None:
            new = old.clone()
            for group, value in zip(groups, scale, strict=True):
                new[group] = value.to(new)
            columns[leaf.column] = new
    return Fix(modules, columns)


def with_layers(leaves: Iterable[Leaf], fix: Fix) -> list[Leaf]:
    """The leaves as they are with the layers of `fix`."""
    found = []
    for leaf in leaves:
        layer = fix.modules.get(leaf.path)
        found.append(replace(leaf, layer=layer) if isinstance(layer, QuantLayer) else leaf)
    return found


def _spec_of(layer: QuantLayer, weight: Tensor, search: int) -> WeightSpec:
    """How the weight of a layer is quantized, read off its buffers."""
    groups, bits = layer.weight_groups, layer.weight_bits
    middle = bool((layer.weight_zero == 2 ** (bits - 1)).all())
    return WeightSpec(
        bits=bits,
        symmetric=middle,
        search=search,
        group_size=weight.shape[1] // groups if groups > 1 else None,
        format=layer.weight_format,
    )


def _with_input(layer: QuantLayer) -> QuantLayer:
    made = emptied(layer, act_bits=None, act_format="int", per_timestep=False, dynamic=False)
    for name in ("codes", "weight_scale", "weight_zero"):
        setattr(made, name, getattr(layer, name))
    return made


def _with_weight(leaf: Leaf, spec: WeightSpec) -> QuantLayer:
    assert leaf.weight is not None
    return with_weight(leaf.layer, leaf.weight, leaf.bias, spec)
