"""Is it still the same model? Exact parts proved equal, lossy parts measured, culprits named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .activation import QuantActivation
from .capture import capture
from .dataflow import temporal_block
from .errors import ConfigError
from .metrics import sqnr
from .modules import Compiled, Converted
from .nn import QuantLayer
from .passes.correct_outputs import CORRECTION
from .passes.reconstruct_tib import relative_errors
from .progress import progress_bar
from .regions import extract
from .sites import find_sites
from .tables import FEATURE, QuantTimestepTable
from .temporal import compute_rows
from .walk import Walk

EXACT_ELSEWHERE = 1e-5  # relative difference that float reassociation leaves at batch sizes above 1


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found. `str()` is for reading.

    exact: whether the model claims to be exact (nothing in it is quantized).  equal: whether every
    output at batch 1 was equal bit for bit.  difference: the largest absolute difference at batch 1
    and relative difference at a larger batch.  steps: output SQNR in dB at each timestep.
    features: (name, mean, worst) relative error of each temporal feature over the set, and the
    timestep of the worst.  sites: (name, worst SQNR in dB over steps, timestep), worst first, each
    on the reference's own inputs.
    """

    exact: bool
    equal: bool
    difference: tuple[float, float]
    steps: dict[float, float]
    features: list[tuple[str, float, float, float]]
    sites: list[tuple[str, float, float]]

    @property
    def ok(self) -> bool:
        """An exact model is equal at batch 1 and within 1e-5 elsewhere; a lossy one is finite."""
        if self.exact:
            return self.equal and self.difference[1] <= EXACT_ELSEWHERE
        return all(value > float("-inf") for value in self.steps.values())  # NaN compares false

    def __str__(self) -> str:
        kind = "exact" if self.exact else "lossy"
        lines = [
            f"{kind} model, {'ok' if self.ok else 'NOT OK'}: batch 1 "
            f"{'equal bit for bit' if self.equal else f'differs by {self.difference[0]:.3g}'}, "
            f"larger batch within {self.difference[1]:.3g} relative"
        ]
        worst = sorted(self.steps.items(), key=lambda item: item[1])[:5]
        steps = ", ".join(f"t={t:g} {v:.1f} dB" for t, v in worst)
        lines.append(f"output SQNR, worst steps: {steps}")
        for name, mean, most, t in sorted(self.features, key=lambda f: -f[2])[:5]:
            if most > 0:
                lines.append(f"feature {name}: error {mean:.3g}, worst {most:.3g} at t={t:g}")
        for name, value, t in self.sites[:10]:
            lines.append(f"layer {name}: {value:.1f} dB at t={t:g}")
        return "\n".join(lines)


def verify(
    reference: nn.Module,
    model: Converted | Compiled,
    inputs: Iterable[Sequence[Any]] | None = None,
    *,
    batch: int = 3,
    seed: int = 0,
    progress: bool = False,
) -> Verification:
    """Compare `model` with the model it was made from, over its whole set of timesteps.

    inputs: (sample, timestep, ...) tuples to compare on, placeholder by placeholder; left out, one
    standard normal sample for each timestep.  batch: the larger batch that is tried besides 1.
    """
    keys = model.timesteps
    if keys is None:
        raise ConfigError("this model has no finite set of timesteps to verify over")
    examples = [list(given) for given in inputs] if inputs else _examples(model, keys, seed)
    gm = _captured(reference, model, examples[0])
    equal, most, relative = True, 0.0, 0.0
    steps: dict[float, float] = {}
    position = model.call.names.index(model.call.timestep)
    with torch.no_grad():
        for values in progress_bar(examples, "verify", enabled=progress):
            expected, found = gm(*values), model.run(values)
            for a, b in zip(expected, found, strict=True):
                equal &= torch.equal(a, b)
                most = max(most, float((a - b).abs().max()))
            steps[float(values[position][0])] = sqnr(expected[0], found[0])
            wide = [torch.cat([v] * batch) if v.dim() else v for v in values]
            for a, b in zip(gm(*wide), model.run(wide), strict=True):
                relative = max(relative, float((a - b).norm() / a.norm().clamp(min=1e-12)))
    lossy = any(
        isinstance(m, (QuantLayer, QuantActivation, QuantTimestepTable)) for m in model.gm.modules()
    )
    lossy |= isinstance(model, Compiled)
    lossy |= any(name.startswith(CORRECTION) for name, _ in model.gm.named_buffers())
    quantized = model.gm if isinstance(model, Converted) else None
    return Verification(
        exact=not lossy,
        equal=equal,
        difference=(most, relative),
        steps=steps,
        features=_features(gm, quantized, keys) if quantized is not None else [],
        sites=_sites(gm, quantized, examples, position) if quantized is not None else [],
    )


def temporal_errors(
    reference: fx.GraphModule, model: fx.GraphModule, timesteps: Tensor
) -> tuple[list[str], Tensor]:
    """Names of the temporal features and their relative error in `model`: (features, K).

    reference: the captured graph.  model: folded or quantized from it.
    """
    block = temporal_block(reference)
    if not block.features:
        return [], torch.zeros(0, len(timesteps))
    rows = compute_rows(block.graph, timesteps)
    by_feature = {n.meta[FEATURE]: n for n in model.graph.nodes if FEATURE in n.meta}
    by_name = {n.name: n for n in model.graph.nodes}
    nodes = [by_feature.get(f.name) or by_name[f.node.name] for f in block.features]
    found: list[list[Tensor]] = [[] for _ in nodes]
    like = {n.name: n.meta["val"] for n in reference.graph.find_nodes(op="placeholder")}
    for t in timesteps:
        walk = Walk(model, [_zeros(like, reference.meta["timestep"], t)])
        walk.keep(nodes)
        walk.run_past(nodes)
        for values, node in zip(found, nodes, strict=True):
            values.append(walk.values[node][0])
    names = [f.name for f in block.features]
    gathered = tuple(torch.cat(v).view_as(row) for v, row in zip(found, rows, strict=True))
    return names, relative_errors(gathered, rows)


def _zeros(like: dict[str, Tensor], timestep: str, t: Tensor) -> list[Tensor]:
    """Placeholder values at batch 1: zeros, and the timestep."""
    made = []
    for name, value in like.items():
        if name == timestep:
            made.append(t.to(value.dtype).reshape(1))
        else:
            sizes = [n if isinstance(n, int) else 1 for n in value.shape]
            made.append(torch.zeros(sizes, dtype=value.dtype, device=t.device))
    return made


def _features(
    reference: fx.GraphModule, model: fx.GraphModule, timesteps: Tensor
) -> list[tuple[str, float, float, float]]:
    names, errors = temporal_errors(reference, model, timesteps)
    return [
        (name, float(row.mean()), float(row.max()), float(timesteps[int(row.argmax())]))
        for name, row in zip(names, errors, strict=True)
    ]


def _sites(
    reference: fx.GraphModule,
    model: fx.GraphModule,
    examples: list[list[Tensor]],
    position: int,
) -> list[tuple[str, float, float]]:
    """Each quantized layer on the reference's inputs: its worst SQNR over the examples.

    A layer is what computes, in `model`, the value that the reference's layer computes, from values
    that both have: scaled, split or rotated inputs and side branches are part of it.
    """
    full = Walk(reference, examples)
    by_name = {node.name: node for node in model.graph.nodes}
    sites = {site.nodes[0]: site.name for site in find_sites(reference)[0]}
    whole = {node.name for node in sites}
    parts = []
    for target, name in sites.items():
        found = by_name.get(target.name)
        inside, given = _computation(found, reference, whole) if found is not None else ([], [])
        layers = [model.get_submodule(str(n.target)) for n in inside if n.op == "call_module"]
        if found is not None and any(isinstance(layer, QuantLayer) for layer in layers):
            needed = [target, *(full.node(node.name) for node in given)]
            parts.append((name, needed, extract(model, [found], given)))
    last = {node: i for i, (_, needed, _) in enumerate(parts) for node in needed}
    full.keep(last)
    result = []
    for i, (name, needed, layer) in enumerate(parts):
        full.run_past(needed)
        sqnrs = []
        for k in range(len(examples)):
            expected, *inputs = (full.values[node][k] for node in needed)
            with torch.no_grad():
                sqnrs.append((sqnr(expected, layer(*inputs)[0]), k))
        worst = min(sqnrs)
        result.append((name, worst[0], float(examples[worst[1]][position][0])))
        full.release(node for node in needed if last[node] == i)
    return sorted(result, key=lambda item: item[1])


def _computation(
    target: fx.Node, reference: fx.GraphModule, whole: set[str]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes that compute `target` from values the reference has too, and those values.

    whole: names of the reference's layers, whose values count as had whatever computes them.
    """
    like = {node.name: node for node in reference.graph.nodes}

    def shared(node: fx.Node) -> bool:
        other = like.get(node.name)
        if other is None or node.op == "get_attr":
            return False
        if node.op == "placeholder" or node.name in whole:
            return True
        inputs = [n.name for n in node.all_input_nodes]
        same = (node.op, node.target, inputs)
        return same == (other.op, other.target, [n.name for n in other.all_input_nodes])

    inside, given, todo = [target], dict[fx.Node, None](), list(target.all_input_nodes)
    seen = set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if shared(node):
            given[node] = None
        else:
            inside.append(node)
            todo += node.all_input_nodes
    return inside, list(given)


def _examples(model: Converted | Compiled, keys: Tensor, seed: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for t in keys:
        values = []
        for spec in model.call.inputs:
            sizes = [n if isinstance(n, int) else 1 for n in spec.shape]
            if spec.name == model.call.timestep:
                values.append(t.to(spec.dtype).reshape(1))
            elif spec.dtype.is_floating_point:
                drawn = torch.randn(sizes, generator=generator)
                values.append(drawn.to(device=model.device, dtype=spec.dtype))
            else:
                values.append(torch.zeros(sizes, dtype=spec.dtype, device=model.device))
        made.append(values)
    return made


def _captured(
    reference: nn.Module, model: Converted | Compiled, values: list[Tensor]
) -> fx.GraphModule:
    """The reference as a graph with the same inputs."""
    named = dict(zip(model.call.names, values, strict=True))
    try:
        found = capture(reference, named, timestep=model.call.timestep)
    except TypeError as error:
        raise ConfigError(f"the reference takes other inputs than the model: {error}") from error
    return found.gm
