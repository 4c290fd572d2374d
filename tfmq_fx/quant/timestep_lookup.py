"""Look up a table row by timestep, as a torch operator, and check a table's timesteps.

`torch.ops.tfmq_fx.timestep_row` is one node in an fx graph and in an exported one, and plain aten
operators under AOTAutograd, so that Inductor can fuse it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tfmq_fx.core.errors import ConfigError, InputError
from tfmq_fx.core.stages import Stage

_LIBRARY = torch.library.Library("tfmq_fx", "FRAGMENT")
_LIBRARY.define(
    "timestep_row(Tensor table, Tensor keys, Tensor t) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_SHOWN = 8  # values listed in an error message


def timestep_index(keys: Tensor, t: Tensor) -> Tensor:
    """The row of each timestep: (B,) int64, -1 where `t` is not one of `keys`.

    keys: (K,), ascending and unique, K >= 1.  t: (B,) or (), then B = 1.
    Values are compared exactly: as int64 if both are integers, else as float64.  NaN is no key.
    """
    wide = _wide(keys.dtype, t.dtype)
    known, sought = keys.to(wide), t.reshape(-1).to(wide).contiguous()
    # searchsorted alone would hand an unknown timestep the row of its neighbour
    row = torch.searchsorted(known, sought).clamp(max=known.shape[0] - 1)
    return torch.where(known[row] == sought, row, -1)


def _timestep_row(table: Tensor, keys: Tensor, t: Tensor) -> Tensor:
    if not (table.is_floating_point() or table.is_complex()):
        raise TypeError(f"timestep_row: table must hold floating-point rows, not {table.dtype}")
    index = timestep_index(keys, t)
    # Tracers (Dynamo, AOTAutograd, export, FakeTensor propagation) pass subclasses or set the flag.
    is_eager = type(index) is Tensor and not torch.compiler.is_compiling()
    if is_eager and index.device.type == "cpu":
        if bool((index < 0).any()):
            raise InputError(
                f"no table row for timestep {_show(find_unknown(keys, t))}; "
                f"the table knows {len(keys)} timesteps: {_show(keys.tolist())}"
            )
        return table.index_select(0, index)
    rows = table.index_select(0, index.clamp(min=0))
    hit = (index >= 0).view(-1, *[1] * (table.dim() - 1))
    return torch.where(hit, rows, float("nan"))


_LIBRARY.impl("timestep_row", _timestep_row, "CompositeImplicitAutograd")
timestep_row = torch.ops.tfmq_fx.timestep_row.default
"""timestep_row(table, keys, t) -> (B, F): the row of `table` for each timestep.

table: (K, F), floating point or complex.  keys: (K,), ascending, unique.
t: (B,) or (), then B = 1.
A timestep that is no key raises InputError in eager on the CPU.  In a compiled graph, and on other
devices, where nothing may wait for the result, its row is NaN: it never passes silently.
"""
timestep_row.stage = Stage.FOLDED  # type: ignore[attr-defined]


def find_unknown(keys: Tensor, t: Tensor) -> list[int | float]:
    """The distinct values in `t` that are no key, ascending; synchronises with the device."""
    flat = t.detach().reshape(-1)
    missing = timestep_index(keys, flat) < 0
    if not bool(missing.any()):  # the usual case synchronises once
        return []
    values: list[int | float] = flat[missing].unique().tolist()
    return values


def check_timesteps(values: Tensor | Sequence[int | float], dtype: torch.dtype) -> Tensor:
    """The keys (K,) of a model that receives timesteps as `dtype`: ascending int64 or float64.

    values: the finite set, one-dimensional, in any order.  They are rounded to `dtype` first, since
    keys are the values that the model receives.  Raises ConfigError if the set is empty, holds NaN
    or Inf, holds a value twice (after rounding), or holds one that an integer `dtype` cannot.
    """
    # as numpy reads it: torch would round Python's floats to the default dtype
    exact = torch.as_tensor(values if isinstance(values, Tensor) else np.asarray(values)).detach()
    if exact.dim() != 1:
        raise ConfigError(f"timesteps must be one-dimensional, got shape {tuple(exact.shape)}")
    if len(exact) == 0:
        raise ConfigError("timesteps are empty: a table needs at least one row")
    if exact.is_complex() or exact.dtype == torch.bool:
        raise ConfigError(f"timesteps must be integers or floats, got {exact.dtype}")
    if exact.is_floating_point() and not bool(torch.isfinite(exact).all()):
        raise ConfigError("timesteps hold NaN or Inf")
    received = exact.to(dtype)
    if not dtype.is_floating_point:
        if lost := exact[received.to(exact.dtype) != exact].tolist():
            raise ConfigError(f"the model takes {dtype} timesteps, which cannot hold {_show(lost)}")
    elif not bool(torch.isfinite(received).all()):
        raise ConfigError(f"timesteps overflow {dtype}, in which the model takes them")
    keys = received.to(_wide(dtype)).sort().values
    if repeated := keys[1:][keys[1:] == keys[:-1]].unique().tolist():
        raise ConfigError(f"duplicate timesteps (as {dtype}): {_show(repeated)}")
    return keys


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if any(d.is_floating_point for d in dtypes) else torch.int64


def _show(values: Sequence[int | float]) -> str:
    text = ", ".join(map(str, values[:_SHOWN]))
    return f"{text}, ... ({len(values)} in all)" if len(values) > _SHOWN else text
