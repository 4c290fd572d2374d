"""Read a call specification from JSON, and check it, by itself and against its graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import torch
from torch import fx

from tfmq_fx.capture.call_spec import Argument, CallSpec, Guard
from tfmq_fx.capture.input_checks import Input
from tfmq_fx.capture.nested_values import OPERATORS, Branch, Const, Expression, Leaf, Structure
from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.core.output_classes import output_class
from tfmq_fx.ir.node_info import size_hint

from .json_values import dtype_named, fields, typed, words

_POWER = 16  # the highest in a size expression
_KINDS = ("dict", "list", "tuple", "object", "samples")
_CALL: dict[str, Any] = {
    **dict.fromkeys(("arguments", "inputs", "guards"), list),
    "timestep": str,
    "output": object,
    "return_dict": bool | None,
}
_BRANCH: dict[str, Any] = {"kind": str, "keys": list, "children": list, "class": str | None}
_T = TypeVar("_T")


def call_from_json(data: Any, where: str, outputs: Collection[type] = ()) -> CallSpec:
    """Return the specification that `CallSpec.to_dict` wrote.

    outputs: classes that it may name besides those of libraries (see `output_classes`).
    Raises ArtifactError, naming `where` and the place in it.
    """
    fields(data, where, "conditions fixed timestep_form per_token", **_CALL)
    inputs = tuple(_each(_input, data["inputs"], f"{where}.inputs"))
    sizes = {size for spec in inputs for size in spec.shape}
    arguments = _each(_argument, data["arguments"], f"{where}.arguments", outputs)
    call = CallSpec(
        arguments=tuple(arguments),
        inputs=inputs,
        timestep=data["timestep"],
        output=_structure(data["output"], f"{where}.output", outputs),
        return_dict=data["return_dict"],
        guards=tuple(_each(_guard, data["guards"], f"{where}.guards", sizes)),
        conditions=words(data.get("conditions", []), f"{where}.conditions"),
        fixed=words(data.get("fixed", []), f"{where}.fixed"),
        timestep_form=_form(data.get("timestep_form", [-1]), f"{where}.timestep_form"),
        per_token=_optional_name(data.get("per_token"), f"{where}.per_token"),
    )
    _check_sound(call, where)
    return call


def _each(read: Callable[..., _T], items: list[Any], where: str, *further: Any) -> list[_T]:
    """Read each item of a list, with its place for messages."""
    return [read(item, f"{where}[{i}]", *further) for i, item in enumerate(items)]


def check_fits(call: CallSpec, gm: fx.GraphModule, where: str) -> None:
    """Raise ArtifactError unless calls by this specification are calls of the graph."""
    nodes = list(gm.graph.find_nodes(op="placeholder"))
    names = [str(node.target) for node in nodes]
    if list(call.names) != names:
        raise ArtifactError(f"{where}.inputs: {list(call.names)}, but the graph takes {names}")
    sizes: dict[str, int] = {}
    for i, (spec, node) in enumerate(zip(call.inputs, nodes, strict=True)):
        value = node.meta.get("val")
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else None
        pairs = [*zip(spec.shape, shape or (), strict=False)]
        fixed = [(a, b) for a, b in pairs if isinstance(a, int) and isinstance(b, int)]
        if shape is None or len(shape) != len(spec.shape) or any(a != b for a, b in fixed):
            raise ArtifactError(
                f"{where}.inputs[{i}]: {spec.name} is {spec.shape}, and in the graph {shape}"
            )
        for size, actual in pairs:
            if isinstance(size, str):
                sizes.setdefault(size, size_hint(actual))
    (output,) = gm.graph.find_nodes(op="output")
    flat, count = output.args[0], len(list(_leaves(call.output)))
    if not isinstance(flat, (tuple, list)) or len(flat) != count:
        total = len(flat) if isinstance(flat, (tuple, list)) else "no list of tensors"
        raise ArtifactError(f"{where}.output: {count} tensors, but the graph gives {total}")
    for i, guard in enumerate(call.guards):
        try:
            guard.allows(sizes)
        except (ArithmeticError, TypeError) as error:
            raise ArtifactError(f"{where}.guards[{i}]: cannot be evaluated: {error}") from error


def _check_sound(call: CallSpec, where: str) -> None:
    """Raise ArtifactError where parts of a specification contradict each other."""
    named = {"arguments": [each.name for each in call.arguments], "inputs": list(call.names)}
    for kind, names in named.items():
        if len(set(names)) != len(names):
            raise ArtifactError(f"{where}.{kind}: a name is given twice in {names}")
    first = 0
    for i, argument in enumerate(call.arguments):
        count = _check_order(argument.structure, f"{where}.arguments[{i}].structure")
        if argument.first != first:
            raise ArtifactError(f"{where}.arguments[{i}].first: {argument.first}, not {first}")
        first += count
    derived = int(call.per_token is not None)
    if first + derived != len(call.inputs):
        raise ArtifactError(f"{where}.inputs: {len(call.inputs)}, but the arguments hold {first}")
    _check_order(call.output, f"{where}.output")
    shapes = {spec.name: spec.shape for spec in call.inputs}
    if len(shapes.get(call.timestep, ())) != 1:
        raise ArtifactError(f"{where}.timestep: {call.timestep!r} is no input of one dimension")
    if call.per_token is not None and len(shapes.get(call.per_token, ())) < 2:
        raise ArtifactError(f"{where}.per_token: {call.per_token!r} is no input of two dimensions")
    if call.per_token is not None and call.timestep != call.names[-1]:
        raise ArtifactError(f"{where}.timestep: {call.timestep!r} is not the last input")
    if unknown := sorted(set(call.conditions) - set(shapes)):
        raise ArtifactError(f"{where}.conditions: {unknown} are no inputs")


def _form(data: Any, where: str) -> tuple[int, ...]:
    """Return the shape in which a model takes its timestep: (), or -1 and then ones."""
    form = tuple(data) if type(data) is list else None
    if form is None or form not in ((), (-1, *[1] * (len(form) - 1))):
        raise ArtifactError(f"{where}: {data!r:.80} is no shape of a timestep")
    return form


def _optional_name(data: Any, where: str) -> str | None:
    """Return a name, or None."""
    if data is not None and type(data) is not str:
        raise ArtifactError(f"{where}: {data!r:.80} is no name")
    return data


def _check_order(structure: Structure, where: str) -> int:
    """Return the number of tensors in a structure, after checking that they are numbered from 0."""
    numbers = list(_leaves(structure))
    if numbers != list(range(len(numbers))):
        raise ArtifactError(f"{where}: its tensors are numbered {numbers[:20]}")
    return len(numbers)


def _leaves(structure: Structure) -> Iterator[int]:
    if isinstance(structure, Leaf):
        yield structure.index
    elif isinstance(structure, Branch):
        for child in structure.children:
            yield from _leaves(child)


def _input(data: Any, where: str) -> Input:
    fields(data, where, name=str, path=str, shape=list, dtype=object, device=str)
    if not all(type(n) is str or (type(n) is int and n >= 0) for n in data["shape"]):
        raise ArtifactError(f"{where}.shape: {data['shape']!r:.80} is no list of sizes and names")
    dtype = dtype_named(data["dtype"], f"{where}.dtype")
    return Input(**data | {"shape": tuple(data["shape"]), "dtype": dtype})


def _argument(data: Any, where: str, outputs: Collection[type]) -> Argument:
    fields(data, where, name=str, structure=object, first=int, positional=bool, omittable=bool)
    structure = _structure(data["structure"], f"{where}.structure", outputs)
    return Argument(**data | {"structure": structure})


def _structure(data: Any, where: str, outputs: Collection[type]) -> Structure:
    if type(data) is dict and len(data) == 1:
        if "leaf" in data:
            typed(data, where, leaf=int)
            return Leaf(data["leaf"])
        if "const" in data:
            typed(data, where, const=bool | int | float | str | None)
            return Const(data["const"])
        if "dtype" in data:
            return Const(dtype_named(data["dtype"], f"{where}.dtype"))
    fields(data, where, **_BRANCH)
    kind, names = data["kind"], tuple(data["keys"])
    children = tuple(_each(_structure, data["children"], f"{where}.children", outputs))
    plain = all(type(key) in (str, int, float, bool, type(None)) for key in names)
    if kind not in _KINDS or not plain or len(set(names)) != len(names):
        raise ArtifactError(f"{where}: no {kind!r:.40} of {len(children)} with keys {names!r:.80}")
    if len(names) != len(children):
        raise ArtifactError(f"{where}: {len(names)} keys for {len(children)} values")
    if kind == "samples" and (len(children) != 1 or list(_leaves(children[0]))):
        raise ArtifactError(f"{where}: samples are of one value without tensors")
    if kind != "object":
        if data["class"] is not None:
            raise ArtifactError(f"{where}.class: a {kind} has none")
        return Branch(kind, names, children)
    typed(data, where, **_BRANCH | {"class": str})
    words(data["keys"], f"{where}.keys")
    try:
        return Branch(kind, names, children, output_class(data["class"], names, outputs))
    except ArtifactError as error:
        raise ArtifactError(f"{where}.class: {error}") from error


def _guard(data: Any, where: str, names: Collection[int | str]) -> Guard:
    fields(data, where, expression=object, holds=bool, text=str, source=str)
    expression = _expression(data["expression"], f"{where}.expression", names)
    return Guard(**data | {"expression": expression})


def _expression(data: Any, where: str, names: Collection[int | str]) -> Expression:
    if type(data) in (int, float, bool) or (type(data) is str and data in names):
        return data  # type: ignore[no-any-return]
    if type(data) is str:
        raise ArtifactError(f"{where}: there is no size {data!r:.80}")
    operator: Any = data[0] if type(data) is list and data else None
    if type(operator) is not str or operator not in (*OPERATORS, "and", "or", "not"):
        raise ArtifactError(f"{where}: unknown size expression {data!r:.80}")
    count = {"not": 1, "and": None, "or": None}.get(operator, 2)
    operands = [_expression(item, f"{where}[{i}]", names) for i, item in enumerate(data[1:], 1)]
    if not operands or count not in (None, len(operands)):
        raise ArtifactError(f"{where}: {operator} takes {count or 'some'} operands: {data!r:.80}")
    if operator == "pow":
        _check_power(operands[0], operands[1], where)
    return (operator, *operands)


def _check_power(base: Expression, exponent: Expression, where: str) -> None:
    """Raise ArtifactError for powers that are slow to compute: high ones, and powers of powers."""
    if type(exponent) not in (int, float) or not -_POWER <= exponent <= _POWER:  # type: ignore[operator]
        raise ArtifactError(f"{where}: powers are numbers up to {_POWER}, not {exponent!r:.80}")
    if "pow" in _operators(base):
        raise ArtifactError(f"{where}: a power of a power")


def _operators(expression: Expression) -> set[str]:
    if not isinstance(expression, tuple):
        return set()
    return {expression[0]}.union(*map(_operators, expression[1:]))
