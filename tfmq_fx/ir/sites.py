"""Find the sites of a graph (its convolution and linear layers) and plan how to quantize each."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.core.config import Config
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.module_overrides import has_hooks, replaced_forward
from tfmq_fx.core.stages import REPLACED
from tfmq_fx.quant.modules import kind_of
from tfmq_fx.quant.quant_layer import QuantLayer

from .graph import module_path, opaque_modules
from .graph_pass import Declined
from .node_info import is_heavy, is_random, op_name, value_inputs

_FUNCTIONS = {"linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))}
_NO_PRODUCT = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
)  # modules with matrices


@dataclass(frozen=True, slots=True)
class Site:
    """A layer that can be quantized: its module path, the layer, and every node that calls it."""

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
    layers that cannot be quantized, with the reason."""
    calls: dict[str, list[fx.Node]] = {}
    declined = []
    constants: set[fx.Node] | None = None
    reads = [str(node.target).rpartition(".") for node in gm.graph.find_nodes(op="get_attr")]
    read = {owner: name for owner, _, name in reads}
    opaque = opaque_modules(gm)  # their layers are counted one by one
    for node in gm.graph.nodes:
        if node.op == "call_module":
            layer, path = gm.get_submodule(str(node.target)), str(node.target)
            if isinstance(layer, QuantLayer):
                calls.setdefault(path, []).append(node)
            elif not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
                kept = f"{type(layer).__name__} keeps its weights in floating point"
                if path not in opaque and any(True for _ in _matrices(gm, node, (), ())):
                    declined.append(Declined(path, node.meta.get(REPLACED) or kept))
            elif reason := why_not(layer, read.get(path)):
                declined.append(Declined(path, reason))
            elif len(node.args) + len(node.kwargs) > 1:
                declined.append(Declined(path, "it is called with an output size"))
            else:
                calls.setdefault(path, []).append(node)
        elif op_name(node) in _FUNCTIONS:
            path = module_path(node) or node.name
            constants = _constants(gm) if constants is None else constants
            reason = node.meta.get(REPLACED) or _why_function(node, constants)
            declined.append(Declined(path, reason))
    sites = [Site(name, gm.get_submodule(name), tuple(nodes)) for name, nodes in calls.items()]
    return sites, list(dict.fromkeys(declined))


def why_not(layer: nn.Module, read: str | None) -> str | None:
    """Why a layer cannot be quantized, or None; read: its tensor that other nodes read."""
    if reason := replaced_forward(layer):
        return reason
    if not kind_of(layer):
        return f"{type(layer).__name__} has a forward of its own"
    if read is not None:
        return f"its {read} is used elsewhere as well"
    return "it has hooks" if has_hooks(layer) else None


def _why_function(node: fx.Node, constants: Collection[fx.Node]) -> str:
    """Why a product that is called as a function cannot be quantized as a layer."""
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    if weight in constants:
        return "called as a function, not as a torch.nn layer"
    return f"the weight of its {op_name(node)} is computed from the inputs"


def _constants(gm: fx.GraphModule) -> set[fx.Node]:
    """The values of a graph that depend on no input, not even on its shape."""
    constants: set[fx.Node] = set()
    for node in gm.graph.nodes:
        inner = node.op not in ("placeholder", "output")
        if inner and constants.issuperset(node.all_input_nodes) and not is_random(gm, node):
            constants.add(node)
    return constants


def left_by_module(gm: fx.GraphModule, sites: Collection[Site]) -> dict[str, int]:
    """The number of weights that operations outside `sites` multiply with, by module path.

    Counted are the constants of the graph with two or more dimensions that a matrix product or
    convolution reads, whatever they are computed from, and the matrices of modules such as
    nn.MultiheadAttention.  A tensor that several operations read counts for the first.
    """
    names, seen = {site.name for site in sites}, set[Any]()
    constants, counts = _constants(gm), Counter[str]()
    for node in gm.graph.nodes:
        if node.target in names or node in constants:
            continue
        found = _matrices(gm, node, constants, names)
        sizes = {key: size for key, size in found if key not in seen}
        if sizes:
            seen |= sizes.keys()
            counts[_caller(node)] += sum(sizes.values())
    return dict(counts)


def still_there(gm: fx.GraphModule, left: Mapping[str, int]) -> dict[str, int]:
    """The entries of `left_by_module` whose module a later form of the graph still runs."""
    present = {_caller(node) for node in gm.graph.nodes if is_heavy(gm, node)}
    return {path: count for path, count in left.items() if path in present}


def _caller(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else module_path(node) or node.name


def _matrices(
    gm: fx.GraphModule, node: fx.Node, constants: Collection[fx.Node], names: Collection[str]
) -> Iterator[tuple[Any, int]]:
    """The identity and the size of each weight that a node multiplies with; without those of the
    layers `names` inside a module that it calls."""
    if node.op == "call_module":
        for name, part in gm.get_submodule(str(node.target)).named_modules():
            inner = f"{node.target}.{name}" in names
            if not isinstance(part, _NO_PRODUCT) and not inner:
                own = part.parameters(recurse=False)
                yield from ((id(p), p.numel()) for p in own if p.dim() > 1)
    elif is_heavy(gm, node) and not op_name(node).startswith("embedding"):
        for used in node.all_input_nodes:
            value = used.meta.get("val")
            if used in constants and isinstance(value, Tensor) and value.dim() > 1:
                yield _parameter(gm, used), int(value.numel())
        if len(node.args) > 1 and isinstance(node.args[1], fx.Node):
            yield from _computed_from(gm, node.args[1], constants)


def _computed_from(
    gm: fx.GraphModule, weight: fx.Node, constants: Collection[fx.Node]
) -> Iterator[tuple[Any, int]]:
    """The parameters with two or more dimensions of a weight that also depends on inputs."""
    todo, seen = [] if weight in constants else [weight], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node.op == "get_attr":
            value = attrgetter(str(node.target))(gm)
            if isinstance(value, nn.Parameter) and value.dim() > 1:
                yield id(value), value.numel()
        elif node not in seen and node.op != "call_module" and not is_heavy(gm, node):
            seen.add(node)
            todo += value_inputs(node)


def _parameter(gm: fx.GraphModule, node: fx.Node) -> Any:
    """The identity of the parameter that a node casts or views; else the node."""
    source = node
    while source.op in ("call_function", "call_method") and len(source.all_input_nodes) == 1:
        source = source.all_input_nodes[0]
    return id(attrgetter(str(source.target))(gm)) if source.op == "get_attr" else node


def plan_sites(
    sites: Collection[Site],
    config: Config,
    *,
    early: Collection[str] = (),
    overrides: Mapping[str, LayerConfig] | None = None,
) -> dict[str, LayerConfig]:
    """The LayerConfig of each site, by name.

    The first and last sites that depend on the sample get `config.first` and `config.last`;
    `early` names the sites that do not, which are never first or last.  overrides: module name
    patterns (fnmatch); later ones win.  Raises ConfigError for a pattern that matches nothing.
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
