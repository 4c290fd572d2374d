"""Return NaN where NaN arises inside a model on integer kernels: codes have none, so kernels count
it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from . import kernels
from .codes_layer import CpuCodesLayer


def mark_nans(run: Callable[..., Any], gm: fx.GraphModule) -> Callable[..., Any]:
    """Wrap `run`, which computes the lowered graph `gm`: results become NaN where a kernel
    quantized a NaN and no result shows one.

    The reference answers NaN then, in part or throughout; which part is not known here, so that
    all floating-point results become NaN. Where a result has a NaN already, as for a sample at an
    unknown timestep, results stay as they are. Codes that torch's own operators make of a NaN,
    not the kernels, go unseen. Calls in other threads are not mixed up.
    """
    if not any(isinstance(module, CpuCodesLayer) for module in gm.modules()):
        return run

    def noticing(*inputs: Tensor) -> Any:
        before = kernels.cpu_nan_count()
        results = run(*inputs)
        if kernels.cpu_nan_count() == before:
            return results
        values = [value for value in tree_leaves(results) if isinstance(value, Tensor)]
        if any(bool(value.isnan().any()) for value in values):
            return results
        return tree_map_only(Tensor, _nan_like, results)

    return noticing


def _nan_like(value: Tensor) -> Tensor:
    return value.new_full(value.shape, float("nan")) if value.is_floating_point() else value
