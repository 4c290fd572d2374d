"""Saving and restoring abstract values, the nodes' meta["val"], with their symbolic sizes.

A size is saved as a number or as the text of an expression over s0, s1, ..., which the graph
declares once. Loading gives it over fresh symbols of one ShapeEnv.
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from .plain_json import decode, dtype_name, dtype_named, encode, keys

# By the names that sympy prints and those of Python's syntax tree.
_EXPRESSIONS: dict[str, Callable[..., Any]] = {
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "Max": lambda *values: functools.reduce(torch.sym_max, values),
    "Min": lambda *values: functools.reduce(torch.sym_min, values),
    "ToFloat": torch.sym_float,
    "FloorToInt": math.floor,
    "CeilToInt": math.ceil,
    "TruncToInt": math.trunc,
    "OpaqueUnaryFn_sqrt": torch.sym_sqrt,
    "Eq": operator.eq,
    "Ne": operator.ne,
    "Add": operator.add,
    "Sub": operator.sub,
    "Mult": operator.mul,
    "Pow": operator.pow,
    "USub": operator.neg,
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
}
_NUMBERS: dict[str, type] = {"int": int, "float": float, "bool": bool}


def _evaluate(text: str, symbols: Mapping[str, Any]) -> Any:
    """The value of an expression as sympy prints it, over `symbols`; sympy's own parser evaluates
    code. Raises ValueError, KeyError or SyntaxError on what is not such an expression."""

    def value(tree: ast.expr) -> Any:
        match tree:
            case ast.Constant(value=number) if type(number) in (int, float):
                return number
            case ast.Name(id=name):
                return symbols[name]
            case ast.BinOp(op=ast.Pow(), right=right) if not (
                isinstance(right, ast.Constant) and right.value in range(17)
            ):
                raise ValueError(f"power in {text!r:.80}")
            case ast.BinOp(left=left, op=op, right=right):
                return _EXPRESSIONS[type(op).__name__](value(left), value(right))
            case ast.UnaryOp(op=op, operand=operand):
                return _EXPRESSIONS[type(op).__name__](value(operand))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return _EXPRESSIONS[type(op).__name__](value(left), value(right))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return _EXPRESSIONS[name](*map(value, arguments))
        raise ValueError(f"not an expression of sizes: {text!r:.80}")

    return value(ast.parse(text, mode="eval").body)


class SymbolWriter:
    """Saves values, giving symbols their names s0, s1, ... in order of appearance."""

    def __init__(self) -> None:
        self.table: list[dict[str, Any]] = []  # declares s0, s1, ...
        self._declared: dict[str, Any] = {}  # their values
        self._saved: dict[Any, Any] = {}  # expression -> number or text

    def encode(self, value: Any, where: str) -> Any:
        """A value made of tensors, symbolic numbers and plain data, as JSON-ready data."""

        def abstract(value: Any) -> Any:
            if isinstance(value, Tensor):
                return {"tensor": self._tensor(value)}
            if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
                return {"symbol": self._number(value)}
            if isinstance(value, tuple) and type(value) not in (tuple, torch.Size):
                return encode(tuple(value), where, abstract)  # torch.return_types
            return NotImplemented

        return encode(value, where, abstract)

    def _tensor(self, value: Tensor) -> dict[str, Any]:
        shape, stride = ([self._number(n) for n in part] for part in (value.shape, value.stride()))
        data = {"shape": shape, "dtype": dtype_name(value.dtype), "device": str(value.device)}
        running = [*itertools.accumulate(value.shape[:0:-1], operator.mul, initial=1)]
        usual = [self._number(n) for n in running[::-1][: value.dim()]]
        return data if stride == usual else data | {"stride": stride}

    def _number(self, value: Any) -> Any:
        """A number, or the text of the expression that a SymInt, SymFloat or SymBool stands for."""
        if isinstance(value, int):
            return value
        expression = value.node.expr
        if expression not in self._saved:
            kind = type(value).__name__.removeprefix("Sym").lower()
            constant = getattr(value.node, f"maybe_as_{kind}")()
            found = self._text(expression, value.node.shape_env) if constant is None else constant
            if found is None:
                # A symbol of its own: the relation to other sizes is lost, equal ones stay equal.
                hint = value.node.hint if value.node.has_hint() else None
                found = self._declare(value, kind, hint)
            self._saved[expression] = found
        return self._saved[expression]

    def _text(self, expression: Any, env: Any) -> str | None:
        """The text of an expression; None if `_evaluate` would not give the same expression."""
        import sympy  # type: ignore[import-untyped]

        symbols = sorted(expression.free_symbols, key=str)
        if not all(symbol.is_integer for symbol in symbols):
            return None
        for symbol in symbols:
            if symbol not in self._saved:
                hint, bounds = env.backed_var_to_val.get(symbol), env.var_to_range.get(symbol)
                known = env.create_symintnode(symbol, hint=None if hint is None else int(hint))
                limits = [getattr(bounds, end, None) for end in ("lower", "upper")]
                self._saved[symbol] = self._declare(known, "int", hint, limits)
        saved = {s: sympy.Symbol(self._saved[s], **s.assumptions0) for s in symbols}
        text = str(expression.xreplace(saved))
        try:
            found = _evaluate(text, self._declared).node.expr
            if found == expression or sympy.expand(found - expression) == 0:
                return text
        except (AttributeError, ArithmeticError, KeyError, SyntaxError, TypeError, ValueError):
            pass  # a function this module does not know
        return None

    def _declare(self, value: Any, kind: str, hint: Any, limits: list[Any] | None = None) -> str:
        ends = [int(n) if n is not None and n.is_Integer else None for n in limits or (None, None)]
        name = f"s{len(self.table)}"
        hint = None if hint is None else _NUMBERS[kind](hint)
        self.table.append({"kind": kind, "hint": hint, "range": ends})
        self._declared[name] = value
        return name


class SymbolReader:
    """Restores values over fresh symbols, one for each that `SymbolWriter.table` declares."""

    def __init__(self, table: list[dict[str, Any]]) -> None:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self._env = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._env)
        symbols = {f"s{i}": self._fresh(f"s{i}", entry) for i, entry in enumerate(table)}
        self._evaluate = functools.cache(functools.partial(_evaluate, symbols=symbols))

    def decode(self, data: Any, where: str) -> Any:
        """The value that `SymbolWriter.encode` saved, its tensors FakeTensors."""
        return decode(data, where, {"tensor": self._tensor, "symbol": self._number})

    def _fresh(self, name: str, entry: dict[str, Any]) -> Any:
        from torch._dynamo.source import ConstantSource  # takes longer to import than all of torch
        from torch.fx.experimental.symbolic_shapes import DimDynamic
        from torch.utils._sympy.numbers import int_oo

        keys(entry, "symbols", "kind hint range")
        kind, hint, (low, high) = entry["kind"], entry["hint"], entry["range"]
        if kind != "int" or type(hint) is not int:
            return getattr(self._env, f"create_unbacked_sym{kind}")()
        symbol = self._env.create_symbol(
            hint,
            ConstantSource(f"saved_{name}"),
            dynamic_dim=DimDynamic.DYNAMIC,
            positive=None if low is None or low < 0 else True,
            do_not_specialize_zero_one=True,
        )
        self._env.constrain_symbol_range(
            symbol,
            compiler_min=-int_oo if low is None else low,
            compiler_max=int_oo if high is None else high,
        )
        return self._env.create_symintnode(symbol, hint=hint)

    def _number(self, saved: Any) -> Any:
        return self._evaluate(saved) if type(saved) is str else saved

    def _tensor(self, data: Any) -> Tensor:
        keys(data, "val", "shape dtype device", "stride")
        dtype, device = dtype_named(data["dtype"], "val"), torch.device(data["device"])
        shape = [self._number(n) for n in data["shape"]]
        # Layout tests on the way would guard on sizes; the loaded graph has no guards of its own.
        with self._mode, self._env.suppress_guards():
            if "stride" not in data:
                return torch.empty(shape, dtype=dtype, device=device)
            strides = [self._number(n) for n in data["stride"]]
            return torch.empty_strided(shape, strides, dtype=dtype, device=device)
