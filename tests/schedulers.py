"""Every scheduler that diffusers exports, made and set as its pipeline would."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers

ARGUMENTS: dict[str, dict[str, Any]] = {
    "AmusedScheduler": {"mask_token_id": 1},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "HeliosDMDScheduler": {"stage_index": 0},
    "HeliosScheduler": {"stage_index": 0},
    "SCMScheduler": {"intermediate_timesteps": None},
}
# which need a package that is not here, or a schedule of proteins
ABSENT = ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "RFD4ProteinaScheduler")


def _is_scheduler(name: str) -> bool:
    kind = None if name in ABSENT else getattr(diffusers, name)
    return inspect.isclass(kind) and hasattr(kind, "set_timesteps")


NAMES = [name for name in dir(diffusers) if name.endswith("Scheduler") and _is_scheduler(name)]


def make(name: str, steps: int | None = None, **config: Any) -> Any:
    """The scheduler, set to `steps`; None leaves it as from_pretrained does."""
    scheduler = getattr(diffusers, name)(**ARGUMENTS.get(name, {}), **config)
    if steps is not None:
        scheduler.set_timesteps(steps, **OPTIONS.get(name, {}))
    return scheduler
