"""Measure the error of each quantized layer, and whether its own rounding explains it.

A layer is run on the reference's values, together with everything that rewrites put before and
beside it, so that no error of another layer counts; and its output is measured as the model runs,
where all errors count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.calibration.activation_store import ActivationStore
from tfmq_fx.calibration.executor import LayerwiseExecutor
from tfmq_fx.core.errors import GraphError
from tfmq_fx.ir.binding_times import Binding, binding_times
from tfmq_fx.ir.sites import find_sites
from tfmq_fx.ir.subgraphs import extract
from tfmq_fx.quant.activation import QuantActivation
from tfmq_fx.quant.affine import activation_scales
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.quant.sqnr import decibels, energies, pooled, squares

from .random_inputs import Example

FAR = 10.0  # dB, ten times the noise: off by two is 14 and more at 4 bits, sound layers are below 3
OFF = math.sqrt(2)  # as a ratio halfway between right and off by two
_MEMORY = 1 << 30  # bytes of each graph's values that wait in memory, more in files
_REASSOCIATION = 8  # of the dtype's eps: what another order of additions leaves in an output

Rule = Callable[[QuantLayer, Tensor, Tensor | None], Tensor]  # (layer, input, scale) -> output


@dataclass(frozen=True, slots=True)
class SitePart:
    """A layer of the reference, or a product in its attention, and the part of the model that
    computes its value.

    name: of the layer, or of the product's node.  nodes: of the reference, the value's and those it
    is computed from: by `original` as in the reference (None where it reads others), by `part` as
    in the model.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    original: fx.GraphModule | None
    part: fx.GraphModule

    def run(self, inputs: Iterable[Tensor], rule: Rule) -> Tensor:
        """The value that the model's part computes with `rule` in place of its quantized layers."""
        value: Tensor = _ByRule(self.part, rule).run(*inputs)[0]
        return value


class _ByRule(fx.Interpreter):
    def __init__(self, part: fx.GraphModule, rule: Rule) -> None:
        super().__init__(part)
        self.rule = rule

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, QuantLayer):
            return self.rule(module, args[0], args[1] if len(args) > 1 else None)
        return super().call_module(target, args, kwargs)


@dataclass(frozen=True, slots=True)
class SiteError:
    """The error of one layer.

    alone: SQNR in dB of each sample on the reference's values, (E,).  pooled: of all of them.
    running: SQNR of the same output as the model runs, errors of the layers before it included.
    excess: dB of noise beyond what the layer's own rounding makes, at the sample where it is least;
    as the model runs, where it is less there: a layer may have been rounded to make up for errors
    before it.  gain: the product of its weights with the reference's values, along the one that it
    should be.  untrusted: whether it reads random conditions alone, and the timestep.
    """

    name: str
    alone: Tensor
    pooled: float
    running: Tensor
    excess: float = 0.0
    gain: float = 1.0
    untrusted: bool = False

    @property
    def broken(self) -> bool:
        """Whether the layer is further off than its rounding explains."""
        return not 1 / OFF < self.gain < OFF or self.excess > FAR

    @property
    def note(self) -> str:
        """The fault in words."""
        faults = []
        if self.excess == math.inf:
            faults.append("its output is not finite")
        elif not 1 / OFF < self.gain < OFF:
            faults.append(f"its weights give {self.gain:.2g} times what they should")
        elif self.excess > FAR:
            faults.append(f"{self.excess:.0f} dB more noise than its rounding explains")
        if self.untrusted:
            faults.append("it reads a condition drawn at random: only its weights are judged")
        return "; ".join(faults)


def site_errors(
    reference: fx.GraphModule,
    model: fx.GraphModule,
    examples: Sequence[Example],
    *,
    random_conditions: Collection[str] = (),
) -> list[SiteError]:
    """The error of every quantized layer, in execution order; both graphs run once.

    examples: placeholder values, of any batch size.  random_conditions: those that are not data; a
    layer that reads nothing else but the timestep is judged by its weights alone.
    """
    parts = find_parts(reference, model)
    times = binding_times(reference, reference.meta.get("conditions", ()))
    placeholders = [str(n.target) for n in reference.graph.find_nodes(op="placeholder")]
    position = placeholders.index(reference.meta["timestep"])
    samples = [len(values[position]) for values in examples]
    last = {node.name: part for part in parts for node in part.nodes}
    errors = []
    with ActivationStore(_MEMORY) as spill, ActivationStore(_MEMORY) as other:
        walks = (
            LayerwiseExecutor(reference, examples, spill=spill),
            LayerwiseExecutor(model, examples, spill=other),
        )
        for walk in walks:
            walk.keep(map(walk.node, last))
        for part in parts:
            theirs, mine = (_values(walk, part) for walk in walks)
            error = _measure(part, theirs, mine, samples)
            deps = times.deps[part.nodes[0]]
            if times[part.nodes[0]] is not Binding.X and deps.intersection(random_conditions):
                error = replace(error, untrusted=True, excess=0.0)
            errors.append(error)
            for walk in walks:
                walk.release(walk.node(n.name) for n in part.nodes if last[n.name] is part)
    return errors


def _values(walk: LayerwiseExecutor, part: SitePart) -> list[list[Tensor]]:
    """The values of the part's nodes in a graph, for each chunk."""
    nodes = [walk.node(node.name) for node in part.nodes]
    walk.run_past(nodes)
    return [[walk.values[node][i] for node in nodes] for i in range(len(walk.chunks))]


@torch.no_grad()
def _measure(
    part: SitePart,
    reference: Sequence[Sequence[Tensor]],
    model: Sequence[Sequence[Tensor]],
    samples: Sequence[int],
) -> SiteError:
    """The error of one layer.  reference, model: the values of the part's nodes for each chunk."""
    outputs = [part.part(*inputs)[0] for _, *inputs in reference]
    chunks = list(zip(reference, outputs, model, samples, strict=True))
    alone = torch.cat([energies(y, out, n) for (y, *_), out, _, n in chunks], 1)
    running = torch.cat([energies(y, own, n) for (y, *_), _, (own, *_), n in chunks], 1)
    error = SiteError(part.name, decibels(alone), pooled(alone), decibels(running))
    if not any(isinstance(module, QuantLayer) for module in part.part.modules()):
        return error  # a product
    explained, passed_on, along, size = list[Tensor](), list[Tensor](), 0.0, 0.0
    rounded = rounding_noise()
    for (y, *inputs), _, (_, *own), n in chunks:
        plain, rest = part.run(inputs, weights_alone), part.run(inputs, bias_alone)
        explained.append(squares(part.run(inputs, rounded) - plain, n))
        sound = y if part.original is None else part.original(*own)[0]  # on its running inputs
        passed_on.append(squares(sound - y, n))
        expected, product = (y - rest).double(), (plain - rest).double()
        along += float((expected * product).sum())
        size += float(expected.square().sum())
    noise = torch.cat(explained)
    noise += alone[0] * (_REASSOCIATION * torch.finfo(outputs[0].dtype).eps) ** 2
    here, there = _excess(alone[1], noise), _excess(running[1], noise + torch.cat(passed_on))
    return replace(error, excess=min(here, there), gain=along / size if size else 1.0)


def weights_alone(layer: QuantLayer, x: Tensor, scale: Tensor | None) -> Tensor:
    """A layer's output for its input in floating point."""
    return layer.apply_op(x, layer.weight.to(x.dtype), layer.bias)


def bias_alone(layer: QuantLayer, x: Tensor, scale: Tensor | None) -> Tensor:
    """A layer's output with weights of zero."""
    return layer.apply_op(x, x.new_zeros(layer.weight_shape), layer.bias)


def rounding_noise() -> Rule:
    """A rule that adds the noise of rounding to nearest to a layer's weights, and to its input that
    of a grid that fits it."""
    generator = torch.Generator().manual_seed(0)

    def blur(value: Tensor, step: Tensor, format: str) -> Tensor:
        step = value.abs() / 8 if format == "fp8" else step  # of 3 bits
        noise = torch.rand(value.shape, generator=generator, dtype=torch.float32) - 0.5
        return value + noise.to(value.device) * step

    def rule(layer: QuantLayer, x: Tensor, scale: Tensor | None) -> Tensor:
        weight = layer.weight.flatten(1)
        step, _ = layer.grid().over(weight.shape[1])
        weight = blur(weight, step, layer.weight_format).view(layer.weight_shape)
        if layer.act_bits is not None:
            step = layer.broadcast_scale(x, scale)
            if not layer.dynamic:
                rows = x.reshape(step.numel(), -1)  # that share a scale
                ends = rows.amin(1), rows.amax(1)
                fits, _ = activation_scales(*ends, bits=layer.act_bits, format=layer.act_format)
                step = fits.to(step).view(step.shape)
            x = blur(x, step, layer.act_format).to(x.dtype)
        return layer.apply_op(x, weight.to(x.dtype), layer.bias)

    return rule


def _excess(noise: Tensor, explained: Tensor) -> float:
    """The dB by which noise (E,) exceeds what explains it, at least; infinite for NaN."""
    if not bool(noise.isfinite().all()):
        return math.inf
    worse: Tensor = 10 * (noise.log10() - explained.log10())
    return float(worse.masked_fill(worse.isnan(), 0.0).min())  # neither has any


def find_parts(reference: fx.GraphModule, model: fx.GraphModule) -> list[SitePart]:
    """The parts of `model` that compute each layer it quantizes and each product of attention whose
    operands it rounds, in execution order.

    reference: the captured graph.  model: quantized from it; a node has the name that its value has
    there.  Of a layer called several times the first call counts.
    """
    theirs = {node.name: node for node in reference.graph.nodes}
    mine = {node.name: node for node in model.graph.nodes if node.name in theirs}
    layers = {site.nodes[0].name: site.name for site in find_sites(reference)[0]}
    calls = model.graph.find_nodes(op="call_module")
    modules = {node: model.get_submodule(str(node.target)) for node in calls}
    rounded = [n for n, m in modules.items() if isinstance(m, QuantActivation)]
    products = {user.name for node in rounded for user in node.users}
    targets = dict.fromkeys(n for n in theirs if n in mine and (n in layers or n in products))
    parts = []
    for name in targets:
        inside, inputs = _computation(mine[name], theirs, targets)
        kind = QuantLayer if name in layers else QuantActivation
        if not any(isinstance(modules.get(node), kind) for node in inside):
            continue
        before = [theirs[node.name] for node in inputs]
        if (part := _extracted(model, mine[name], inputs)) is not None:
            nodes, original = (theirs[name], *before), _extracted(reference, theirs[name], before)
            parts.append(SitePart(layers.get(name, name), nodes, original, part))
    return parts


def _extracted(
    gm: fx.GraphModule, node: fx.Node, inputs: Sequence[fx.Node]
) -> fx.GraphModule | None:
    """The graph that computes a node from `inputs`; None where it reads others, as where one graph
    has an input, or two of equal values, and the other has not."""
    try:
        return extract(gm, [node], inputs)
    except GraphError:
        return None


def _computation(
    target: fx.Node, reference: Mapping[str, fx.Node], whole: Collection[str]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes that compute `target` from values that the reference has too, and those values.

    whole: names of the reference's layers, whose values are shared whatever computes them.
    """

    def shared(node: fx.Node) -> bool:
        other = reference.get(node.name)
        if other is None or node.op == "get_attr":
            return False
        reads, others = ([n.name for n in each.all_input_nodes] for each in (node, other))
        same = (node.op, node.target, reads) == (other.op, other.target, others)
        return same or node.op == "placeholder" or node.name in whole

    inside, inputs, todo = {target: None}, dict[fx.Node, None](), [*target.all_input_nodes]
    while todo:
        node = todo.pop()
        if node in inside or node in inputs:
            continue
        if shared(node):
            inputs[node] = None
        else:
            inside[node] = None
            todo += node.all_input_nodes
    return list(inside), list(inputs)
