"""Error of each quantized layer against its reference, and whether its own rounding explains it.

A layer is run on the reference's values, with all that rewrites put before and beside it, so that
no error of another layer counts; and it is looked at as the model runs, where they all do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.calibration.activation_store import ActivationStore
from tfmq_fx.calibration.executor import LayerwiseExecutor
from tfmq_fx.core.errors import GraphError
from tfmq_fx.ir.binding_times import Binding, binding_times
from tfmq_fx.ir.graph import timestep_position
from tfmq_fx.ir.sites import find_sites
from tfmq_fx.ir.subgraphs import extract
from tfmq_fx.quant.activation import QuantActivation
from tfmq_fx.quant.affine import activation_scales
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.quant.sqnr import decibels, energies, pooled, squares

from .random_inputs import Example

FAR = 10.0  # dB, ten times the noise: off by two is 14 and more at 4 bits, sound layers are below 3
OFF = math.sqrt(2)  # as a ratio halfway between right and off by two
_FEW = 3  # layers that a median needs to tell one from the others
_MEMORY = 1 << 30  # bytes of each graph's values that wait in memory, more in files
_REASSOCIATION = 8  # of the dtype's eps: what another order of additions leaves in an output

Rule = Callable[..., Tensor]  # (path, layer, input, scale) -> output
Ranges = dict[str, dict[float, tuple[float, float]]]  # of inputs, by layer and input scale


@dataclass(frozen=True, slots=True)
class SitePart:
    """A layer of the reference, or a product in its attention, and the part of the model that
    computes its value.

    name: of the layer, or of the product's node.  nodes: of the reference, the value's and those it
    is computed from: by `wanted` as in the reference (None where it reads others), by `part` as in
    the model.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    wanted: fx.GraphModule | None
    part: fx.GraphModule

    def run(self, inputs: Iterable[Tensor], rule: Rule) -> Tensor:
        """The value by the model's part, whose quantized layers `rule` computes."""
        value: Tensor = _ByRule(self.part, rule).run(*inputs)[0]
        return value


class _ByRule(fx.Interpreter):
    def __init__(self, part: fx.GraphModule, rule: Rule) -> None:
        super().__init__(part)
        self.rule = rule

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, QuantLayer):
            return self.rule(target, module, *args, **kwargs)
        return super().call_module(target, args, kwargs)


@dataclass(frozen=True, slots=True)
class SiteError:
    """What one layer loses.

    alone: SQNR in dB of each sample on the reference's values, (E,).  pooled: of all of them.
    running: SQNR of the same output as the model runs, errors of the layers before it included.
    excess: how many dB of noise there are beyond what the layer's own rounding makes, at the sample
    where it is least; as the model runs, where it is less there: a layer may have been rounded to
    make up for errors before it.  gain: size of what its weights make of the reference's values
    along what they should.  input_ratio: of its input scales to those that fit the values it reads,
    over what this is in the other layers, as calibration sees more data than is looked at here.
    drawn: whether all it reads of conditions was drawn from no data.
    """

    name: str
    alone: Tensor
    pooled: float
    running: Tensor
    excess: float = 0.0
    gain: float = 1.0
    input_ratio: float = 1.0
    drawn: bool = False

    @property
    def broken(self) -> bool:
        """Whether the layer is further off than its rounding explains."""
        return not 1 / OFF < self.gain < OFF or self.excess > FAR

    @property
    def suspect(self) -> bool:
        """Whether its input is ranged otherwise than those of the other layers; that may be right,
        where inputs of the model spread more than those looked at."""
        return not 1 / OFF < self.input_ratio < OFF

    @property
    def note(self) -> str:
        """What is wrong with it, in words."""
        found = []
        if self.excess == math.inf:
            found.append("its output is not finite")
        elif not 1 / OFF < self.gain < OFF:
            found.append(f"its weights give {self.gain:.2g} times what they should")
        elif self.excess > FAR:
            found.append(f"{self.excess:.0f} dB more noise than its rounding explains")
        if self.suspect:
            found.append(f"its input range is {self.input_ratio:.2g} times those of other layers")
        if self.drawn:
            found.append("it reads a condition drawn at random: only its weights are judged")
        return "; ".join(found)


def site_errors(
    reference: fx.GraphModule,
    model: fx.GraphModule,
    examples: Sequence[Example],
    *,
    drawn: Collection[str] = (),
) -> list[SiteError]:
    """Every quantized layer, in execution order; both graphs run once.

    examples: placeholder values, of any batch size.  drawn: conditions among them that were drawn
    from no data; a layer that reads nothing else but the timestep is judged by its weights alone.
    """
    parts = find_parts(reference, model)
    times = binding_times(reference, reference.meta.get("conditions", ()))
    position = timestep_position(reference)
    samples = [len(values[position]) for values in examples]
    last = {node.name: part for part in parts for node in part.nodes}
    result = []
    with ActivationStore(_MEMORY) as spill, ActivationStore(_MEMORY) as other:
        walks = (
            LayerwiseExecutor(reference, examples, spill=spill),
            LayerwiseExecutor(model, examples, spill=other),
        )
        for walk in walks:
            walk.keep(map(walk.node, last))
        for part in parts:
            theirs, mine = (_values(walk, part) for walk in walks)
            target = part.nodes[0]
            early = times[target] is not Binding.X
            untrusted = early and bool(times.deps[target] & set(drawn))
            result.append(_measured(part, theirs, mine, samples, untrusted))
            for walk in walks:
                walk.release(walk.node(n.name) for n in part.nodes if last[n.name] is part)
    ratios = [each.input_ratio for each in result if each.input_ratio not in (0.0, 1.0)]
    middle = statistics.median(ratios) if len(ratios) >= _FEW else 1.0
    return [
        each if each.input_ratio == 1.0 else replace(each, input_ratio=each.input_ratio / middle)
        for each in result
    ]


def _values(walk: LayerwiseExecutor, part: SitePart) -> list[list[Tensor]]:
    """For each chunk what a graph has in the place of the part's nodes."""
    nodes = [walk.node(node.name) for node in part.nodes]
    walk.run_past(nodes)
    return [[walk.values[node][i] for node in nodes] for i in range(len(walk.chunks))]


@torch.no_grad()
def _measured(
    part: SitePart,
    reference: Sequence[Sequence[Tensor]],
    model: Sequence[Sequence[Tensor]],
    samples: Sequence[int],
    drawn: bool,
) -> SiteError:
    """What one layer loses.  reference, model: for each chunk the values of the part's nodes."""
    ranges = Ranges()
    outputs = [part.run(inputs, as_it_is(ranges)) for _, *inputs in reference]
    chunks = list(zip(reference, outputs, model, samples, strict=True))
    alone = torch.cat([energies(y, out, n) for (y, *_), out, _, n in chunks], 1)
    running = torch.cat([energies(y, own, n) for (y, *_), _, (own, *_), n in chunks], 1)
    found = SiteError(part.name, decibels(alone), pooled(alone), decibels(running), drawn=drawn)
    if not any(isinstance(module, QuantLayer) for module in part.part.modules()):
        return found  # a product
    fitting = {path: _fitting(part.part, path, seen) for path, seen in ranges.items()}
    explained, passed_on, along, size = list[Tensor](), list[Tensor](), 0.0, 0.0
    for (y, *inputs), _, (_, *own), n in chunks:
        plain, rest = part.run(inputs, weights_alone), part.run(inputs, bias_alone)
        explained.append(squares(part.run(inputs, blurred(fitting)) - plain, n))
        sound = y if part.wanted is None else part.wanted(*own)[0]  # on what it gets as it runs
        passed_on.append(squares(sound - y, n))
        wanted, given = (y - rest).double(), (plain - rest).double()
        along, size = along + float((wanted * given).sum()), size + float(wanted.square().sum())
    gain = along / size if size else 1.0
    if drawn:
        return replace(found, gain=gain)
    noise = torch.cat(explained)
    noise += alone[0] * (_REASSOCIATION * torch.finfo(outputs[0].dtype).eps) ** 2
    here, there = _excess(alone[1], noise), _excess(running[1], noise + torch.cat(passed_on))
    ratios = [statistics.median(s / fits for s, fits in f.items()) for f in fitting.values()]
    return replace(found, excess=min(here, there), gain=gain, input_ratio=_furthest(ratios))


def as_it_is(ranges: Ranges) -> Rule:
    """Layers as they are; `ranges` gets those of what they read."""

    def rule(path: str, layer: QuantLayer, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if layer.act_bits is not None and not layer.dynamic:
            scales = layer.act_scale[None] if scale is None else scale
            rows, seen = x.reshape(len(scales), -1), ranges.setdefault(path, {})
            ends = zip(scales.tolist(), rows.amin(1).tolist(), rows.amax(1).tolist(), strict=True)
            for key, low, high in ends:
                a, b = seen.get(key, (low, high))
                seen[key] = min(a, low), max(b, high)
        y: Tensor = layer(x, scale)
        return y

    return rule


def weights_alone(path: str, layer: QuantLayer, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """A layer on its input as it is."""
    return layer.apply_op(x, layer.weight.to(x.dtype), layer.bias)


def bias_alone(path: str, layer: QuantLayer, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """A layer without weights."""
    return layer.apply_op(x, x.new_zeros(layer.weight_shape), layer.bias)


def blurred(fitting: Mapping[str, Mapping[float, float]]) -> Rule:
    """Layers whose weights are off by as much as rounding to nearest makes them, and inputs as on
    a grid that fits them: `fitting` has its scale for each that a layer has."""
    generator = torch.Generator().manual_seed(0)

    def blur(value: Tensor, step: Tensor, format: str) -> Tensor:
        step = value.abs() / 8 if format == "fp8" else step  # of 3 bits
        noise = torch.rand(value.shape, generator=generator, dtype=torch.float32) - 0.5
        return value + noise.to(value.device) * step

    def rule(path: str, layer: QuantLayer, x: Tensor, scale: Tensor | None = None) -> Tensor:
        weight = layer.weight.flatten(1)
        step, _ = layer.grid().over(weight.shape[1])
        weight = blur(weight, step, layer.weight_format).view(layer.weight_shape)
        if layer.act_bits is not None:
            step = layer.broadcast_scale(x, scale)
            if not layer.dynamic:
                scales = [fitting[path][key] for key in step.flatten().tolist()]
                step = step.new_tensor(scales).view(step.shape)
            x = blur(x, step, layer.act_format).to(x.dtype)
        return layer.apply_op(x, weight.to(x.dtype), layer.bias)

    return rule


def _fitting(
    part: fx.GraphModule, path: str, seen: Mapping[float, tuple[float, float]]
) -> dict[float, float]:
    """For each scale of a layer's input the one that fits the values it was used on."""
    layer: Any = part.get_submodule(path)
    low, high = torch.tensor(list(seen.values()), dtype=torch.float32).T
    scales, _ = activation_scales(low, high, bits=layer.act_bits, format=layer.act_format)
    return dict(zip(seen, scales.tolist(), strict=True))


def _furthest(ratios: Iterable[float]) -> float:
    """The ratio that is furthest from 1; NaN and what is not positive are further than all."""
    return max(ratios, key=lambda r: abs(math.log(r)) if r > 0 else math.inf, default=1.0)


def _excess(noise: Tensor, explained: Tensor) -> float:
    """How many dB the noise (E,) is above what explains it, at least; infinite for NaN."""
    if not bool(noise.isfinite().all()):
        return math.inf
    worse: Tensor = 10 * (noise.log10() - explained.log10())
    return float(worse.masked_fill(worse.isnan(), 0.0).min())  # neither has any


def find_parts(reference: fx.GraphModule, model: fx.GraphModule) -> list[SitePart]:
    """The part of `model` for each layer of `reference` that it quantizes, and for each product of
    attention whose operands it rounds; in execution order.

    reference: the captured graph.  model: quantized from it; a node has the name that its value has
    there.  A layer called several times is looked at where it is called first.
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
        inside, given = _computation(mine[name], theirs, targets)
        kind = QuantLayer if name in layers else QuantActivation
        if not any(isinstance(modules.get(node), kind) for node in inside):
            continue
        before = [theirs[node.name] for node in given]
        if (part := _extracted(model, mine[name], given)) is not None:
            nodes, wanted = (theirs[name], *before), _extracted(reference, theirs[name], before)
            parts.append(SitePart(layers.get(name, name), nodes, wanted, part))
    return parts


def _extracted(
    gm: fx.GraphModule, node: fx.Node, given: Sequence[fx.Node]
) -> fx.GraphModule | None:
    """The graph that computes a node; None where it reads what is not given, as where one graph has
    an input, or two of equal values, and the other has not."""
    try:
        return extract(gm, [node], given)
    except GraphError:
        return None


def _computation(
    target: fx.Node, reference: Mapping[str, fx.Node], whole: Collection[str]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes that compute `target` from values the reference has too, and those values.

    whole: names of the reference's layers, whose values count as had whatever computes them.
    """

    def shared(node: fx.Node) -> bool:
        other = reference.get(node.name)
        if other is None or node.op == "get_attr":
            return False
        inputs, others = ([n.name for n in each.all_input_nodes] for each in (node, other))
        same = (node.op, node.target, inputs) == (other.op, other.target, others)
        return same or node.op == "placeholder" or node.name in whole

    inside, given, todo = {target: None}, dict[fx.Node, None](), [*target.all_input_nodes]
    while todo:
        node = todo.pop()
        if node in inside or node in given:
            continue
        if shared(node):
            given[node] = None
        else:
            inside[node] = None
            todo += node.all_input_nodes
    return list(inside), list(given)
