"""Give a captured graph a layer for each product with weights, so that recipes can quantize it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from tfmq_fx.core.config import Config
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.ir.graph_pass import Rewrite
from tfmq_fx.passes.expose_projections import expose_projections
from tfmq_fx.passes.fold_weights import fold_weights


def with_layers(
    merged: fx.GraphModule, recipe: Config, overrides: Mapping[str, LayerConfig]
) -> Rewrite:
    """The graph with a layer for each product with weights that can have one.

    Where nothing is quantized, outputs stay the same bit for bit; else up to the order of float
    additions.
    """
    layers = (recipe.layers, recipe.first, recipe.last, *overrides.values())
    if all(layer is None or layer.weights is None for layer in layers):
        return fold_weights(merged)
    return fold_weights(expose_projections(merged).gm)
