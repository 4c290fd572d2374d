"""How calls of the original model map to the flat graph: bind arguments, rebuild the output.

Everything here is data and plain Python: a CallSpec survives JSON, and `bind` and `rebuild` can be
traced by torch.compile(fullgraph=True).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError, InputError
from .structure import (
    Branch,
    Const,
    Expression,
    Leaf,
    Structure,
    dump,
    dump_expression,
    evaluate,
    has_leaves,
    rebuild,
)

BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Guard:
    """A condition on sizes that the model's own code tested: the graph follows one outcome of it.

    text: the condition in words of the inputs.  source: the line that tested it.
    """

    expression: Expression
    holds: bool
    text: str
    source: str

    def allows(self, sizes: dict[str, int]) -> bool:
        """Whether the code would take the captured branch at these sizes."""
        return bool(evaluate(self.expression, sizes)) == self.holds


@dataclass(frozen=True, slots=True)
class Argument:
    """A parameter of forward. first: index of its first tensor among the placeholders.

    omittable: leaving it out means what was captured (its default is the captured value).
    """

    name: str
    structure: Structure
    first: int
    positional: bool
    omittable: bool


@dataclass(frozen=True, slots=True)
class Input:
    """A placeholder. shape: a number for a fixed size, a name for a free one."""

    name: str
    path: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class CallSpec:
    """Everything needed to call the flat graph like the original model.

    timestep: the placeholder that holds the timestep, always a tensor (batch,).
    return_dict: forward's default of that name; None where forward has no such parameter.
    conditions: placeholders that are fixed for a whole request, judged by name.
    fixed: what the model's code holds sizes to that are numbers in `inputs` for that reason.
    copied: whether the graph gets copies of a call's tensors; a loaded graph that writes in place
    does, as it may write to what the caller holds.
    """

    arguments: tuple[Argument, ...]
    inputs: tuple[Input, ...]
    timestep: str
    output: Structure
    return_dict: bool | None = None
    guards: tuple[Guard, ...] = ()
    conditions: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    copied: bool = dataclasses.field(default=False, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Placeholder names, in order."""
        return tuple(spec.name for spec in self.inputs)

    def named_conditions(self, names: Sequence[str] | None) -> list[str]:
        """Placeholders of the inputs that are fixed for a request: those named (by input, dotted
        path or placeholder), or all that may be. Raises ConfigError for a name that is no input."""
        if names is None:
            return list(self.conditions)
        others = [spec for spec in self.inputs if spec.name != self.timestep]
        found: dict[str, None] = {}
        for name in [names] if isinstance(names, str) else names:
            named = [
                spec.name
                for spec in others
                if name in (spec.name, spec.path) or spec.path.startswith(f"{name}.")
            ]
            if not named:
                paths = ", ".join(spec.path for spec in others) or "none"
                raise ConfigError(f"no input {name!r} for a condition; choose from {paths}")
            found |= dict.fromkeys(named)
        return list(found)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], bool]:
        """Placeholder values in order for a call of the original, and whether a dict is wanted."""
        given = self._by_name(args, kwargs)
        return_dict = bool(given.pop("return_dict", self.return_dict))
        values: list[Any] = []
        for argument in self.arguments:
            if argument.name in given:
                _collect(argument.structure, given[argument.name], argument.name, values)
            elif not argument.omittable:
                raise InputError(_omitted(argument))
        sizes: dict[str, int] = {}
        device = None
        for spec, value in zip(self.inputs, values, strict=True):
            if spec.name != self.timestep:
                _check_tensor(spec, value, sizes, self.fixed)
                device = value.device if device is None else device
        for i, spec in enumerate(self.inputs):
            if spec.name == self.timestep:
                values[i] = _timestep(spec, values[i], sizes, device)
        for argument in self.arguments:
            if _is_per_sample(argument) and argument.name in given:
                count = len(given[argument.name])
                if count != sizes[BATCH]:
                    raise InputError(f"{argument.name}: {count} for a batch of {sizes[BATCH]}")
        for guard in self.guards:
            if not guard.allows(sizes):
                raise InputError(
                    f"the graph was captured where {guard.text} is {guard.holds} (tested at "
                    f"{guard.source}); this call has {sizes}. Capture again at these sizes."
                )
        return [value.clone() for value in values] if self.copied else values, return_dict

    def rebuild(self, flat: Sequence[Tensor], return_dict: bool = True) -> Any:
        """The original's output from the graph's: its own type, or with return_dict=False the
        tuple of its fields that are not None."""
        output = self.output
        if self.return_dict is None or return_dict or not isinstance(output, Branch):
            return rebuild(output, flat)
        fields = [rebuild(child, flat) for child in output.children]
        return tuple([value for value in fields if value is not None])

    def moved(self, *, device: str | None = None, dtype: torch.dtype | None = None) -> CallSpec:
        """The spec after the graph went to another device type or floating dtype; the timestep's
        dtype stays."""
        inputs = tuple(
            dataclasses.replace(
                spec,
                device=device or spec.device,
                dtype=dtype
                if dtype and spec.dtype.is_floating_point and spec.name != self.timestep
                else spec.dtype,
            )
            for spec in self.inputs
        )
        return dataclasses.replace(self, inputs=inputs)

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        order = [argument.name for argument in self.arguments if argument.positional]
        if len(args) > len(order):
            names = ", ".join(argument.name for argument in self.arguments[len(order) :])
            raise InputError(
                f"{len(args)} positional arguments given, at most {len(order)} taken"
                + (f"; give the others by name: {names}" if names else "")
            )
        given = dict(zip(order, args, strict=False))
        known = [argument.name for argument in self.arguments]
        for name, value in kwargs.items():
            if name in given:
                raise InputError(f"argument {name!r} is given twice")
            if name not in known:
                raise InputError(f"no argument {name!r}; the model takes {', '.join(known)}")
            given[name] = value
        return given

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "arguments": [
                {**_fields(argument), "structure": dump(argument.structure)}
                for argument in self.arguments
            ],
            "inputs": [
                {**_fields(spec), "shape": list(spec.shape), "dtype": str(spec.dtype)[6:]}
                for spec in self.inputs
            ],
            "timestep": self.timestep,
            "output": dump(self.output),
            "return_dict": self.return_dict,
            "conditions": list(self.conditions),
            **({"fixed": list(self.fixed)} if self.fixed else {}),
            "guards": [
                {**_fields(guard), "expression": dump_expression(guard.expression)}
                for guard in self.guards
            ],
        }


def _collect(structure: Structure, value: Any, path: str, values: list[Any]) -> None:
    """Append the tensors of `value` to `values`; refuse what the captured structure has not."""
    if isinstance(structure, Leaf):
        values.append(value)
    elif _no_options(structure, value, path):
        return
    elif isinstance(structure, Const):
        if isinstance(value, Tensor) or not (value is structure.value or value == structure.value):
            found = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise InputError(
                f"{path}: captured as the constant {structure.value!r}, got {found}. "
                f"Capture again with it among the example inputs."
            )
    elif structure.kind == "samples":
        if not isinstance(value, list):
            raise InputError(
                f"{path}: expected a list, one for each sample, got {_describe(value)}"
            )
        for i, item in enumerate(value):
            _collect(structure.children[0], item, f"{path}.{i}", values)
    elif structure.kind in ("list", "tuple"):
        if not isinstance(value, (list, tuple)) or len(value) != len(structure.children):
            raise InputError(
                f"{path}: expected a {structure.kind} of {len(structure.children)}, "
                f"got {_describe(value)}"
            )
        for i, child in enumerate(structure.children):
            _collect(child, value[i], f"{path}.{i}", values)
    elif structure.kind == "dict":
        if not isinstance(value, dict) or set(value) != set(structure.keys):
            found = f"keys {list(value)}" if isinstance(value, dict) else _describe(value)
            raise InputError(f"{path}: expected a dict with {list(structure.keys)}, got {found}")
        for key, child in zip(structure.keys, structure.children, strict=True):
            _collect(child, value[key], f"{path}.{key}", values)
    else:
        if not isinstance(value, structure.cls):
            raise InputError(f"{path}: expected a {structure.cls.__name__}, got {_describe(value)}")
        for key, child in zip(structure.keys, structure.children, strict=True):
            _collect(child, getattr(value, key), f"{path}.{key}", values)


def _is_per_sample(argument: Argument) -> bool:
    return isinstance(argument.structure, Branch) and argument.structure.kind == "samples"


def _no_options(structure: Structure, value: Any, path: str) -> bool:
    """Whether an argument like joint_attention_kwargs is empty in both: None and {} say the same,
    and diffusers' pipelines pass either."""
    empty = isinstance(structure, Branch) and structure.kind == "dict" and not structure.keys
    none = isinstance(structure, Const) and structure.value is None
    nothing = value is None or (isinstance(value, dict) and not value)
    return path.endswith("_kwargs") and (empty or none) and nothing


def _check_tensor(spec: Input, value: Any, sizes: dict[str, int], fixed: Sequence[str]) -> None:
    if not isinstance(value, Tensor):
        raise InputError(f"{spec.path}: expected a tensor, got {_describe(value)}")
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
        found = value.shape[i]
        if isinstance(expected, str):
            if expected not in sizes:
                sizes[expected] = found
            elif found != sizes[expected]:
                raise InputError(
                    f"{spec.path}: dimension {i} is {found}, but {expected} is "
                    f"{sizes[expected]} in another input"
                )
        elif found != expected:
            raise InputError(
                f"{spec.path}: dimension {i} was captured as {expected}, got {found}. Capture "
                f"again with an example of that size{_freeing(spec, i, fixed)}."
            )


def plain_number(value: Any) -> Any:
    """A number of numpy, or an array of numbers, as torch takes it; all else as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.tensor(np.ascontiguousarray(value)) if value.ndim else value.item()
    return value


def _freeing(spec: Input, dim: int, fixed: Sequence[str]) -> str:
    """How else a dimension can be other than it was, or why it cannot."""
    if fixed:
        return f"; the graph was captured where {' and '.join(fixed)}"
    if len(spec.shape) >= 4 and dim >= len(spec.shape) - 2:
        return f", or with dynamic={(BATCH, 'text', 'spatial')}, which frees height and width"
    return f", or free it: dynamic={{{spec.path!r}: {{{dim}: 'a name', ...}}, ...}}"


def _timestep(spec: Input, value: Any, sizes: dict[str, int], device: Any) -> Tensor:
    """The timestep as (batch,) of the captured dtype."""
    size = spec.shape[0]
    integral = not spec.dtype.is_floating_point
    value = plain_number(value)
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex() or value.ndim > 1:
            raise InputError(
                f"{spec.path}: expected a number, a 0-d tensor or a tensor (batch,), got a "
                f"{value.dtype} tensor of shape {tuple(value.shape)}"
            )
        if value.dtype.is_floating_point and value.dtype != spec.dtype:
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
        raise InputError(
            f"{spec.path}: expected a number, a 0-d tensor or a tensor (batch,), "
            f"got {_describe(value)}"
        )
    batch = sizes.setdefault(size, rows) if isinstance(size, str) else size
    if rows != 1 and rows != batch:
        raise InputError(f"{spec.path}: {rows} timesteps for a batch of {batch}")
    if not isinstance(value, Tensor):
        if not torch.compiler.is_compiling() and not _can_hold(spec.dtype, value):
            raise InputError(_not_held(spec, value))
        number = int(value) if integral else float(value)
        return torch.full((batch,), number, dtype=spec.dtype, device=device or spec.device)
    row = value.reshape(rows).to(device=device, dtype=spec.dtype)
    # on a device this would wait for it
    if not value.dtype.is_floating_point and row.dtype.is_floating_point and _is_at_hand(row):
        for found, given in zip(row.tolist(), value.reshape(rows).tolist(), strict=True):
            if found != given:
                raise InputError(_not_held(spec, given))
    return row if rows == batch else row.expand(batch).contiguous()


def _can_hold(dtype: torch.dtype, value: int | float) -> bool:
    """Whether a dtype holds a number: an integer as it is, others rounded but in range."""
    if not dtype.is_floating_point:
        return torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max
    limits = torch.finfo(dtype)
    if not math.isfinite(value):
        return True
    if abs(value) > limits.max:
        return False
    odd = abs(value) // max(value & -value, 1) if isinstance(value, int) else 0
    return odd < 2 / limits.eps


def _not_held(spec: Input, value: int | float) -> str:
    return (
        f"{spec.path}: captured for {spec.dtype}, which cannot hold {value!r}. Give a timestep "
        "that it holds, or capture again with one of another dtype."
    )


def _is_at_hand(value: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return type(value) is Tensor and value.device.type == "cpu"


def _describe(value: Any) -> str:
    return type(value).__name__ if value is not None else "None"


def _omitted(argument: Argument) -> str:
    if has_leaves(argument.structure):
        return f"missing argument {argument.name!r}"
    value = rebuild(argument.structure, ())
    return (
        f"argument {argument.name!r} was captured as {value!r}, which is not its default: pass "
        f"{argument.name}={value!r}, or capture again without it"
    )


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
