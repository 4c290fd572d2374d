"""Choose a format for each layer: the least noise within limits, by integer programming.

The noise of different layers adds up at the model's output, step by step. The objective is the mean
over steps of its logarithm, which is the output SQNR. It is minimised by a series of linear
programmes, each with every step weighted by one over the noise that the last solution left there,
until the solution stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_ROUNDS = 20  # of weighting the steps anew; it settles in three to five
_TIE = 1e-6  # weight of all costs against all noise: prefers the cheaper of equals
_MOST = 1e6  # bound of the coefficients
_SLACK = 1e-9  # of a limit, for rounding in the solver


def allocate(
    noise: Sequence[Array],
    costs: Sequence[Sequence[Array]],
    *,
    limits: Sequence[float],
    rest: Array,
) -> list[int] | None:
    """The index of the option of each site, or None where no choice keeps all limits.

    noise: for each site (options, K).  costs: for each limit, for each site (options,).
    limits: upper bounds of the sums of costs; inf is no limit.
    rest: (K,), noise that no choice changes. Steps where it is NaN were not measured and do not
    count; all else is finite.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    seen = np.isfinite(rest)
    flat = np.concatenate([site[:, seen] for site in noise])
    owner = np.repeat(np.arange(len(noise)), [len(site) for site in noise])
    starts, size = np.searchsorted(owner, np.arange(len(noise))), len(owner)
    one_each = csr_array((np.ones(size), (owner, np.arange(size))), shape=(len(noise), size))
    constraints = [LinearConstraint(one_each, 1, 1)]
    prices = [np.concatenate(list(kind)).astype(float) for kind in costs]
    bound = [(p, limit) for p, limit in zip(prices, limits, strict=True) if np.isfinite(limit)]
    if bound:
        # scaled, since the solver's tolerances are absolute
        rows = vstack([csr_array(p[None] / max(limit, 1.0)) for p, limit in bound])
        upper = np.array([limit / max(limit, 1.0) + _SLACK for _, limit in bound])
        constraints.append(LinearConstraint(rows, -np.inf, upper))
    cheap = sum((p / max(p.sum(), 1e-300) for p in prices), np.zeros(size))

    def solve(weights: Array) -> list[int] | None:
        # relative to the noise left, clipped: the solver cannot handle much larger coefficients
        values = np.minimum(flat @ weights / len(weights), _MOST)
        solution = milp(
            values + _TIE * cheap,
            constraints=constraints,
            integrality=np.ones(size),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 1e-8, "time_limit": 60.0},
        ).x
        return None if solution is None else (np.flatnonzero(solution > 0.5) - starts).tolist()

    def left(chosen: Sequence[int]) -> Array:
        """The noise of a choice at each measured step: (K',)."""
        total: Array = flat[starts + np.array(chosen)].sum(0) + rest[seen]
        return total

    floor = 1e-30  # without any noise, any weights will do
    best = solve(1 / np.maximum(rest[seen] + flat.mean(0), floor))
    for _ in range(_ROUNDS if best is not None else 0):
        assert best is not None
        new = solve(1 / np.maximum(left(best), floor))
        if new is None or new == best:
            break
        before, after = (np.log(np.maximum(left(c), floor)).mean() for c in (best, new))
        if after >= before:
            break
        best = new
    return best
