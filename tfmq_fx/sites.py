"""Sites: the convolution and linear layers of a graph, and what each is to become."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .config import Config, LayerConfig
from .errors import ConfigError
from .graph import Declined
from .nn import QuantLayer, kind_of
from .ops import is_heavy, op_name

_FUNCTIONAL = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True)
class Site:
    """A quantizable layer: its module path, the layer, and every node that calls it."""

    name: str
    layer: nn.Module
    nodes: tuple[fx.Node, ...]

    @property
    def weights(self) -> int:
        """The number of weights."""
        weight = self.layer.weight
        return weight.numel() if isinstance(weight, Tensor) else 0


def find_sites(gm: fx.GraphModule) -> tuple[list[Site], list[Declined]]:
    """Every convolution and linear layer in execution order, quantized ones included, and the
    ones that cannot be quantized, with the reason."""
    calls: dict[str, list[fx.Node]] = {}
    declined = []
    reads = [str(node.target).rpartition(".") for node in gm.graph.find_nodes(op="get_attr")]
    read = {owner: name for owner, _, name in reads}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            layer = gm.get_submodule(str(node.target))
            if kind_of(layer) and str(node.target) in read:
                reason = f"its {read[str(node.target)]} is used elsewhere as well"
                declined.append(Declined(str(node.target), reason))
            elif kind_of(layer) and (layer._forward_hooks or layer._forward_pre_hooks):
                declined.append(Declined(str(node.target), "it has hooks"))
            elif kind_of(layer) or isinstance(layer, QuantLayer):
                calls.setdefault(str(node.target), []).append(node)
            elif isinstance(layer, _TRANSPOSED):
                declined.append(Declined(str(node.target), "transposed convolution"))
            elif isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
                reason = f"{type(layer).__name__} has a forward of its own"
                declined.append(Declined(str(node.target), reason))
        elif node.op == "call_function" and node.target in _FUNCTIONAL:
            reason = "called as a function, not as a torch.nn layer"
            declined.append(Declined(node.name, reason))
    sites = [Site(name, gm.get_submodule(name), tuple(nodes)) for name, nodes in calls.items()]
    return sites, list(dict.fromkeys(declined))


def weights_left(gm: fx.GraphModule, sites: Collection[Site]) -> int:
    """The number of weights that matrix products and convolutions outside `sites` multiply with."""
    names, found = {site.name for site in sites}, dict[int, int]()
    for node in gm.graph.nodes:
        parameters: list[Tensor] = []
        if not is_heavy(gm, node) or node.target in names:
            continue
        if node.op == "call_module":
            layer = gm.get_submodule(str(node.target))
            parameters = [] if isinstance(layer, nn.Embedding) else list(layer.parameters())
        elif op_name(node) != "embedding":
            parameters = [p for used in node.all_input_nodes for p in _parameter(gm, used)]
        found |= {id(p): p.numel() for p in parameters if p.dim() > 1}
    return sum(found.values())


def _parameter(gm: fx.GraphModule, node: fx.Node) -> list[Tensor]:
    """The parameter that a value is, cast or viewed; empty for other values."""
    while node.op in ("call_function", "call_method") and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    if node.op != "get_attr":
        return []
    owner, _, name = str(node.target).rpartition(".")
    value = getattr(gm.get_submodule(owner), name, None)
    return [value] if isinstance(value, nn.Parameter) else []


def plan_sites(
    sites: Collection[Site],
    config: Config,
    *,
    early: Collection[str] = (),
    overrides: Mapping[str, LayerConfig] | None = None,
) -> dict[str, LayerConfig]:
    """What each site becomes.

    The first and last sites that depend on the sample get `config.first` and `config.last`;
    `early` names the sites that do not, which are never first or last.  overrides: module name
    patterns (fnmatch); later ones win.  Raises ConfigError for one that matches
    nothing.
    """
    plan = {site.name: config.layers for site in sites}
    spatial = [site.name for site in sites if site.name not in early]
    if spatial:
        plan[spatial[0]] = config.first or config.layers
        plan[spatial[-1]] = config.last or config.layers
    for pattern, layer in (overrides or {}).items():
        if not isinstance(layer, LayerConfig):
            raise ConfigError(
                f"override {pattern!r} must be a LayerConfig, got {type(layer).__name__}"
            )
        matched = fnmatch.filter(plan, pattern)
        if not matched:
            names = ", ".join(list(plan)[:8])
            raise ConfigError(
                f"override {pattern!r} matches no layer; the model's layers are {names}"
                f"{', ...' if len(plan) > 8 else ''} ({len(plan)} in all)"
            )
        plan.update(dict.fromkeys(matched, layer))
    return plan


def check_weights(sites: Collection[Site]) -> None:
    """Raise ConfigError naming the first layer whose weight or bias holds NaN or Inf."""
    for site in sites:
        for name, parameter in site.layer.named_parameters(recurse=False):
            if not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
                raise ConfigError(
                    f"{site.name}.{name} holds NaN or Inf; check the checkpoint it came from"
                )
