"""Is it still the same model? Exact parts proved equal, lossy parts measured, culprits named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .capture import capture
from .dataflow import temporal_block
from .errors import ConfigError
from .metrics import sqnr
from .modules import Compiled, Converted
from .nn import QuantLayer
from .passes.reconstruct_tib import relative_errors
from .progress import progress_bar
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
    lossy = any(isinstance(m, (QuantLayer, QuantTimestepTable)) for m in model.gm.modules())
    lossy |= isinstance(model, Compiled)
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
    """Each quantized layer on the reference's inputs: its worst SQNR over the examples."""
    result = []
    sites = [s for s in find_sites(model)[0] if isinstance(s.layer, QuantLayer)]
    full, quantized = Walk(reference, examples), Walk(model, examples)
    for site in sites:
        assert isinstance(site.layer, QuantLayer)
        node = site.nodes[0]
        target = full.node(node.name)
        full.keep([target])
        full.stop_before(target)
        quantized.stop_before(node)
        inputs = [full.arguments(target, i)[0][0] for i in range(len(examples))]
        scales = [quantized.arguments(node, i)[0][1:] for i in range(len(examples))]
        full.step()
        worst = min(
            (sqnr(full.values[target][i], site.layer(inputs[i], *scales[i])), i)
            for i in range(len(examples))
        )
        full.release()
        result.append((site.name, worst[0], float(examples[worst[1]][position][0])))
    return sorted(result, key=lambda item: item[1])


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
