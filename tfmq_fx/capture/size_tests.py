"""Record the conditions on sizes that a model's code tests while it is traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from .proxies import source_line


@dataclass(frozen=True, slots=True)
class SizeTest:
    """A condition on sizes (a sympy expression) that the model tested, its outcome and its line.

    branch: False where a size was read as a number, not tested.
    """

    expression: Any
    held: bool
    source: str
    branch: bool = True


class SizeTests(fx.Tracer):
    """The part of a tracer that answers conditions on sizes and records them."""

    tests: list[SizeTest]
    source: str | None
    _names: Mapping[Any, Any]
    _forced: Mapping[SizeTest, bool]
    _shapes: Any
    _tied: set[Any]

    def decide(self, value: Any) -> bool:
        """The outcome of a condition on sizes, which is recorded."""
        test = SizeTest(value.node._expr.xreplace(self._names), True, self._line())
        held = self._forced[test] if test in self._forced else bool(value)
        self._note(dataclasses.replace(test, held=held))
        return held

    def fix(self, value: Any, convert: Callable[[Any], Any]) -> Any:
        """The number that a size has at the example, which is recorded as an equation."""
        expression = value.node._expr.xreplace(self._names)  # converting replaces the symbol
        number = convert(value)
        self._note_equal(expression, number)
        return number

    def _note(self, test: SizeTest) -> None:
        if getattr(test.expression, "free_symbols", None) and test not in self.tests:
            self.tests.append(test)

    def _note_equal(self, expression: Any, value: Any) -> None:
        import sympy  # type: ignore[import-untyped]

        equation = sympy.Eq(expression, value, evaluate=False).xreplace(self._names)
        self._note(SizeTest(equation, True, self._line(), branch=False))

    def _line(self) -> str:
        return self.source or source_line()

    def _note_fixed(self) -> None:
        """Record the sizes that an operation fixed to the example's, or tied to one another."""
        replaced = self._shapes.replacements
        for symbol in [*(self._names.keys() & replaced.keys() - self._tied)]:
            self._tied.add(symbol)
            self._note_equal(symbol, replaced[symbol])
