"""What each layer alone costs the model's output, at each timestep and for each thing it may be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx, nn

from tfmq_fx.calibration.activation_store import ActivationStore
from tfmq_fx.calibration.executor import LayerwiseExecutor
from tfmq_fx.core.progress import progress_bar
from tfmq_fx.ir.graph import fork, timestep_position
from tfmq_fx.ir.node_info import writers
from tfmq_fx.ir.sites import Site, find_sites
from tfmq_fx.quant.sqnr import squares
from tfmq_fx.quant.timestep_lookup import timestep_index
from tfmq_fx.serialization.checkpoint import Checkpoint, Part, finished


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


Outputs = Sequence[Sequence[Tensor]]  # the tensors that a graph gives for each chunk

Options = Callable[[Site, LayerwiseExecutor], Sequence[nn.Module]]
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
    energies = _Energies(floats, chunks, timesteps)
    with torch.no_grad():
        full = [list(_tensors(reference(*chunk))) for chunk in chunks]
        base = [list(_tensors(floats(*chunk))) for chunk in chunks]
    signal, writes = energies(full), bool(writers(floats))
    found = dict[str, Tensor]()
    with ActivationStore(memory) if memory else nullcontext(None) as spill:
        trial, walk = (LayerwiseExecutor(floats, given, spill=spill) for given in (chunks, seen))

        @torch.no_grad()
        def tried(site: Site) -> Part:
            answers = _answers(trial, site.name, options(site, walk), whole=writes)
            noise = [energies(_differences(base, answer)) / signal for answer in answers]
            return Part({site.name: {"noise": torch.stack(noise)}} if noise else {}, {})

        sites = [site for site in find_sites(quantized)[0] if site.name in names]
        for site in progress_bar(sites, "sensitivity", enabled=progress):
            own = replace(site, nodes=tuple(walk.node(node.name) for node in site.nodes))
            trial.stop_before(trial.node(own.nodes[0].name))
            part = finished(checkpoint, site.name, partial(tried, own), shared=True)
            found[site.name] = part.states[site.name]["noise"]
    return Sensitivity(found, energies(_differences(full, base)) / signal)


class _Energies:
    """Called with a graph's outputs: the sum of their squares at each of K timesteps, (K,)."""

    def __init__(
        self, gm: fx.GraphModule, chunks: Sequence[Sequence[Tensor]], timesteps: Tensor
    ) -> None:
        position = timestep_position(gm)
        self.steps = [timestep_index(timesteps, chunk[position]).cpu() for chunk in chunks]
        self.count = len(timesteps)

    def __call__(self, outputs: Outputs) -> Tensor:
        total = torch.zeros(self.count, dtype=torch.float64)
        for step, tensors in zip(self.steps, outputs, strict=True):
            total.index_add_(0, step, torch.stack([squares(x, len(step)) for x in tensors]).sum(0))
        return total


def _differences(expected: Outputs, found: Outputs) -> Outputs:
    """expected - found, tensor by tensor."""
    pairs = zip(expected, found, strict=True)
    return [[e - f for e, f in zip(*pair, strict=True)] for pair in pairs]


def _answers(
    trial: LayerwiseExecutor, name: str, options: Sequence[nn.Module], *, whole: bool
) -> Iterator[Outputs]:
    """The outputs of the graph with each option in the place of the module `name`.

    whole: whether it runs from its beginning, as it must where it writes in place.
    """
    gm, before = trial.gm, trial.gm.get_submodule(name)
    for option in options:
        gm.set_submodule(name, option)
        yield [
            list(_tensors(gm(*chunk) if whole else trial.run_to_end(i)))
            for i, chunk in enumerate(trial.chunks)
        ]
    gm.set_submodule(name, before)


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
