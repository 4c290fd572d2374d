"""Check one input of a call: its shape, dtype and device, or the timestep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tfmq_fx.core.errors import InputError

BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Input:
    """A placeholder of a graph.

    path: of the value in the model's arguments.  shape: a number for a fixed size, a name for a
    free one.
    """

    name: str
    path: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    device: str


def check_tensor(spec: Input, value: Any, sizes: dict[str, int], fixed: Sequence[str]) -> None:
    """Raise InputError unless a value fits its placeholder; adds its free sizes to `sizes`."""
    if not isinstance(value, Tensor):
        raise InputError(f"{spec.path}: expected a tensor, got {shown(value)}")
    if value.ndim != len(spec.shape):
        raise InputError(
            f"{spec.path}: expected {len(spec.shape)} dimensions {spec.shape}, "
            f"got {value.ndim} {tuple(value.shape)}"
        )
    if value.dtype != spec.dtype:
        raise InputError(
            f"{spec.path}: captured for {spec.dtype}, got {value.dtype}. Cast the input or "
            f"capture again."
        )
    if value.device.type != spec.device:
        raise InputError(
            f"{spec.path}: captured for device {spec.device}, got {value.device.type}. "
            f"Move the input or the model."
        )
    for i, expected in enumerate(spec.shape):
        size = value.shape[i]
        if isinstance(expected, str):
            if sizes.setdefault(expected, size) != size:
                raise InputError(
                    f"{spec.path}: dimension {i} is {size}, but {expected} is "
                    f"{sizes[expected]} in another input"
                )
        elif size != expected:
            raise InputError(
                f"{spec.path}: dimension {i} was captured as {expected}, got {size}. Capture "
                f"again with an example of that size{_freeing(spec, i, fixed)}."
            )


def plain_number(value: Any) -> Any:
    """A number or array of numpy as a Python number or a tensor; other values unchanged."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.tensor(np.ascontiguousarray(value)) if value.ndim else value.item()
    return value


def _freeing(spec: Input, dim: int, fixed: Sequence[str]) -> str:
    """The remedy, for an error message, that frees a dimension, or why it is fixed."""
    if fixed:
        return f"; the graph was captured where {' and '.join(fixed)}"
    if len(spec.shape) >= 4 and dim >= len(spec.shape) - 2:
        return f", or with dynamic={(BATCH, 'text', 'spatial')}, which frees height and width"
    return f", or free it: dynamic={{{spec.path!r}: {{{dim}: 'a name', ...}}, ...}}"


def largest(timesteps: Any) -> Any:
    """The largest timestep (batch,) of each sample, from one for each token (batch, ...); anything
    else unchanged."""
    if not isinstance(timesteps, Tensor) or timesteps.dim() < 2 or 0 in timesteps.shape:
        return timesteps
    return timesteps.flatten(1).amax(1)


def check_timestep(
    spec: Input, value: Any, sizes: dict[str, int], device: Any, dims: int = 1
) -> Tensor:
    """The timestep as (batch,) of the captured dtype.

    Numbers and tensors in double precision are rounded to float32, where the graph takes that;
    all else must be held exactly.
    dims: the number of dimensions in which forward takes it; all but the first have size one.
    """
    size = spec.shape[0]
    integral = not spec.dtype.is_floating_point
    value = plain_number(value)
    if isinstance(value, Tensor) and value.dim() == dims > 1 and value[:1].numel() == 1:
        value = value.flatten()
    expected = f"{spec.path}: expected a number, a 0-d tensor or a tensor (batch,), got"
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex() or value.ndim > 1:
            raise InputError(f"{expected} a {value.dtype} tensor of shape {tuple(value.shape)}")
        if value.dtype.is_floating_point and not _takes(spec.dtype, value):
            raise InputError(
                f"{spec.path}: captured for {spec.dtype}, got {value.dtype}. Cast the timestep or "
                f"capture again with that dtype."
            )
        rows = value.shape[0] if value.ndim == 1 else 1
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if integral and value % 1 != 0:  # NaN and Inf too
            raise InputError(
                f"{spec.path}: captured for integer timesteps ({spec.dtype}), got {value!r}. "
                f"Capture again with a float timestep."
            )
        rows = 1
    else:
        raise InputError(f"{expected} {shown(value)}")
    batch = sizes.setdefault(size, rows) if isinstance(size, str) else size
    if rows != 1 and rows != batch and dims == 0:
        raise InputError(
            f"{spec.path}: {rows} timesteps, but the model takes one number for all samples; give "
            "a number or a 0-d tensor"
        )
    if rows != 1 and rows != batch:
        raise InputError(f"{spec.path}: {rows} timesteps for a batch of {batch}")
    if not isinstance(value, Tensor):
        if not torch.compiler.is_compiling() and not _can_hold(spec.dtype, value):
            raise InputError(_not_held(spec, value))
        number = int(value) if integral else float(value)
        return torch.full((batch,), number, dtype=spec.dtype, device=device or spec.device)
    row = value.reshape(rows).to(device=device, dtype=spec.dtype)
    readable = type(row) is Tensor and row.device.type == "cpu"  # a GPU would have to be waited for
    rounds = not value.dtype.is_floating_point and row.dtype.is_floating_point
    if rounds and readable and not torch.compiler.is_compiling():
        for rounded, number in zip(row.tolist(), value.reshape(rows).tolist(), strict=True):
            if rounded != number:
                raise InputError(_not_held(spec, number))
    return row if rows == batch else row.expand(batch).contiguous()


def _takes(dtype: torch.dtype, value: Tensor) -> bool:
    """Whether a float tensor can arrive as `dtype`: a double as a single, like any number, others
    where their values are held exactly, which is read on the CPU alone."""
    if value.dtype == dtype:
        return True
    rounds = (value.dtype, dtype) == (torch.float64, torch.float32)
    readable = type(value) is Tensor and value.device.type == "cpu"
    if not dtype.is_floating_point or not readable or torch.compiler.is_compiling():
        return rounds
    there = value.detach().double()
    here = there.to(dtype).double()
    return bool((here.isfinite() == there.isfinite()).all() if rounds else torch.equal(here, there))


def _can_hold(dtype: torch.dtype, value: int | float) -> bool:
    """Whether a dtype can hold a number: an integer exactly, a float rounded but in range."""
    if not dtype.is_floating_point:
        return torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max
    if math.isfinite(value) and abs(value) > torch.finfo(dtype).max:
        return False
    return isinstance(value, float) or torch.tensor(value, dtype=dtype).item() == value


def _not_held(spec: Input, value: int | float) -> str:
    """The error message for a timestep that the captured dtype cannot hold."""
    return (
        f"{spec.path}: captured for {spec.dtype}, which cannot hold {value!r}. Give a timestep "
        "that it holds, or capture again with one of another dtype."
    )


def shown(value: Any) -> str:
    """The type of a value for an error message."""
    return type(value).__name__ if value is not None else "None"
