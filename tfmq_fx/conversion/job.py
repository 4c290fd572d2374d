"""The state of a conversion between two steps: the graph so far, and all that a step may read."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from tfmq_fx.calibration.observers import Ranges
from tfmq_fx.core.config import Config
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.ir.graph_pass import Rewrite
from tfmq_fx.ir.held_values import EXAMPLES
from tfmq_fx.ir.opaque_layers import inner_sites
from tfmq_fx.ir.sites import Site, find_sites
from tfmq_fx.ir.temporal_block import TemporalBlock, temporal_block
from tfmq_fx.quant.bit_plan import BitPlan
from tfmq_fx.serialization.checkpoint import Checkpoint, digest

from .calibration_data import check_samples
from .models import Prepared
from .temporal_forms import TemporalChoice


class Samples:
    """The calibration samples of a prepared model, drawn when a step first reads them.

    used: how many there are, 0 as long as no step has read them.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared, self.used = prepared, 0

    @functools.cached_property
    def chunks(self) -> list[tuple[Tensor, ...]]:
        """Placeholder values of the captured graph, one tuple for each batch of samples.

        Raises CalibrationError where calibration has not run.
        """
        prepared, spec = self._prepared, self._prepared.recipe.reconstruction
        check_samples(prepared.cache)
        chunks = prepared.cache.chunks(
            spec.samples,
            batched=prepared.batched(),
            batch_size=prepared.fixed_batch or spec.batch_size,
            whole=prepared.fixed_batch is not None,
            seed=spec.seed,
            center=spec.center if spec.sampling == "normal" else None,
            held=self.held(),
        )
        self.used = sum(len(prepared.timestep_of(chunk)) for chunk in chunks)
        return chunks

    def held(self) -> dict[int, Tensor]:
        """The batched masks and ids, by position, from which the graph holds values."""
        prepared, held = self._prepared, self._prepared.gm.meta.get(EXAMPLES, {})
        if prepared.fixed_batch is None:
            return {}
        return {
            position: held[name]
            for position, (name, batched) in enumerate(
                zip(prepared.call.names, prepared.batched(), strict=True)
            )
            if batched and name in held and not held[name].is_floating_point()
        }

    @functools.cached_property
    def weights(self) -> list[Tensor] | None:
        """The weights of the samples of each chunk, by how often their timestep was visited.

        None: all are the same, or the timesteps were drawn.
        """
        prepared = self._prepared
        if prepared.recipe.reconstruction.sampling == "normal":
            return None
        return prepared.cache.weights([prepared.timestep_of(chunk) for chunk in self.chunks])


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The entry of one step in the log: how long it took, or why it was left out."""

    name: str
    guarantee: str
    seconds: float = 0.0
    skipped: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The state of a conversion before a step. It never changes: steps return a new one.

    prepared: the model that `convert` takes.  timesteps: (K,) sorted, the finite set.  visits: (K,)
    how often calibration visited each.  progress: whether long steps show a bar.
    captured: the graph to begin with.  gm: the graph so far.  reference: the last graph of stage
    CAPTURED, which later steps compare with as full precision.
    plan: the configuration of each layer, by module path.  samples: the calibration samples.
    ranges: the calibrated input range of each layer.  products: those of attention's operands.
    temporal: the form chosen for each temporal feature.  bits: the bit widths, chosen or replayed.
    passes: the reports of the graph passes, in order.  log: one entry for each step so far.
    marks: digests of the graphs that the user's own steps returned; see `parts`.
    """

    prepared: Prepared
    timesteps: Tensor
    visits: Tensor
    captured: fx.GraphModule
    gm: fx.GraphModule
    reference: fx.GraphModule
    plan: Mapping[str, LayerConfig]
    samples: Samples
    budget: object = None
    bits: BitPlan | None = None
    checkpoint: Checkpoint | None = None
    progress: bool = False
    ranges: Mapping[str, Ranges] = field(default_factory=dict)
    products: Mapping[str, Any] | None = None
    temporal: TemporalChoice = field(default_factory=lambda: TemporalChoice({}))
    block: TemporalBlock | None = None
    passes: tuple[Rewrite, ...] = ()
    log: tuple[StepRecord, ...] = ()
    marks: tuple[str, ...] = ()

    @property
    def recipe(self) -> Config:
        """The configuration that `prepare` took."""
        return self.prepared.recipe

    @property
    def quantizes(self) -> bool:
        """Whether any layer is to get integer or 8-bit float weights."""
        return any(layer.weights for layer in self.plan.values())

    @property
    def sites(self) -> list[Site]:
        """The convolution and linear layers of the graph, in execution order."""
        return find_sites(self.gm)[0]

    def temporal_block(self) -> TemporalBlock:
        """The part of the full-precision graph that depends on the timestep alone."""
        return self.block or temporal_block(self.reference)

    def applied(self, *rewrites: Rewrite, **changes: Any) -> Job:
        """The job with the graph of the last of `rewrites`, and all of them recorded in `passes`.

        changes: other fields to set.  A CAPTURED graph becomes the reference, and its new layers
        get the recipe's layer configuration unless `changes` has a plan.
        """
        if not rewrites:
            return replace(self, **changes)
        gm = rewrites[-1].gm
        if stage_of(gm) is Stage.CAPTURED:
            names = [site.name for site in (*find_sites(gm)[0], *inner_sites(gm)[0])]
            plan = changes.get("plan", self.plan)
            plan = {name: plan.get(name, self.recipe.layers) for name in names}
            changes = {"reference": gm, "block": None, **changes, "plan": plan}
        return replace(self, gm=gm, passes=(*self.passes, *rewrites), **changes)

    def parts(self, step: str) -> Checkpoint | None:
        """The part of the checkpoint that holds a step's finished work; None without a checkpoint.

        Other bit widths, or other graphs from the user's own steps, have parts of their own.
        """
        if self.checkpoint is None:
            return None
        marks = list(self.marks)
        if self.bits is not None:
            marks.append(digest({n: s.chosen for n, s in self.bits.sites.items()})[:12])
        return self.checkpoint.within(" ".join([step, *marks]))

    def marked(self) -> Job:
        """The job with a digest of its graph as a mark, by which `parts` tells graphs apart."""
        tensors = [*self.gm.named_parameters(), *self.gm.named_buffers()]
        mark = digest([self.gm.code, [list(pair) for pair in tensors], repr(dict(self.plan))])
        return replace(self, marks=(*self.marks, mark[:12]))
