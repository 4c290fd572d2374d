"""Compute temporal features from the model that a graph was made from, as folding computes them."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from tfmq_fx.core.config import Config
from tfmq_fx.ir.graph import timestep_node
from tfmq_fx.ir.subgraphs import compute_rows
from tfmq_fx.ir.temporal_block import temporal_block
from tfmq_fx.passes.merge_duplicates import merge_duplicates
from tfmq_fx.quant.timestep_lookup import check_timesteps
from tfmq_fx.serialization.provenance import Provenance

from .exposed_layers import with_layers


class FeatureRows:
    """The temporal block of `source`, with its weights, and nothing else of the model.

    recipe: of the conversion, which decides what products with weights became layers.

    Raises ConfigError, naming what differs, where `source` is not the model of `origin`.
    """

    def __init__(self, origin: Provenance, recipe: Config, source: nn.Module) -> None:
        merged = merge_duplicates(origin.captured(source)).gm
        gm = with_layers(merged, recipe, origin.overrides).gm
        block = temporal_block(gm)
        self._graph = block.graph
        self._names = [feature.name for feature in block.features]
        self._dtype = timestep_node(gm).meta["val"].dtype

    def at(self, timesteps: Tensor, features: Container[object]) -> dict[str, Tensor]:
        """The rows (K, ...) of those of `features` that the block has, at `timesteps` (K,), sorted.

        Raises ConfigError for timesteps that cannot be used.
        """
        keys = check_timesteps(timesteps, self._dtype)
        device = timestep_node(self._graph).meta["val"].device.type
        with torch.autocast(device, enabled=False):
            rows = compute_rows(self._graph, keys)
        named = zip(self._names, rows, strict=True)
        return {name: row for name, row in named if name in features}
