"""Turn tests on sizes into guards (plain data), and compare graphs for the same operations."""

from __future__ import annotations

import functools
from typing import Any

from torch import fx

from tfmq_fx.core.errors import CaptureError

from .call_spec import Guard
from .fake_values import SizeTest
from .nested_values import Expression

# Classes of sympy and torch -> operators of `nested_values.evaluate`.
_BINARY = {
    "Equality": "eq",
    "Unequality": "ne",
    "StrictLessThan": "lt",
    "LessThan": "le",
    "StrictGreaterThan": "gt",
    "GreaterThan": "ge",
    "FloorDiv": "floordiv",
    "CleanDiv": "floordiv",
    "IntTrueDiv": "truediv",
    "FloatTrueDiv": "truediv",
    "Mod": "mod",
    "PythonMod": "mod",
    "PowByNatural": "pow",
    "Pow": "pow",
    "FloatPow": "pow",
}
_MANY = {"Add": "add", "Mul": "mul", "Max": "max", "Min": "min"}


def guard(test: SizeTest) -> Guard:
    """The guard that restricts a graph to the outcome of a test."""
    expression = _expression(test.expression, test.source)
    return Guard(expression, test.held, str(test.expression), test.source)


def same_operations(graph: fx.Graph, other: fx.Graph) -> bool:
    """Whether two graphs have the same operations in the same order, except contiguous()."""
    return _operations(graph) == _operations(other)


def _operations(graph: fx.Graph) -> list[Any]:
    """The nodes of a graph in a form that can be compared, with values named by position."""
    position: dict[fx.Node, Any] = {}
    operations: list[Any] = []
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "contiguous":
            position[node] = position[node.args[0]]
            continue
        args = fx.node.map_arg((node.args, node.kwargs), lambda arg: position[arg])
        position[node] = f"%{len(operations)}"
        operations.append((node.op, node.target, repr(args)))
    return operations


def _expression(expression: Any, source: str) -> Expression:
    """A sympy expression over sizes as plain data."""
    import sympy  # type: ignore[import-untyped]

    if isinstance(expression, sympy.Symbol):
        return str(expression.name)
    if expression.is_Boolean and not expression.free_symbols:
        return bool(expression)
    if expression.is_number:
        return int(expression) if expression.is_integer else float(expression)
    kind = type(expression).__name__
    operands = [_expression(argument, source) for argument in expression.args]
    if kind in ("And", "Or", "Not"):
        return (kind.lower(), *operands)
    if kind in _BINARY and len(operands) == 2:
        return (_BINARY[kind], *operands)
    if kind in ("ToFloat", "Identity"):
        return operands[0]
    if kind not in _MANY:
        raise CaptureError(f"{source}: a branch on {expression} cannot be kept as a guard")
    return functools.reduce(lambda left, right: (_MANY[kind], left, right), operands)
