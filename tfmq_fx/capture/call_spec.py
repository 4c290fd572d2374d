"""How calls of the original model map to the flat graph: bind arguments, rebuild the output.

Everything here is data and plain Python: a CallSpec survives JSON, and `bind` and `rebuild` can be
traced by torch.compile(fullgraph=True).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.core.errors import ConfigError, InputError

from .input_checks import BATCH, Input, check_tensor, check_timestep, shown
from .nested_values import (
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

    @property
    def timestep_position(self) -> int:
        """The index of the timestep among the placeholders."""
        return self.names.index(self.timestep)

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
                check_tensor(spec, value, sizes, self.fixed)
                device = value.device if device is None else device
        t = self.timestep_position
        values[t] = check_timestep(self.inputs[t], values[t], sizes, device)
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
            raise InputError(f"{path}: expected a list, one for each sample, got {shown(value)}")
        for i, item in enumerate(value):
            _collect(structure.children[0], item, f"{path}.{i}", values)
    elif structure.kind in ("list", "tuple"):
        if not isinstance(value, (list, tuple)) or len(value) != len(structure.children):
            raise InputError(
                f"{path}: expected a {structure.kind} of {len(structure.children)}, "
                f"got {shown(value)}"
            )
        for i, child in enumerate(structure.children):
            _collect(child, value[i], f"{path}.{i}", values)
    elif structure.kind == "dict":
        if not isinstance(value, dict) or set(value) != set(structure.keys):
            found = f"keys {list(value)}" if isinstance(value, dict) else shown(value)
            raise InputError(f"{path}: expected a dict with {list(structure.keys)}, got {found}")
        for key, child in zip(structure.keys, structure.children, strict=True):
            _collect(child, value[key], f"{path}.{key}", values)
    else:
        if not isinstance(value, structure.cls):
            raise InputError(f"{path}: expected a {structure.cls.__name__}, got {shown(value)}")
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
