"""Compute values of nodes (fake tensors, symbolic sizes) while tracing, and record size tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._device
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from tfmq_fx.core.errors import CaptureError
from tfmq_fx.ir.held_values import check_held, checked_sizes

from .proxies import source_line

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True, slots=True)
class SizeTest:
    """A condition on sizes (a sympy expression) that the model tested, its outcome and its line.

    branch: False where a size was read as a number, not tested.
    """

    expression: Any
    held: bool
    source: str
    branch: bool = True


class FakeValues(fx.Tracer):
    """The part of a tracer that computes the value of each node, and answers tests on sizes.

    names, forced, tests: as for ValueTracer.
    """

    def __init__(
        self, mode: FakeTensorMode, names: Mapping[Any, Any], forced: Mapping[SizeTest, bool]
    ) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self.tests: list[SizeTest] = []
        self.source: str | None = None  # line of the traced code, where it runs in no frame
        self.computing = False
        self._mode, self._names, self._forced = mode, names, forced
        self._shapes: Any = mode.shape_env
        self._tied: set[Any] = set()
        self._known: dict[Any, dict[str, Any]] = {}  # key of a node -> layout of its value
        self._numbers: dict[Any, int] = {}  # expression of a size -> its number in keys
        self._fakes: dict[int, tuple[Tensor, Tensor]] = {}
        self._writes: dict[fx.Node, tuple[fx.Node, ...]] = {}

    def refusal(self, what: str, nodes: Iterable[fx.Node]) -> CaptureError:
        """The error for code that depends on the data of `nodes`."""
        raise NotImplementedError

    def is_opaque(self, path: str) -> bool:
        """Whether the module at `path` is called as it is."""
        raise NotImplementedError

    def opaque_value(self, node: fx.Node) -> Any:
        """The value of a call of an opaque module."""
        raise NotImplementedError

    def whereabouts(self) -> str:
        """The module path and source line of the code that is traced."""
        paths = [path for path, _ in self.module_stack.values()]
        return f"{paths[-1] if paths else 'the model'} ({self._line()})"

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

    def _fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._fakes:
            fake = self._mode.from_tensor(tensor, static_shapes=True)
            self._fakes[id(tensor)] = (fake, tensor)
        return self._fakes[id(tensor)][0]

    def _compute(self, node: fx.Node) -> Any:
        """The node's value, computed from the values of its arguments."""
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

        args: Any
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
        target: Any = node.target
        if target is torch.ops.aten.sym_size.int:
            return args[0].shape[args[1]]
        if target is check_held:
            return None
        if target is checked_sizes:
            return args[0]
        if node.op == "call_module" and self.is_opaque(target):
            return self.opaque_value(node)
        if node.op == "call_method":
            args, target = args[1:], getattr(args[0], target)
        elif node.op == "call_module":
            module = self.root.get_submodule(target)
            target = type(module).forward.__get__(module)
        tensors = [arg for arg in node.all_input_nodes if isinstance(arg.meta["val"], Tensor)]
        versions = [arg.meta["val"]._version for arg in tensors]
        self.computing = True
        try:
            # Without the Python dispatcher some kernels fix free sizes to the example's.
            with self._mode, enable_python_dispatcher():
                key = self._key(node)
                if key in self._known:
                    return torch.empty_strided(**self._known[key])
                result = _evenly_spaced(target, args, kwargs)
                if result is None:
                    result = _normalized(target, args)
                if result is None:
                    result = target(*args, **kwargs)
        except (
            DataDependentOutputException,
            DynamicOutputShapeException,
            GuardOnDataDependentSymNode,
        ) as error:
            name = getattr(node.target, "__name__", str(node.target))
            what = "size" if isinstance(error, DynamicOutputShapeException) else "value"
            raise self.refusal(
                f"the {what} of what {name} returns depends on a tensor's data, and a graph has no "
                f"such {what}s. Compute all positions and mask those that do not count "
                f"(torch.where), or compute {name} outside of the model and pass its result as an "
                f"input.",
                tensors,
            ) from error
        finally:
            self.computing = False
        self._note_fixed()
        written = [
            arg
            for arg, version in zip(tensors, versions, strict=True)
            if arg.meta["val"]._version != version
        ]
        if written:
            self._writes[node] = tuple(written)
        elif isinstance(result, Tensor) and not _shares_memory(result, tensors):
            self._known[key] = {
                "size": result.shape,
                "stride": result.stride(),
                "dtype": result.dtype,
                "device": result.device,
            }
        return result

    def _key(self, node: fx.Node) -> Any:
        """A key that is equal for nodes whose values have the same layout, dtype and device."""
        target: Any = node.target
        if node.op == "call_module":
            module = self.root.get_submodule(target)
            parameters = [*module.parameters(), *module.buffers()]
            layouts = tuple((p.shape, p.stride(), p.dtype) for p in parameters)
            target = (type(module), repr(module), layouts)

        def named(value: Any) -> str:
            if not isinstance(value, SYMBOLIC):
                return str(value)
            # To print an expression takes longer than most operations take on fake tensors.
            key = type(value), value.node.expr
            return f"<{self._numbers.setdefault(key, len(self._numbers))}>"

        def layout(argument: fx.Node) -> str:
            value = argument.meta["val"]
            if not isinstance(value, Tensor):
                return named(value)
            sizes = (*value.shape, *value.stride(), value.storage_offset())
            return f"({', '.join(map(named, sizes))}, {value.dtype}, {value.device})"

        arguments: Any = fx.node.map_arg((node.args, node.kwargs), layout)  # type: ignore[arg-type]
        return node.op, target, repr(arguments)


def _shares_memory(value: Tensor, others: list[fx.Node]) -> bool:
    memory = value.untyped_storage()._cdata
    return any(other.meta["val"].untyped_storage()._cdata == memory for other in others)


def _evenly_spaced(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The value of linspace or logspace for a symbolic number of steps; None for other calls.

    Their own kernels would fix the number.
    """
    if target not in (torch.linspace, torch.logspace):
        return None
    steps = kwargs.get("steps", args[2] if len(args) > 2 else None)
    if not isinstance(steps, torch.SymInt):
        return None
    settings = {name: value for name, value in kwargs.items() if name in ("dtype", "device")}
    return torch.empty(steps, **settings)


def _normalized(target: Any, args: tuple[Any, ...]) -> Any:
    """The value of a GroupNorm of a contiguous tensor; None for other calls.

    torch decomposes a GroupNorm of free sizes into some fifty operations, only to find the sizes of
    its input again.
    """
    module = getattr(target, "__self__", None)
    if not isinstance(module, nn.GroupNorm) or target.__func__ is not nn.GroupNorm.forward:
        return None
    (x,) = args[:1] or (None,)
    if not isinstance(x, Tensor) or x.dim() < 3 or not x.is_contiguous():
        return None
    channels, weight = x.shape[1], module.weight
    plain = weight is None or weight.dtype == x.dtype
    if not plain or not isinstance(channels, int) or channels != module.num_channels:
        return None
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
