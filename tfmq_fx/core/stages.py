"""Define the stages of a graph, and the nodes that each allows."""

from __future__ import annotations

import enum
from typing import Any

from torch import fx

REPLACED = "replaced"  # node.meta: the reason why a layer does not compute what its class does


class Stage(enum.Enum):
    """The stage of a graph in the conversion. Values are the names used in saved files."""

    CAPTURED = "captured"  # torch-level ops and leaf torch.nn modules
    OBSERVED = "observed"  # + observers in front of quantizable layers
    FOLDED = "folded"  # + timestep_row look-ups and cached tables
    QUANTIZED = "quantized"  # + quantized modules with integer weights: the saved form
    LOWERED = "lowered"  # + modules written for one backend

    def allows(self, other: Stage) -> bool:
        """Whether nodes introduced by stage `other` are allowed in a graph of this stage."""
        return other in _ALLOWED[self]


_ALLOWED = {
    Stage.CAPTURED: {Stage.CAPTURED},
    Stage.OBSERVED: {Stage.CAPTURED, Stage.OBSERVED},
    Stage.FOLDED: {Stage.CAPTURED, Stage.FOLDED},
    Stage.QUANTIZED: {Stage.CAPTURED, Stage.FOLDED, Stage.QUANTIZED},
    Stage.LOWERED: {Stage.CAPTURED, Stage.FOLDED, Stage.QUANTIZED, Stage.LOWERED},
}


def stage_of(gm: fx.GraphModule) -> Stage:
    """The stage recorded in a graph's meta; CAPTURED if there is none."""
    stage = gm.meta.get("stage", Stage.CAPTURED)
    assert isinstance(stage, Stage)
    return stage


def introduced_by(target: Any) -> Stage:
    """The stage that introduces a module or function: its `stage` attribute, else CAPTURED."""
    stage = getattr(target, "stage", Stage.CAPTURED)
    return stage if isinstance(stage, Stage) else Stage.CAPTURED
