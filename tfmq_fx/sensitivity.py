"""What each layer alone costs the model's output, at each timestep and for each thing it may be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx, nn

from .checkpoint import Checkpoint, Part, finished
from .graph import fork
from .noise import squares
from .ops import timestep_index, writers
from .progress import progress_bar
from .sites import Site, find_sites
from .spill import Spill
from .walk import Walk


class _AsFloat(nn.Module):
    """A float layer where a quantized one is called: (x, scale) -> layer(x)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Noise at the model's output, as a share of its signal there: error energy over energy.

    noise: site -> (options, K), what the site adds as each of its options.
    rest: (K,), what is there with every one of these sites in floating point (cached tables,
    attention's own products).  Timesteps without a sample have NaN.
    """

    noise: dict[str, Tensor]
    rest: Tensor


Options = Callable[[Site, Walk], Sequence[nn.Module]]
"""What a site may be. The walk has not run past it; its nodes are those of the site."""


def measure(
    quantized: fx.GraphModule,
    *,
    reference: fx.GraphModule,
    names: Collection[str],
    options: Options,
    chunks: Sequence[Sequence[Tensor]],
    timesteps: Tensor,
    seen: Sequence[Sequence[Tensor]] = (),
    memory: int = 0,
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
) -> Sensitivity:
    """Each option of each of the sites `names`, tried with all the others in floating point.

    quantized: the graph with these sites quantized, of which only the way they are called counts.
    reference: the full-precision graph, with a layer of the same path for each site.
    options: of a site, made when it is its turn; modules called as it is in `quantized`.
    chunks: placeholder values that options are tried on.  timesteps: (K,), the model's set.
    seen: those that the walk given to `options` runs over, in floating point.  memory: bytes of
    values between layers that are held in memory, the rest wait on disk; 0 holds all.
    checkpoint: where finished sites are found and put.
    Of many processes the first one tries what it has options for, and tells the others.
    """
    floats = fork(quantized)
    for name in names:
        floats.set_submodule(name, _AsFloat(reference.get_submodule(name)))
    place = [str(n.target) for n in floats.graph.find_nodes(op="placeholder")].index(
        floats.meta["timestep"]
    )
    steps = [timestep_index(timesteps, chunk[place]).cpu() for chunk in chunks]

    def by_step(energies: Sequence[Tensor]) -> Tensor:
        total = torch.zeros(len(timesteps), dtype=torch.float64)
        for step, energy in zip(steps, energies, strict=True):
            total.index_add_(0, step, energy)
        return total

    def energy(i: int, values: Sequence[Tensor]) -> Tensor:
        return torch.stack([squares(v, len(steps[i])) for v in values]).sum(0)

    with torch.no_grad():
        full = [list(_tensors(reference(*chunk))) for chunk in chunks]
        base = [list(_tensors(floats(*chunk))) for chunk in chunks]
    signal = by_step([energy(i, outputs) for i, outputs in enumerate(full)])

    def against(expected: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Tensor]]) -> Tensor:
        pairs = zip(expected, found, strict=True)
        differences = [[e - f for e, f in zip(*pair, strict=True)] for pair in pairs]
        return by_step([energy(i, values) for i, values in enumerate(differences)]) / signal

    suffix = not writers(floats)
    found = dict[str, Tensor]()
    with Spill(memory) if memory else nullcontext(None) as spill:
        trial, walk = (Walk(floats, given, spill=spill) for given in (chunks, seen))

        @torch.no_grad()
        def tried(site: Site) -> Part:
            name, before = site.name, floats.get_submodule(site.name)
            noise = []
            for option in options(site, walk):
                floats.set_submodule(name, option)
                outputs = [
                    list(_tensors(trial.ahead(i) if suffix else floats(*chunk)))
                    for i, chunk in enumerate(chunks)
                ]
                noise.append(against(base, outputs))
            floats.set_submodule(name, before)
            return Part({name: {"noise": torch.stack(noise)}} if noise else {}, {})

        sites = [site for site in find_sites(quantized)[0] if site.name in names]
        for site in progress_bar(sites, "sensitivity", enabled=progress):
            own = replace(site, nodes=tuple(walk.node(node.name) for node in site.nodes))
            trial.stop_before(trial.node(own.nodes[0].name))
            part = finished(checkpoint, site.name, partial(tried, own), shared=True)
            found[site.name] = part.states[site.name]["noise"]
    return Sensitivity(found, against(full, base))


def _tensors(value: object) -> Iterator[Tensor]:
    """Every floating tensor in a graph's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
