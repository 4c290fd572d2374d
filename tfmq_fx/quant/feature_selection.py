"""Disturbance-aware selection: which form each temporal feature takes, under a byte budget.

The journal extension of TFMQ-DM (arXiv 2407.19547) lets the temporal feature error choose between
keeping the quantized block and looking rows up. Here each feature chooses between the block, exact
rows and rows cached at 8 or 4 bits, to the least total error that fits the budget.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from tfmq_fx.core.errors import ConfigError

TIB = "tib"
TABLE = "table"
_TIE = 1e-6  # weight of all bytes against the largest error: prefers the smaller of equals


def cache_name(bits: int) -> str:
    """The choice of rows cached at `bits` bits."""
    return f"cache{bits}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One form of one feature: its mean relative error, and the bytes that it alone takes.

    For the block, bytes are 0 here: its layers are shared and counted by `module_bytes`.
    """

    error: float
    bytes: int


def select(
    candidates: Mapping[str, Mapping[str, Candidate]],
    *,
    uses: Mapping[str, Collection[str]],
    module_bytes: Mapping[str, int],
    budget: int,
) -> dict[str, str]:
    """The choice for each feature: the least total error within `budget` bytes, by integer program.

    candidates: feature -> choice -> (error, bytes).  uses: feature -> layers of the block that it
    needs while it stays in the block.  module_bytes: layer -> bytes, counted once while any feature
    needs it.  Raises ConfigError naming the least budget that can be met, where `budget` cannot.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    choices = [(f, name) for f, options in candidates.items() for name in options]
    layers = sorted(set().union(*(uses[f] for f, name in choices if name == TIB)))
    position = {layer: len(choices) + i for i, layer in enumerate(layers)}
    size = len(choices) + len(layers)
    errors, costs = np.zeros(size), np.zeros(size)
    rows, lower, upper = [], [], []
    for feature in candidates:  # exactly one choice each
        rows.append([float(f == feature) for f, _ in choices] + [0.0] * len(layers))
        lower.append(1.0)
        upper.append(1.0)
    for i, (feature, name) in enumerate(choices):
        errors[i], costs[i] = candidates[feature][name].error, candidates[feature][name].bytes
        for layer in uses[feature] if name == TIB else ():  # the block needs its layers
            row = [0.0] * size
            row[i], row[position[layer]] = 1.0, -1.0
            rows.append(row)
            lower.append(-np.inf)
            upper.append(0.0)
    for layer, i in position.items():
        costs[i] = module_bytes[layer]
    structure = LinearConstraint(np.array(rows), lower, upper)
    whole = {
        "integrality": np.ones(size),
        "bounds": Bounds(0, 1),
        "options": {"mip_rel_gap": 0},
    }
    # Scaled, since the solver's tolerances are absolute (about 1e-6).
    shares = costs / max(costs.max(), 1)
    room = LinearConstraint(shares[None], -np.inf, budget / max(costs.max(), 1))
    found = milp(
        errors / (errors.max() or 1) + _TIE * costs / max(costs.sum(), 1),
        constraints=[structure, room],
        **whole,
    )
    if found.x is None:
        least = milp(shares, constraints=[structure], **whole)
        smallest = round(float(costs @ least.x.round()))
        raise ConfigError(
            f"temporal budget of {budget} bytes cannot be met: the smallest choice of features "
            f"takes {smallest} bytes. Raise TemporalSpec.budget to that or more."
        )
    return {f: name for (f, name), x in zip(choices, found.x, strict=False) if x > 0.5}
