"""Placeholders for layers that a table replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from .module_json import install_modules, module_json


class Removed(nn.Module):
    """Stands where a look-up replaced a layer: answers what the layer was (`in_features`, `weight`
    on the meta device), holds no tensor of the model and cannot be called."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple it is no submodule

    def __getattr__(self, name: str) -> Any:
        (layer,) = self.__dict__["_layer"]
        return getattr(layer, name)

    def extra_repr(self) -> str:
        return str(self._layer[0])


def removed_layers(before: fx.GraphModule, after: fx.GraphModule) -> dict[str, Any]:
    """How to build each layer that `before` calls and `after` does not, by path; JSON-ready."""
    old, new = ({n.target for n in gm.graph.find_nodes(op="call_module")} for gm in (before, after))
    paths = sorted(str(target) for target in old - new)
    found = {path: module_json(before.get_submodule(path), path) for path in paths}
    return {path: entry for path, entry in found.items() if entry is not None}


def install_removed(gm: fx.GraphModule, table: Mapping[str, Any]) -> None:
    """Put a `Removed` in the place of each layer of `table`, which `removed_layers` made."""
    layers = nn.Module()
    install_modules(layers, dict(table))
    for path in table:
        gm.add_submodule(path, Removed(layers.get_submodule(path)))
