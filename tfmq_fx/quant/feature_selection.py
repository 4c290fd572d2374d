"""Choose the form of each temporal feature under a byte budget (disturbance-aware selection).

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
    """The name of the choice to cache rows at `bits` bits."""
    return f"cache{bits}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A form that one feature can take: its mean relative error and its own size in bytes.

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
    """The form of each feature with the least total error within `budget` bytes (integer program).

    candidates: feature -> choice -> (error, bytes).  uses: feature -> layers of the block that it
    needs while it stays in the block.  module_bytes: layer -> bytes, counted once while any feature
    needs it.  Raises ConfigError naming the least budget that can be met, where `budget` cannot.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    choices = [(f, name) for f, options in candidates.items() for name in options]
    layers = sorted(set().union(*(uses[f] for f, name in choices if name == TIB)))
    none = [0.0] * len(layers)
    errors = np.array([candidates[f][name].error for f, name in choices] + none)
    costs = np.array(
        [candidates[f][name].bytes for f, name in choices] + [module_bytes[n] for n in layers],
        float,
    )
    one_each = [[float(f == feature) for f, _ in choices] + none for feature in candidates]
    needs = []  # a feature in the block needs its layers
    for i, (feature, name) in enumerate(choices):
        for layer in uses[feature] if name == TIB else ():
            row = np.zeros(len(costs))
            row[i], row[len(choices) + layers.index(layer)] = 1.0, -1.0
            needs.append(row)
    lower = [1.0] * len(one_each) + [-np.inf] * len(needs)
    upper = [1.0] * len(one_each) + [0.0] * len(needs)
    structure = LinearConstraint(np.array([*one_each, *needs]), lower, upper)
    whole = {
        "integrality": np.ones(len(costs)),
        "bounds": Bounds(0, 1),
        "options": {"mip_rel_gap": 0},
    }
    # Scaled, since the solver's tolerances are absolute (about 1e-6).
    shares = costs / max(costs.max(), 1)
    room = LinearConstraint(shares[None], -np.inf, budget / max(costs.max(), 1))
    solution = milp(
        errors / (errors.max() or 1) + _TIE * costs / max(costs.sum(), 1),
        constraints=[structure, room],
        **whole,
    ).x
    if solution is None:
        least = milp(shares, constraints=[structure], **whole)
        smallest = round(float(costs @ least.x.round()))
        raise ConfigError(
            f"temporal budget of {budget} bytes cannot be met: the smallest choice of features "
            f"takes {smallest} bytes. Raise TemporalSpec.budget to that or more."
        )
    return {f: name for (f, name), x in zip(choices, solution, strict=False) if x > 0.5}
