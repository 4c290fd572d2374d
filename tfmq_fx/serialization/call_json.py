"""A call specification from JSON, checked as it is read, and whether it fits a graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from tfmq_fx.capture.call_spec import Argument, CallSpec, Guard
from tfmq_fx.capture.input_checks import Input
from tfmq_fx.capture.nested_values import OPERATORS, Branch, Const, Expression, Leaf, Structure
from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.core.output_classes import output_class
from tfmq_fx.ir.node_info import size_hint

from .json_values import dtype_named, keys, typed

_POWER = 16  # the highest in a size expression
_KINDS = ("dict", "list", "tuple", "object", "samples")


def call_from_json(data: Any, where: str, outputs: Collection[type] = ()) -> CallSpec:
    """The specification that `CallSpec.to_dict` wrote.

    outputs: classes that it may name besides those of libraries (see `output_classes`).
    Raises ArtifactError, naming `where` and the place in it.
    """
    keys(data, where, "arguments inputs timestep output return_dict guards", "conditions fixed")
    typed(data, where, arguments=list, inputs=list, timestep=str, guards=list)
    typed(data, where, return_dict=bool | None)
    inputs = tuple(_input(item, f"{where}.inputs[{i}]") for i, item in enumerate(data["inputs"]))
    made = CallSpec(
        arguments=tuple(
            _argument(item, f"{where}.arguments[{i}]", outputs)
            for i, item in enumerate(data["arguments"])
        ),
        inputs=inputs,
        timestep=data["timestep"],
        output=_structure(data["output"], f"{where}.output", outputs),
        return_dict=data["return_dict"],
        guards=tuple(
            _guard(item, f"{where}.guards[{i}]", {s for spec in inputs for s in spec.shape})
            for i, item in enumerate(data["guards"])
        ),
        conditions=_names(data.get("conditions", []), f"{where}.conditions"),
        fixed=_names(data.get("fixed", []), f"{where}.fixed"),
    )
    _check_sound(made, where)
    return made


def check_fits(call: CallSpec, gm: fx.GraphModule, where: str) -> None:
    """Raise ArtifactError unless calls by this specification are calls of the graph."""
    nodes = list(gm.graph.find_nodes(op="placeholder"))
    if list(call.names) != (found := [str(node.target) for node in nodes]):
        raise ArtifactError(f"{where}.inputs: {list(call.names)}, but the graph takes {found}")
    sizes: dict[str, int] = {}
    for i, (spec, node) in enumerate(zip(call.inputs, nodes, strict=True)):
        value = node.meta.get("val")
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else None
        if shape is None or len(shape) != len(spec.shape):
            raise ArtifactError(
                f"{where}.inputs[{i}]: {spec.name} is {spec.shape}, and in the graph {shape}"
            )
        for size, held in zip(spec.shape, shape, strict=True):
            if isinstance(size, int) and isinstance(held, int) and size != held:
                raise ArtifactError(
                    f"{where}.inputs[{i}]: {spec.name} is {spec.shape}, and in the graph {shape}"
                )
            if isinstance(size, str):
                sizes.setdefault(size, size_hint(held))
    (output,) = gm.graph.find_nodes(op="output")
    flat = output.args[0]
    count = len(list(_leaves(call.output)))
    if not isinstance(flat, (tuple, list)) or len(flat) != count:
        given = len(flat) if isinstance(flat, (tuple, list)) else "no list of tensors"
        raise ArtifactError(f"{where}.output: {count} tensors, but the graph gives {given}")
    for i, guard in enumerate(call.guards):
        try:
            guard.allows(sizes)
        except (ArithmeticError, TypeError) as error:
            raise ArtifactError(f"{where}.guards[{i}]: cannot be evaluated: {error}") from error


def _check_sound(call: CallSpec, where: str) -> None:
    """Raise ArtifactError where parts of a specification contradict each other."""
    for kind, names in (
        ("arguments", [argument.name for argument in call.arguments]),
        ("inputs", list(call.names)),
    ):
        if len(set(names)) != len(names):
            raise ArtifactError(f"{where}.{kind}: a name is given twice in {names}")
    first = 0
    for i, argument in enumerate(call.arguments):
        count = _check_order(argument.structure, f"{where}.arguments[{i}].structure")
        if argument.first != first:
            raise ArtifactError(f"{where}.arguments[{i}].first: {argument.first}, not {first}")
        first += count
    if first != len(call.inputs):
        raise ArtifactError(f"{where}.inputs: {len(call.inputs)}, but the arguments hold {first}")
    _check_order(call.output, f"{where}.output")
    shapes = {spec.name: spec.shape for spec in call.inputs}
    if len(shapes.get(call.timestep, ())) != 1:
        raise ArtifactError(f"{where}.timestep: {call.timestep!r} is no input of one dimension")
    if unknown := sorted(set(call.conditions) - set(shapes)):
        raise ArtifactError(f"{where}.conditions: {unknown} are no inputs")


def _check_order(structure: Structure, where: str) -> int:
    """The number of tensors in a structure, which must be numbered from 0 in their order."""
    found = list(_leaves(structure))
    if found != list(range(len(found))):
        raise ArtifactError(f"{where}: its tensors are numbered {found[:20]}")
    return len(found)


def _leaves(structure: Structure) -> Iterator[int]:
    if isinstance(structure, Leaf):
        yield structure.index
    elif isinstance(structure, Branch):
        for child in structure.children:
            yield from _leaves(child)


def _input(data: Any, where: str) -> Input:
    keys(data, where, "name path shape dtype device")
    typed(data, where, name=str, path=str, shape=list, device=str)
    if not all(type(n) is str or (type(n) is int and n >= 0) for n in data["shape"]):
        raise ArtifactError(f"{where}.shape: {data['shape']!r:.80} is no list of sizes and names")
    dtype = dtype_named(data["dtype"], f"{where}.dtype")
    return Input(data["name"], data["path"], tuple(data["shape"]), dtype, data["device"])


def _argument(data: Any, where: str, outputs: Collection[type]) -> Argument:
    keys(data, where, "name structure first positional omittable")
    typed(data, where, name=str, first=int, positional=bool, omittable=bool)
    structure = _structure(data["structure"], f"{where}.structure", outputs)
    return Argument(data["name"], structure, data["first"], data["positional"], data["omittable"])


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
    keys(data, where, "kind keys children class")
    typed(data, where, kind=str, keys=list, children=list)
    kind, names = data["kind"], tuple(data["keys"])
    children = tuple(
        _structure(child, f"{where}.children[{i}]", outputs)
        for i, child in enumerate(data["children"])
    )
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
    typed(data, where, **{"class": str})
    if not all(type(key) is str for key in names):
        raise ArtifactError(f"{where}.keys: {names!r:.80} are no names of fields")
    try:
        return Branch(kind, names, children, output_class(data["class"], names, outputs))
    except ArtifactError as error:
        raise ArtifactError(f"{where}.class: {error}") from error


def _guard(data: Any, where: str, names: Collection[int | str]) -> Guard:
    keys(data, where, "expression holds text source")
    typed(data, where, holds=bool, text=str, source=str)
    found = _expression(data["expression"], f"{where}.expression", names)
    return Guard(found, data["holds"], data["text"], data["source"])


def _expression(data: Any, where: str, names: Collection[int | str]) -> Expression:
    if type(data) in (int, float, bool) or (type(data) is str and data in names):
        return data  # type: ignore[no-any-return]
    if type(data) is str:
        raise ArtifactError(f"{where}: there is no size {data!r:.80}")
    operator: Any = data[0] if type(data) is list and data else None
    many = operator in ("and", "or")
    operands = {"not": 1}.get(operator, 2) if type(operator) is str else 0
    if not (type(operator) is str and operator in OPERATORS):
        raise ArtifactError(f"{where}: unknown size expression {data!r:.80}")
    if len(data) < 2 or not (many or len(data) == operands + 1):
        raise ArtifactError(f"{where}: {operator} takes {operands} operands: {data!r:.80}")
    found = [_expression(item, f"{where}[{i}]", names) for i, item in enumerate(data[1:], 1)]
    if operator == "pow":
        _check_power(found, where)
    return (operator, *found)


def _check_power(operands: Sequence[Expression], where: str) -> None:
    """Raise ArtifactError for powers that could take for ever: high ones, and powers of powers."""
    base, exponent = operands
    if type(exponent) not in (int, float) or not -_POWER <= exponent <= _POWER:  # type: ignore[operator]
        raise ArtifactError(f"{where}: powers are numbers up to {_POWER}, not {exponent!r:.80}")
    todo = [base]
    while todo:
        if isinstance(found := todo.pop(), tuple):
            if found[0] == "pow":
                raise ArtifactError(f"{where}: a power of a power")
            todo += found[1:]


def _names(data: Any, where: str) -> tuple[str, ...]:
    if type(data) is not list or not all(type(name) is str for name in data):
        raise ArtifactError(f"{where}: {data!r:.80} is no list of names")
    return tuple(data)
