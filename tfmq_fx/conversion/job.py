"""The state of a conversion between two of its steps: the graph, and all that a step may read."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from tfmq_fx.calibration.observers import Ranges
from tfmq_fx.core.config import Config
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.ir.graph_pass import Rewrite
from tfmq_fx.ir.sites import Site, find_sites
from tfmq_fx.ir.temporal_block import TemporalBlock, temporal_block
from tfmq_fx.quant.bit_plan import BitPlan
from tfmq_fx.serialization.checkpoint import Checkpoint, digest

from .calibration_data import sample_chunks, sample_count, sample_weights
from .models import Prepared
from .temporal_forms import TemporalChoice


class Samples:
    """The calibration samples of a prepared model, read when a step first asks for them.

    used: how many there are, 0 as long as no step has asked.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared, self.used = prepared, 0

    @functools.cached_property
    def chunks(self) -> list[tuple[Tensor, ...]]:
        """Placeholder values of the captured graph, one tuple for each batch of samples.

        Raises CalibrationError where calibration has not run.
        """
        chunks = sample_chunks(self._prepared)
        self.used = sample_count(self._prepared, chunks)
        return chunks

    @functools.cached_property
    def weights(self) -> list[Tensor] | None:
        """The weight of each sample, by how often its timestep was visited; None: all the same."""
        return sample_weights(self._prepared, self.chunks)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What became of a step: how long it took, or why it was left out."""

    name: str
    guarantee: str
    seconds: float = 0.0
    skipped: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A conversion as it stands before a step. Steps return a new one; this one never changes.

    prepared: what `convert` was given.  timesteps: (K,) sorted, the finite set.  visits: (K,) how
    often calibration visited each.  progress: whether long steps show a bar.
    captured: the graph to begin with.  gm: the graph so far.  reference: the last graph of stage
    CAPTURED, which later steps compare with as full precision.
    plan: what each layer becomes, by module path.
    samples: the calibration samples, read when first asked for.
    ranges: the calibrated input range of each layer.  products: those of attention's operands.
    temporal: the form chosen for each temporal feature.  bits: the bit widths chosen or given.
    passes: what the graph passes reported, in order.  log: what became of each step so far.
    marks: what steps of the user's own made of the graph; see `parts`.
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
        """The configuration that `prepare` was given."""
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
        """What depends on the timestep alone in the full-precision graph."""
        return self.block or temporal_block(self.reference)

    def applied(self, *rewrites: Rewrite, **changes: Any) -> Job:
        """The job with the graph of the last of `rewrites`, and all of them on record.

        changes: other fields to set.  Layers that are new in a CAPTURED graph are planned as the
        recipe plans layers, unless `changes` has a plan; the graph becomes the reference.
        """
        if not rewrites:
            return replace(self, **changes)
        gm = rewrites[-1].gm
        if stage_of(gm) is Stage.CAPTURED:
            names = [site.name for site in find_sites(gm)[0]]
            plan = changes.get("plan", self.plan)
            plan = {name: plan.get(name, self.recipe.layers) for name in names}
            changes = {"reference": gm, "block": None, **changes, "plan": plan}
        return replace(self, gm=gm, passes=(*self.passes, *rewrites), **changes)

    def parts(self, step: str) -> Checkpoint | None:
        """Where a step finds and puts its finished parts; None without a checkpoint.

        Parts of other bit widths, or of a graph that steps of the user's own made another, are kept
        apart.
        """
        if self.checkpoint is None:
            return None
        marks = list(self.marks)
        if self.bits is not None:
            marks.append(digest({n: s.chosen for n, s in self.bits.sites.items()})[:12])
        return self.checkpoint.within(" ".join([step, *marks]))

    def marked(self) -> Job:
        """The job with what its graph computes as a mark, by which `parts` tells graphs apart."""
        tensors = [*self.gm.named_parameters(), *self.gm.named_buffers()]
        mark = digest([self.gm.code, [list(pair) for pair in tensors], repr(dict(self.plan))])
        return replace(self, marks=(*self.marks, mark[:12]))

    def untouched(self) -> Collection[str]:
        """Layers that the rounding steps leave alone, since TIAR has rounded them."""
        return self.temporal.layers if self.recipe.temporal.tiar_iters else {}
