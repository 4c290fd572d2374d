"""Sites: the convolution and linear layers of a graph, and what each is to become."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tfmq_fx.core.config import Config
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.module_overrides import has_hooks, replaced_forward
from tfmq_fx.core.stages import REPLACED
from tfmq_fx.quant.modules import kind_of
from tfmq_fx.quant.quant_layer import QuantLayer

from .graph import module_path
from .graph_pass import Declined
from .node_info import is_heavy, is_random, op_name, value_inputs

_FUNCTIONAL = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    *(
        getattr(getattr(torch.ops.aten, name), overload)
        for name, overload in (
            ("linear", "default"),
            ("conv1d", "default"),
            ("conv1d", "padding"),
            ("conv2d", "default"),
            ("conv2d", "padding"),
            ("conv3d", "default"),
            ("conv3d", "padding"),
            ("conv_transpose1d", "default"),
            ("conv_transpose2d", "input"),
            ("conv_transpose3d", "input"),
        )
    ),
}
_NO_PRODUCT = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.PReLU,
)  # modules that scale or look up with what they hold
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
    fixed: set[fx.Node] | None = None
    reads = [str(node.target).rpartition(".") for node in gm.graph.find_nodes(op="get_attr")]
    read = {owner: name for owner, _, name in reads}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            layer, path = gm.get_submodule(str(node.target)), str(node.target)
            if isinstance(layer, QuantLayer):
                calls.setdefault(path, []).append(node)
            elif not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
                continue
            elif reason := _why_not(layer, read.get(path)):
                declined.append(Declined(path, reason))
            else:
                calls.setdefault(path, []).append(node)
        elif node.target in _FUNCTIONAL:
            path = module_path(node) or node.name
            fixed = _fixed(gm) if fixed is None else fixed
            declined.append(Declined(path, node.meta.get(REPLACED) or _why_function(node, fixed)))
    sites = [Site(name, gm.get_submodule(name), tuple(nodes)) for name, nodes in calls.items()]
    return sites, list(dict.fromkeys(declined))


def _why_not(layer: nn.Module, read: str | None) -> str | None:
    """Why a layer that a graph calls cannot be quantized; read: its tensor that others read."""
    if isinstance(layer, _TRANSPOSED):
        return "transposed convolution"
    if reason := replaced_forward(layer):
        return reason
    if not kind_of(layer):
        return f"{type(layer).__name__} has a forward of its own"
    if read is not None:
        return f"its {read} is used elsewhere as well"
    return "it has hooks" if has_hooks(layer) else None


def _why_function(node: fx.Node, fixed: Collection[fx.Node]) -> str:
    """Why a product that is called as a function is no layer; fixed: what no input decides."""
    if "transpose" in op_name(node):
        return "transposed convolution"
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    if weight in fixed:
        return "called as a function, not as a torch.nn layer"
    return f"the weight of its {op_name(node)} is computed from the inputs"


def _fixed(gm: fx.GraphModule) -> set[fx.Node]:
    """The values of a graph that no input reaches, not even by its shape."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        inner = node.op not in ("placeholder", "output")
        if inner and found.issuperset(node.all_input_nodes) and not is_random(gm, node):
            found.add(node)
    return found


def weights_left(gm: fx.GraphModule, sites: Collection[Site]) -> int:
    """The number of weights that matrix products and convolutions outside `sites` multiply with."""
    return sum(left_by_module(gm, sites).values())


def left_by_module(gm: fx.GraphModule, sites: Collection[Site]) -> dict[str, int]:
    """How many weights matrix products and convolutions outside `sites` multiply with, by the path
    of the module that does; a tensor that several use counts for the first.

    Counted are the constants of the graph with two or more dimensions that such an operation reads,
    whatever they are computed from, and the matrices of modules such as nn.MultiheadAttention.
    """
    names, seen = {site.name for site in sites}, set[Any]()
    fixed, found = _fixed(gm), dict[str, int]()
    for node in gm.graph.nodes:
        if node.target in names or node in fixed:
            continue
        sizes = {key: size for key, size in _matrices(gm, node, fixed) if key not in seen}
        if sizes:
            seen |= sizes.keys()
            path = str(node.target) if node.op == "call_module" else module_path(node) or node.name
            found[path] = found.get(path, 0) + sum(sizes.values())
    return found


def still_there(gm: fx.GraphModule, left: Mapping[str, int]) -> dict[str, int]:
    """Those of `left_by_module` that a later form of the graph still multiplies with."""
    heavy = [node for node in gm.graph.nodes if is_heavy(gm, node)]
    there = {str(n.target) if n.op == "call_module" else module_path(n) or n.name for n in heavy}
    return {path: count for path, count in left.items() if path in there}


def _matrices(
    gm: fx.GraphModule, node: fx.Node, fixed: Collection[fx.Node]
) -> Iterator[tuple[Any, int]]:
    """The weights that a node multiplies with: something to tell each by, and its size."""
    if node.op == "call_module":
        for part in gm.get_submodule(str(node.target)).modules():
            if not isinstance(part, _NO_PRODUCT):
                own = part.parameters(recurse=False)
                yield from ((id(p), p.numel()) for p in own if p.dim() > 1)
    elif is_heavy(gm, node) and not op_name(node).startswith("embedding"):
        for used in node.all_input_nodes:
            value = used.meta.get("val")
            if used in fixed and isinstance(value, Tensor) and value.dim() > 1:
                yield _parameter(gm, used), int(value.numel())
        if len(node.args) > 1 and isinstance(node.args[1], fx.Node):
            yield from _inside(gm, node.args[1], fixed)


def _inside(
    gm: fx.GraphModule, weight: fx.Node, fixed: Collection[fx.Node]
) -> Iterator[tuple[Any, int]]:
    """The parameters with two or more dimensions that go into a weight which inputs change too."""
    todo, seen = [] if weight in fixed else [weight], set[fx.Node]()
    while todo:
        at = todo.pop()
        if at.op == "get_attr":
            owner, _, name = str(at.target).rpartition(".")
            value = getattr(gm.get_submodule(owner), name, None)
            if isinstance(value, nn.Parameter) and value.dim() > 1:
                yield id(value), value.numel()
        elif at not in seen and at.op != "call_module" and not is_heavy(gm, at):
            seen.add(at)
            todo += value_inputs(at)


def _parameter(gm: fx.GraphModule, node: fx.Node) -> Any:
    """The identity of the parameter that a value is, cast or viewed; else the node."""
    at = node
    while at.op in ("call_function", "call_method") and len(at.all_input_nodes) == 1:
        at = at.all_input_nodes[0]
    if at.op != "get_attr":
        return node
    owner, _, name = str(at.target).rpartition(".")
    return id(getattr(gm.get_submodule(owner), name, None))


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
