"""Map calls of the original model to the flat graph: bind arguments, rebuild the output.

Everything here is data and plain Python: a CallSpec can be saved as JSON, and torch.compile with
fullgraph=True can trace `bind` and `rebuild`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.core.errors import ConfigError, InputError

from .input_checks import BATCH, Input, check_tensor, check_timestep, largest, shown
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
    """A condition on sizes that the model's code tested, and the outcome that the graph follows.

    text: the condition in words of the inputs.  source: the line that tested it.
    """

    expression: Expression
    holds: bool
    text: str
    source: str

    def allows(self, sizes: dict[str, int]) -> bool:
        """Whether the model's code would take the captured branch at these sizes."""
        return bool(evaluate(self.expression, sizes)) == self.holds


@dataclass(frozen=True, slots=True)
class Argument:
    """A parameter of forward.

    first: index of its first tensor among the placeholders.  omittable: whether its default is the
    captured value.
    """

    name: str
    structure: Structure
    first: int
    positional: bool
    omittable: bool


@dataclass(frozen=True)
class CallSpec:
    """The facts needed to call the flat graph like the original model.

    timestep: the placeholder that holds the timestep, always a tensor (batch,), or (1,) where
    forward takes one number for all samples.  timestep_form: the shape in which forward gets it,
    with -1 for the batch; () is a 0-d tensor.  per_token: the placeholder with a timestep for each
    token, where there is one; then `timestep` holds the largest of each sample, and forward does
    not get it.
    return_dict: forward's default of that name; None where forward has no such parameter.
    conditions: placeholders that are fixed for a whole request, judged by name.
    fixed: conditions in the model's code that made sizes in `inputs` numbers.
    copied: whether the graph gets copies of a call's tensors; a loaded graph that writes in place
    does, as it may write to tensors of the caller.
    """

    arguments: tuple[Argument, ...]
    inputs: tuple[Input, ...]
    timestep: str
    output: Structure
    return_dict: bool | None = None
    guards: tuple[Guard, ...] = ()
    conditions: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    timestep_form: tuple[int, ...] = (-1,)
    per_token: str | None = None
    copied: bool = dataclasses.field(default=False, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the placeholders, in order."""
        return tuple(spec.name for spec in self.inputs)

    @property
    def timestep_position(self) -> int:
        """The index of the timestep among the placeholders."""
        return self.names.index(self.timestep)

    @property
    def timestep_path(self) -> str:
        """The path of the timestep in the model's arguments."""
        name = self.per_token or self.timestep
        return self.inputs[self.names.index(name)].path

    def as_taken(self, values: Sequence[Any]) -> list[Any]:
        """The placeholder values in order, with the timestep as forward takes it."""
        taken = list(values)
        if self.timestep_form != (-1,):
            t = self.timestep_position
            taken[t] = taken[t].reshape(self.timestep_form)
        return taken

    def named_conditions(self, names: Sequence[str] | None) -> list[str]:
        """The placeholders of the conditions `names`, or of all conditions.

        A name may be that of an argument, a dotted path or a placeholder. Raises ConfigError for
        a name that is no input.
        """
        if names is None:
            return list(self.conditions)
        others = [spec for spec in self.inputs if spec.name != self.timestep]
        conditions: dict[str, None] = {}
        for name in [names] if isinstance(names, str) else names:
            named = [
                spec.name
                for spec in others
                if name in (spec.name, spec.path) or spec.path.startswith(f"{name}.")
            ]
            if not named:
                paths = ", ".join(spec.path for spec in others) or "none"
                raise ConfigError(f"no input {name!r} for a condition; choose from {paths}")
            conditions |= dict.fromkeys(named)
        return list(conditions)

    def sizes_of(self, values: Sequence[Tensor]) -> dict[str, int]:
        """The free sizes by name, as the placeholder values `values` have them."""
        return {
            name: size
            for spec, value in zip(self.inputs, values, strict=True)
            for name, size in zip(spec.shape, value.shape, strict=True)
            if isinstance(name, str)
        }

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], bool]:
        """The placeholder values for a call of the original model, and its return_dict."""
        named = self._by_name(args, kwargs)
        return_dict = bool(named.pop("return_dict", self.return_dict))
        values: list[Any] = []
        for argument in self.arguments:
            if argument.name in named:
                _collect(argument.structure, named[argument.name], argument.name, values)
            elif not argument.omittable:
                raise InputError(_omitted(argument))
        t = self.timestep_position
        if self.per_token is not None:
            values.insert(t, largest(values[self.names.index(self.per_token)]))
        sizes: dict[str, int] = {}
        device = None
        for spec, value in zip(self.inputs, values, strict=True):
            if spec.name != self.timestep:
                check_tensor(spec, value, sizes, self.fixed)
                device = value.device if device is None else device
        values[t] = check_timestep(
            self.inputs[t], values[t], sizes, device, dims=len(self.timestep_form)
        )
        for argument in self.arguments:
            structure, value = argument.structure, named.get(argument.name)
            per_sample = isinstance(structure, Branch) and structure.kind == "samples"
            if per_sample and value is not None and len(value) != sizes[BATCH]:
                raise InputError(f"{argument.name}: {len(value)} for a batch of {sizes[BATCH]}")
        for guard in self.guards:
            if not guard.allows(sizes):
                raise InputError(
                    f"the graph was captured where {guard.text} is {guard.holds} (tested at "
                    f"{guard.source}); this call has {sizes}. Capture again at these sizes."
                )
        return [value.clone() for value in values] if self.copied else values, return_dict

    def rebuild(self, flat: Sequence[Tensor], return_dict: bool = True) -> Any:
        """The original model's output from the graph's: an object of the original's type, or with
        return_dict=False the tuple of its fields that are not None."""
        output = self.output
        if self.return_dict is None or return_dict or not isinstance(output, Branch):
            return rebuild(output, flat)
        fields = [rebuild(child, flat) for child in output.children]
        return tuple([value for value in fields if value is not None])

    def moved(self, *, device: str | None = None, dtype: torch.dtype | None = None) -> CallSpec:
        """The spec for another device type or floating dtype; the timestep keeps its dtype."""
        inputs = []
        for spec in self.inputs:
            fixed = spec.name == self.timestep or not spec.dtype.is_floating_point
            kind = spec.dtype if fixed else dtype or spec.dtype
            inputs.append(dataclasses.replace(spec, device=device or spec.device, dtype=kind))
        return dataclasses.replace(self, inputs=tuple(inputs))

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name; raises InputError where forward does not take them."""
        order = [argument.name for argument in self.arguments if argument.positional]
        if len(args) > len(order):
            names = ", ".join(argument.name for argument in self.arguments[len(order) :])
            raise InputError(
                f"{len(args)} positional arguments given, at most {len(order)} taken"
                + (f"; give the others by name: {names}" if names else "")
            )
        named = dict(zip(order, args, strict=False))
        known = [argument.name for argument in self.arguments]
        for name, value in kwargs.items():
            if name in named:
                raise InputError(f"argument {name!r} is given twice")
            if name not in known:
                raise InputError(f"no argument {name!r}; the model takes {', '.join(known)}")
            named[name] = value
        return named

    def to_dict(self) -> dict[str, Any]:
        """The spec in JSON-ready form."""
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
            **({"timestep_form": list(self.timestep_form)} if self.timestep_form != (-1,) else {}),
            **({"per_token": self.per_token} if self.per_token else {}),
            "guards": [
                {**_fields(guard), "expression": dump_expression(guard.expression)}
                for guard in self.guards
            ],
        }


def _collect(structure: Structure, value: Any, path: str, values: list[Any]) -> None:
    """Append the tensors of `value` to `values`; raise InputError where its structure differs."""
    if isinstance(structure, Leaf):
        values.append(value)
    elif _no_options(structure, value, path):
        return
    elif isinstance(structure, Const):
        if isinstance(value, Tensor) or not (value is structure.value or value == structure.value):
            actual = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise InputError(
                f"{path}: captured as the constant {structure.value!r}, got {actual}. "
                f"Capture again with it among the example inputs."
            )
    else:
        keys, children = structure.keys, structure.children
        items: Sequence[Any]
        if structure.kind == "samples":
            if not isinstance(value, list):
                raise InputError(
                    f"{path}: expected a list, one for each sample, got {shown(value)}"
                )
            keys, children, items = tuple(range(len(value))), children * len(value), value
        elif structure.kind in ("list", "tuple"):
            if not isinstance(value, (list, tuple)) or len(value) != len(children):
                raise InputError(
                    f"{path}: expected a {structure.kind} of {len(children)}, got {shown(value)}"
                )
            items = value
        elif structure.kind == "dict":
            if not isinstance(value, dict) or set(value) != set(keys):
                actual = f"keys {list(value)}" if isinstance(value, dict) else shown(value)
                raise InputError(f"{path}: expected a dict with {list(keys)}, got {actual}")
            items = [value[key] for key in keys]
        else:
            if not isinstance(value, structure.cls):
                raise InputError(f"{path}: expected a {structure.cls.__name__}, got {shown(value)}")
            items = [getattr(value, key) for key in keys]
        for key, child, item in zip(keys, children, items, strict=True):
            _collect(child, item, f"{path}.{key}", values)


def _no_options(structure: Structure, value: Any, path: str) -> bool:
    """Whether an argument such as joint_attention_kwargs is None or {} both captured and now, which
    mean the same: diffusers' pipelines pass either."""
    empty = (Const(None), Branch("dict", (), ()))
    return path.endswith("_kwargs") and structure in empty and (value is None or value == {})


def _omitted(argument: Argument) -> str:
    """The error message for an argument that may not be left out."""
    if has_leaves(argument.structure):
        return f"missing argument {argument.name!r}"
    value = rebuild(argument.structure, ())
    return (
        f"argument {argument.name!r} was captured as {value!r}, which is not its default: pass "
        f"{argument.name}={value!r}, or capture again without it"
    )


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
