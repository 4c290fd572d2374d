"""Save and restore abstract values, the nodes' meta["val"], with their symbolic sizes.

A size is saved as a number or as the text of an expression over s0, s1, ..., which the graph
declares once. Loading gives it over fresh symbols of one ShapeEnv.
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tfmq_fx.core.errors import ArtifactError

from .json_values import decode, device_named, dtype_name, dtype_named, encode, fields, typed

# Functions by the names that sympy prints, and operators by those of Python's syntax tree.
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


# What sympy prints, and no more: a text of other characters, or of so many words that parsing it
# could exhaust anything, is no size.
_WORD = re.compile(r"\s*(?:\d+(?:\.\d*)?(?:e[+-]?\d+)?|[A-Za-z_]\w*|[*/]{1,2}|[<>=!]=?|[-+%(),])")
_WORDS, _DIGITS, _POWER = 128, 20, 16
_TERMS, _PRODUCT = 64, 1024  # of the sum that an expression, a tensor's size, is multiplied out to
_DIMS = 32


def _parsed(text: str) -> ast.expr:
    """Parse an expression as sympy prints it. Raises ValueError or SyntaxError."""
    place = count = 0
    while place < len(text):
        word = _WORD.match(text, place)
        count += 1
        if word is None or count > _WORDS or len(word[0].lstrip()) > _DIGITS:
            raise ValueError(f"not an expression of sizes: {text!r:.80}")
        place = word.end()
    return ast.parse(text, mode="eval").body


@functools.lru_cache(maxsize=4096)
def _terms(text: str) -> int:
    """Estimate the number of terms that an expression has when multiplied out.

    Raises ValueError where these are too many, and the errors of `_parsed`.
    """

    def terms(tree: ast.AST) -> int:
        counts = [terms(part) for part in ast.iter_child_nodes(tree) if isinstance(part, ast.expr)]
        match tree:
            case ast.BinOp(op=ast.Pow(), left=base, right=ast.Constant(value=int(power))):
                nested = any(isinstance(part, ast.Pow) for part in ast.walk(base))
                if nested or not 0 <= power <= _POWER:
                    raise ValueError(f"power in {text!r:.80}")
                count = int(counts[0] ** power)
            case ast.BinOp(op=ast.Pow()):
                raise ValueError(f"power in {text!r:.80}")
            case ast.BinOp(op=ast.Add() | ast.Sub()):
                count = sum(counts)
            case ast.Call():
                count = 1
            case _:
                count = math.prod(counts)
        if count > _TERMS:
            raise ValueError(f"too long an expression of sizes: {text!r:.80}")
        return count

    return terms(_parsed(text))


def _evaluate(text: str, symbols: Mapping[str, Any]) -> Any:
    """Evaluate an expression as sympy prints it, over `symbols`; sympy's own parser runs code.

    Raises ValueError, KeyError or SyntaxError on any other text.
    """
    _terms(text)

    def value(tree: ast.expr) -> Any:
        match tree:
            case ast.Constant(value=number) if type(number) in (int, float):
                return number
            case ast.Name(id=name):
                return symbols[name]
            case ast.BinOp(left=left, op=op, right=right):
                name, operands = type(op).__name__, [left, right]
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                name, operands = type(op).__name__, [left, right]
            case ast.UnaryOp(op=op, operand=operand):
                name, operands = type(op).__name__, [operand]
            case ast.Call(func=ast.Name(id=name), args=operands, keywords=[]):
                pass
            case _:
                raise ValueError(f"not an expression of sizes: {text!r:.80}")
        result = _EXPRESSIONS[name](*map(value, operands))
        if type(result) is int and result.bit_length() > 64:
            raise ValueError(f"too large a number in {text!r:.80}")
        return result

    return value(_parsed(text))


def _check_product(shape: list[Any], where: str) -> None:
    """Raise ArtifactError where the number of elements, which torch multiplies out, is too long an
    expression."""
    if math.prod(_terms(n) for n in shape if type(n) is str) > _PRODUCT:
        raise ArtifactError(f"{where}: too long expressions of sizes: {shape!r:.80}")


class SymbolWriter:
    """Saves values, and names symbols s0, s1, ... in order of appearance."""

    def __init__(self) -> None:
        self.table: list[dict[str, Any]] = []  # declares s0, s1, ...
        self._declared: dict[str, Any] = {}  # their values
        self._saved: dict[Any, Any] = {}  # expression -> number or text

    def encode(self, value: Any, where: str) -> Any:
        """Return a value made of tensors, symbolic numbers and plain data as JSON-ready data."""

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
        _check_product(shape, f"a value of shape {tuple(value.shape)}")
        data = {"shape": shape, "dtype": dtype_name(value.dtype), "device": str(value.device)}
        running = [*itertools.accumulate(value.shape[:0:-1], operator.mul, initial=1)]
        usual = [self._number(n) for n in running[::-1][: value.dim()]]
        return data if stride == usual else data | {"stride": stride}

    def _number(self, value: Any) -> Any:
        """Return a number, or the text of the expression of a SymInt, SymFloat or SymBool."""
        if isinstance(value, int):
            return value
        expression = value.node.expr
        if expression not in self._saved:
            kind = type(value).__name__.removeprefix("Sym").lower()
            constant = getattr(value.node, f"maybe_as_{kind}")()
            saved = self._text(expression, value.node.shape_env) if constant is None else constant
            if saved is None:
                # A symbol of its own: the relation to other sizes is lost, equal ones stay equal.
                hint = value.node.hint if value.node.has_hint() else None
                saved = self._declare(value, kind, hint)
            self._saved[expression] = saved
        return self._saved[expression]

    def _text(self, expression: Any, env: Any) -> str | None:
        """Return the text of an expression; None if `_evaluate` would give another expression."""
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
            restored = _evaluate(text, self._declared).node.expr
            if restored == expression or sympy.expand(restored - expression) == 0:
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

    def __init__(self, table: Any) -> None:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        if type(table) is not list:
            raise ArtifactError(f"symbols: expected a list, found {table!r:.80}")
        self._env = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._env)
        self._mode.cache_enabled = False  # as in `capture`
        symbols = {f"s{i}": self._fresh(f"s{i}", entry) for i, entry in enumerate(table)}
        self._evaluate = functools.cache(functools.partial(_evaluate, symbols=symbols))

    def decode(self, data: Any, where: str) -> Any:
        """Return the value that `SymbolWriter.encode` saved, with FakeTensors for tensors."""
        return decode(data, where, {"tensor": self._tensor, "symbol": self._number})

    def _fresh(self, name: str, entry: Any) -> Any:
        from torch._dynamo.source import ConstantSource  # takes longer to import than all of torch
        from torch.fx.experimental.symbolic_shapes import DimDynamic
        from torch.utils._sympy.numbers import int_oo

        where = f"symbols: {name}"
        fields(entry, where, kind=str, hint=int | float | bool | None, range=list)
        kind, hint, limits = entry["kind"], entry["hint"], entry["range"]
        if kind not in _NUMBERS or len(limits) != 2:
            raise ArtifactError(f"{where}: no {kind!r:.40} of a range of {len(limits)}")
        low, high = limits
        typed({"low": low, "high": high}, where, low=int | None, high=int | None)
        if kind != "int" or type(hint) is not int:
            return getattr(self._env, f"create_unbacked_sym{kind}")()
        if not (-(1 << 63) if low is None else low) <= hint <= (1 << 63 if high is None else high):
            raise ArtifactError(f"{where}: {hint} is out of its range {limits}")
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

    def _number(self, saved: Any, where: str = "val") -> Any:
        if type(saved) in (bool, float) or (type(saved) is int and abs(saved) < 1 << 63):
            return saved
        if type(saved) is not str:
            raise ArtifactError(f"{where}: {saved!r:.80} is no size")
        try:
            return self._evaluate(saved)
        except (ArithmeticError, KeyError, SyntaxError, TypeError, ValueError) as error:
            raise ArtifactError(f"{where}: {saved!r:.80} is no expression of sizes") from error

    def _tensor(self, data: Any) -> Tensor:
        fields(data, "val", "stride", shape=list, dtype=object, device=object)
        dtype, device = dtype_named(data["dtype"], "val"), device_named(data["device"], "val")
        shape = self._sizes(data["shape"])
        _check_product(data["shape"], "val")
        # Layout tests on the way would guard on sizes; the loaded graph has no guards of its own.
        with self._mode, self._env.suppress_guards():
            if "stride" not in data:
                return torch.empty(shape, dtype=dtype, device=device)
            typed(data, "val", stride=list)
            strides = self._sizes(data["stride"])
            if len(strides) != len(shape):
                raise ArtifactError(f"val: {len(strides)} strides for {len(shape)} dimensions")
            return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    def _sizes(self, saved: list[Any]) -> list[Any]:
        """Return the sizes or strides that were saved."""
        if len(saved) > _DIMS:
            raise ArtifactError(f"val: {len(saved)} dimensions")
        sizes = [self._number(n) for n in saved]
        if any(type(n) is not int and not isinstance(n, torch.SymInt) for n in sizes):
            raise ArtifactError(f"val: {saved!r:.80} are no sizes")
        return sizes
