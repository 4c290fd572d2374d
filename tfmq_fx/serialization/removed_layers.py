"""Put placeholders where a table replaced layers, so that their attributes can still be read."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from tfmq_fx.core.errors import ArtifactError

from .module_json import install_modules, module_json


class Removed(nn.Module):
    """Placeholder for a layer that a table replaced. It has the layer's attributes (`in_features`,
    `weight` on the meta device), holds no tensor of the model and cannot be called."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple it is no submodule

    def __getattr__(self, name: str) -> Any:
        (layer,) = self.__dict__["_layer"]
        return getattr(layer, name)

    def extra_repr(self) -> str:
        return str(self._layer[0])


def removed_layers(before: fx.GraphModule, after: fx.GraphModule) -> dict[str, Any]:
    """Return how to build each layer that `before` calls and `after` does not, by path, as JSON.

    Layers that cannot be described are left out.
    """
    old, new = ({n.target for n in gm.graph.find_nodes(op="call_module")} for gm in (before, after))
    layers: dict[str, Any] = {}
    for path in sorted(str(target) for target in old - new):
        with contextlib.suppress(ArtifactError):
            layers[path] = module_json(before.get_submodule(path), path)
    return layers


def install_removed(gm: fx.GraphModule, table: Mapping[str, Any]) -> None:
    """Put a `Removed` in the place of each layer of `table`, which `removed_layers` returned."""
    layers = nn.Module()
    install_modules(layers, dict(table))
    for path in table:
        gm.add_submodule(path, Removed(layers.get_submodule(path)))
