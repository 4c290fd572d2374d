"""Measure the output error of quantizing one layer at a time, per timestep and candidate format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

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
    """A float layer that is called like a quantized one: (x, scale) -> layer(x)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Noise at the model's output relative to its signal: error energy over energy.

    noise: site -> (options, K), the noise of each option of the site.
    rest: (K,), the noise with all of these sites in floating point (from cached tables and
    attention's own products).  Timesteps without a sample have NaN.
    """

    noise: dict[str, Tensor]
    rest: Tensor


Outputs = Sequence[Sequence[Tensor]]  # the tensors that a graph gives for each chunk

Options = Callable[[Site, LayerwiseExecutor], Sequence[nn.Module]]
"""Makes the candidate layers of a site, whose nodes belong to the executor and have not run yet."""


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
    """The noise of each option of the sites `names`, with all other sites in floating point.

    quantized: the graph with these sites quantized; only their calls are read.
    reference: the full-precision graph, with a layer of the same path for each site.
    options: makes the candidate layers of a site, called as the site is in `quantized`.
    chunks: placeholder values to measure on.  timesteps: (K,), the model's set.
    seen: placeholder values for the executor that `options` gets, in floating point.  memory: bytes
    of values between layers that stay in memory, the rest wait on disk; 0: all stay.
    checkpoint: holds finished sites.
    With many processes the first one measures, and sends the results to the others.
    """
    floats = fork(quantized)
    for name in names:
        floats.set_submodule(name, _AsFloat(reference.get_submodule(name)))
    position = timestep_position(floats)
    steps = [timestep_index(timesteps, chunk[position]).cpu() for chunk in chunks]

    def energies(outputs: Outputs, minus: Outputs | None = None) -> Tensor:
        """The sum of squares of outputs, or of their differences, at each timestep: (K,)."""
        total = torch.zeros(len(timesteps), dtype=torch.float64)
        for i, (step, tensors) in enumerate(zip(steps, outputs, strict=True)):
            if minus is not None:
                tensors = [a - b for a, b in zip(tensors, minus[i], strict=True)]
            total.index_add_(0, step, torch.stack([squares(x, len(step)) for x in tensors]).sum(0))
        return total

    with torch.no_grad():
        full = [_tensors(reference(*chunk)) for chunk in chunks]
        base = [_tensors(floats(*chunk)) for chunk in chunks]
    signal, writes = energies(full), bool(writers(floats))
    noise = dict[str, Tensor]()
    with ActivationStore(memory) if memory else nullcontext(None) as spill:
        trial, walk = (LayerwiseExecutor(floats, values, spill=spill) for values in (chunks, seen))

        @torch.no_grad()
        def measured(site: Site) -> Part:
            outputs = _trial_outputs(trial, site.name, options(site, walk), whole=writes)
            rows = [energies(base, output) / signal for output in outputs]
            return Part({site.name: {"noise": torch.stack(rows)}} if rows else {}, {})

        sites = [site for site in find_sites(quantized)[0] if site.name in names]
        for site in progress_bar(sites, "sensitivity", enabled=progress):
            own = replace(site, nodes=tuple(walk.node(node.name) for node in site.nodes))
            trial.stop_before(trial.node(own.nodes[0].name))
            part = finished(checkpoint, site.name, partial(measured, own), shared=True)
            noise[site.name] = part.states[site.name]["noise"]
    return Sensitivity(noise, energies(full, base) / signal)


def _trial_outputs(
    trial: LayerwiseExecutor, name: str, options: Sequence[nn.Module], *, whole: bool
) -> Iterator[Outputs]:
    """The outputs of the graph with each option in the place of the module `name`.

    whole: whether the graph runs from its beginning, which in-place writes require.
    """
    gm, before = trial.gm, trial.gm.get_submodule(name)
    for option in options:
        gm.set_submodule(name, option)
        yield [
            _tensors(gm(*chunk) if whole else trial.run_to_end(i))
            for i, chunk in enumerate(trial.chunks)
        ]
    gm.set_submodule(name, before)


def _tensors(value: object) -> list[Tensor]:
    """Every floating-point tensor in a graph's output."""
    leaves = pytree.tree_leaves(value)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
