"""Find opaque modules, which a graph calls as the model's own code, and the layers inside them.

No pass sees what an opaque module computes from its inputs. Its layers can be quantized all the
same, each on its own: with input ranges measured at every call, for no timestep is known there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.quant.quant_layer import QuantLayer

from .graph import opaque_modules
from .graph_pass import Declined
from .node_info import size_hint
from .sites import Site, why_not


def inner_sites(gm: fx.GraphModule) -> tuple[list[Site], list[Declined]]:
    """The convolution and linear layers inside opaque modules, quantized ones included, and those
    that cannot be quantized, with the reason. No node calls them."""
    sites, declined = [], []
    for path, layer in _inner_layers(gm):
        if isinstance(layer, QuantLayer) or (reason := why_not(layer, None)) is None:
            sites.append(Site(path, layer, ()))
        else:
            declined.append(Declined(path, reason))
    return sites, declined


def _inner_layers(gm: fx.GraphModule) -> Iterator[tuple[str, nn.Module]]:
    kinds = (QuantLayer, nn.Linear, nn.modules.conv._ConvNd)
    for path, module in opaque_modules(gm).items():
        for name, part in module.named_modules():
            if isinstance(part, kinds):
                yield f"{path}.{name}".removesuffix("."), part


def measured_at_calls(config: LayerConfig) -> LayerConfig:
    """The configuration with input ranges that are measured at every call."""
    if config.calibrated is None:
        return config
    acts = dataclasses.replace(
        config.calibrated, dynamic=True, per_timestep=False, timestep_groups=None, ranges="minmax"
    )
    return dataclasses.replace(config, activations=acts)


def example_arguments(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for a call like `node`, at the sizes of the capture, with random floats."""

    def example(used: fx.Node) -> Any:
        value = used.meta["val"]
        if not isinstance(value, Tensor):
            return size_hint(value)
        sizes = [size_hint(size) for size in value.shape]
        generator = torch.Generator().manual_seed(0)
        if value.is_floating_point():
            made = torch.randn(sizes, dtype=torch.float32, generator=generator)
        else:
            made = torch.full(sizes, value.dtype == torch.bool)
        return made.to(device=value.device, dtype=value.dtype)

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), example)
    return tuple(args), dict(kwargs)
