"""Give a trace values where the model's code reads data: held conditions, and opaque modules.

`data_dependence` says what a capture may keep; without allowances every read is refused.
"""

from __future__ import annotations

import collections
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tfmq_fx.ir.held_values import check_held
from tfmq_fx.ir.node_info import is_random, op_name, size_hint, value_inputs

from .data_dependence import Allowances, DataDependent, OpaqueCall, Unfit
from .fake_values import SYMBOLIC, FakeValues, SizeTest
from .nested_values import rebuild


class DataValues(FakeValues):
    """The part of a tracer that answers reads of data.

    allowances: what may be kept of code that depends on data; None refuses all of it.
    held: the example's value of each input that a held value is computed from.
    """

    def __init__(
        self,
        mode: FakeTensorMode,
        names: Mapping[Any, Any],
        forced: Mapping[SizeTest, bool],
        allowances: Allowances | None,
    ) -> None:
        super().__init__(mode, names, forced)
        self.allowances = allowances
        self.held: dict[str, Tensor] = {}
        self._values: dict[fx.Node, Tensor] = {}  # of nodes that are held
        self._called = collections.Counter[str]()  # opaque modules

    # Reads of data

    def read(self, proxy: Any, what: str) -> Tensor:
        """The data of a tensor that depends on conditions alone.

        Raises DataDependent for others, and where the module that reads it had better be opaque.
        """
        node = proxy.node
        if not self._may_hold([node], single=node.meta["val"].numel() == 1):
            raise self.refusal(
                f"{what} of a tensor's data ({node.name}) decides what runs next; a graph cannot "
                f"follow it. Make the decision from shapes or from constants, or move it out of "
                f"the model.",
                [node],
            )
        return self._hold(node)

    def refusal(self, what: str, nodes: Iterable[fx.Node]) -> DataDependent:
        """The error for code that depends on the data of `nodes`."""
        return DataDependent(
            f"{self.whereabouts()}: {what}",
            paths=tuple(path for path, _ in self.module_stack.values() if path),
            holdable=self.allowances is not None and self._is_holdable(nodes),
            source=self._line(),
        )

    def result_of_held(self, node: fx.Node, error: DataDependent) -> Any:
        """The result of an operation whose size depends on conditions alone, computed from the
        example's; raises `error` where it depends on more."""
        if op_name(node) == "getitem":
            return self._picked(node, error)
        if op_name(node) == "repeat_interleave":
            return self._repeated(node, error)
        numbers = {n for n in node.all_input_nodes if (n,) != node.args[:1] and self._is_number(n)}
        if numbers:  # x.reshape(1, n), where n is a tensor

            def operand(used: fx.Node) -> Any:
                return self._hold(used).item() if used in numbers else self._wrap(used)  # type: ignore[attr-defined]

            args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
            self.graph.erase_node(node)
            return self.create_proxy(node.op, node.target, args, kwargs)
        writes = op_name(node).endswith("_")
        if writes or not self._may_hold(node.all_input_nodes, single=False):
            raise error
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._example_of)
        self.computing = True
        try:
            result = self._call_node(node, args, kwargs)
        finally:
            self.computing = False
        self.graph.erase_node(node)
        return tree_map_only(Tensor, lambda value: self._constant(value).clone(), result)

    def _picked(self, node: fx.Node, error: DataDependent) -> Any:
        """The result of x[mask], as that of x[rows, columns]."""
        x, key = node.args
        if not self._may_hold([n for n in node.all_input_nodes if n is not x], single=False):
            raise error
        parts: list[Any] = []
        for part in key if isinstance(key, (tuple, list)) else (key,):
            value: Any = fx.node.map_arg(part, self._example_of)
            if isinstance(value, slice):
                ends = (value.start, value.stop, value.step)
                value = slice(*(int(end) if isinstance(end, Tensor) else end for end in ends))
            if isinstance(value, Tensor) and value.dtype == torch.bool:
                parts += map(self._constant, value.nonzero(as_tuple=True))
            else:
                parts.append(value)
        self.graph.erase_node(node)
        arguments = (self._wrap(x), tuple(parts))  # type: ignore[attr-defined]
        return self.create_proxy("call_function", operator.getitem, arguments, {})

    def _repeated(self, node: fx.Node, error: DataDependent) -> Any:
        """The result of repeat_interleave(x, repeats, dim), as x.index_select(dim, rows)."""
        given = {**dict(zip(("x", "repeats", "dim"), node.args, strict=False)), **node.kwargs}
        x, repeats, dim = given.get("x"), given.get("repeats"), given.get("dim")
        known = isinstance(x, fx.Node) and isinstance(repeats, fx.Node)
        if not known or not self._may_hold([repeats], single=False):  # type: ignore[list-item]
            raise error
        values = self._wrap(x)  # type: ignore[attr-defined]
        count = self._hold(repeats)  # type: ignore[arg-type]
        values, dim = (values.flatten(), 0) if dim is None else (values, dim)
        size = int(values.shape[dim])
        self.computing = True
        try:
            rows = torch.arange(size, device=count.device).repeat_interleave(count)
        finally:
            self.computing = False
        self.graph.erase_node(node)
        return values.index_select(dim, self._constant(rows))

    def _is_number(self, node: fx.Node) -> bool:
        """Whether a value is one integer that may be held."""
        value = node.meta["val"]
        single = isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point()
        return single and value.dtype != torch.bool and self._may_hold([node], single=True)

    def _may_hold(self, nodes: Iterable[fx.Node], *, single: bool) -> bool:
        """Whether to hold values here: not where the module could be opaque instead, which serves
        all inputs. Single numbers mostly say what there is, and are always held."""
        if self.allowances is None or not self._is_holdable(nodes):
            return False
        paths = [path for path, _ in self.module_stack.values() if path]
        return single or (paths[-1] if paths else "") in self.allowances.held

    def _is_holdable(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether the data of `nodes` depends on conditions, or on nothing, and can be computed."""
        assert self.allowances is not None
        reached = self._computed_from(nodes, value_inputs)
        names = {str(node.target) for node in reached if node.op == "placeholder"}
        return names <= self.allowances.conditions and not any(
            is_random(self.root, node)  # type: ignore[arg-type]  # it only looks up modules
            for node in reached
        )

    def _computed_from(self, nodes: Iterable[fx.Node], inputs: Any) -> set[fx.Node]:
        """`nodes` and all that they are computed from, writes in place to it included."""
        reached, todo = set[fx.Node](), [*nodes]
        while todo:
            while todo:
                node = todo.pop()
                if node not in reached:
                    reached.add(node)
                    if not isinstance(node.meta["val"], SYMBOLIC):  # its number is known
                        todo += inputs(node)
            memory = {_memory(node) for node in reached} - {None}
            todo = [
                writer
                for writer, bases in self._writes.items()
                if writer not in reached and not memory.isdisjoint(map(_memory, bases))
            ]
        return reached

    def _hold(self, node: fx.Node) -> Tensor:
        """The value that `node` has for the example; a check in the graph compares it at calls."""
        assert self.allowances is not None
        if node in self._values:
            return self._values[node]
        for size in node.meta["val"].shape:
            if isinstance(size, torch.SymInt):
                self.fix(size, int)
        reached = self._computed_from([node], lambda used: used.all_input_nodes)
        value = self._values[node] = self._evaluate(node, reached)
        reads = self._computed_from([node], value_inputs)
        if not any(used.op in ("placeholder", "get_attr") for used in reads):
            return value  # a constant of the code
        inputs = [used for used in self.graph.find_nodes(op="placeholder") if used in reads]
        names = [str(used.target) for used in inputs]
        self.held |= {name: self.allowances.examples[name] for name in names}
        arguments = (self._wrap(node), self._constant(value), ", ".join(names), self._line())  # type: ignore[attr-defined]
        self.create_proxy("call_function", check_held, arguments, {})
        return value

    def _evaluate(self, node: fx.Node, reached: set[fx.Node]) -> Tensor:
        """The value of a node for the example, from the nodes that it is computed from."""
        assert self.allowances is not None
        values: dict[fx.Node, Any] = {}
        self.computing = True
        try:
            for used in self.graph.nodes:
                if used not in reached:
                    continue
                value = used.meta["val"]
                if isinstance(value, SYMBOLIC):
                    values[used] = size_hint(value)
                elif used.op == "placeholder":
                    values[used] = self.allowances.examples[str(used.target)].clone()
                elif used.op == "get_attr":
                    values[used] = attrgetter(str(used.target))(self.root).detach().clone()
                else:
                    args, kwargs = fx.node.map_arg((used.args, used.kwargs), values.__getitem__)
                    values[used] = self._call_node(used, args, kwargs)
        finally:
            self.computing = False
        result: Tensor = values[node]
        return result.detach().clone()

    def _call_node(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What a node returns for values of its arguments."""
        target: Any = node.target
        if node.op == "call_method":
            args, target = args[1:], getattr(args[0], target)
        elif node.op == "call_module":
            target = self.root.get_submodule(target)  # type: ignore[union-attr]
        return target(*args, **kwargs)

    def _example_of(self, node: fx.Node) -> Any:
        """The value of an operand for the example, held where it is a tensor."""
        value = node.meta["val"]
        return self._hold(node) if isinstance(value, Tensor) else size_hint(value)

    def _constant(self, value: Tensor) -> Any:
        """A proxy for a tensor that the graph holds as a constant of its own."""
        name = str(self.get_fresh_qualname("_held"))
        setattr(self.root, name, value.detach().clone())
        return self.create_proxy("get_attr", name, (), {})

    # Opaque modules

    def is_opaque(self, path: str) -> bool:
        """Whether the module at `path` is called as it is."""
        return self.allowances is not None and path in self.allowances.opaque

    def opaque_value(self, node: fx.Node) -> Any:
        """The value of a call of an opaque module, from what was observed of it."""
        assert self.allowances is not None
        path = str(node.target)
        calls, position = self.allowances.calls.get(path, ()), self._called[path]
        self._called[path] += 1
        if position >= len(calls):
            raise Unfit(path, "the model itself calls it less often than its trace")
        call = calls[position]
        values = fx.node.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
        tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
        if tuple(tuple(map(size_hint, value.shape)) for value in tensors) != call.inputs[0]:
            raise Unfit(path, "its inputs have other shapes in the model than in its trace")
        sizes = _Sizes(tensors, call, self._fix_all)
        self.computing = True
        try:
            with self._mode, enable_python_dispatcher():
                leaves = [
                    sizes.empty(i, dtype) if same is None else tensors[same]
                    for i, (dtype, same) in enumerate(zip(call.dtypes, call.same, strict=True))
                ]
        finally:
            self.computing = False
        return rebuild(call.structure, leaves)

    def _fix_all(self) -> None:
        """Fix all free sizes to the example's."""
        for node in self.graph.find_nodes(op="placeholder"):
            for size in node.meta["val"].shape:
                if isinstance(size, torch.SymInt):
                    self.fix(size, int)


class _Sizes:
    """The sizes of an opaque module's results, as expressions of the sizes of its inputs."""

    def __init__(self, tensors: Sequence[Tensor], call: OpaqueCall, fix_all: Any) -> None:
        self._call, self._fix_all = call, fix_all
        self._known: dict[tuple[int, int], Any] = {}  # at the example, and at other sizes
        if call.inputs[1] is not None:
            for value, there in zip(tensors, call.inputs[1], strict=True):
                for size, other in zip(value.shape, there, strict=True):
                    if isinstance(size, torch.SymInt):
                        self._known.setdefault((size_hint(size), other), size)

    def empty(self, i: int, dtype: tuple[torch.dtype, torch.device]) -> Tensor:
        """A tensor like the result at position `i`, with its layout."""
        shape = self._call.outputs[0][i]
        others = (None,) * len(shape) if self._call.outputs[1] is None else self._call.outputs[1][i]
        sizes = [self._size(size, other) for size, other in zip(shape, others, strict=True)]
        order = sorted(range(len(shape)), key=lambda dim: -self._call.strides[i][dim])
        kind, device = dtype
        dense = torch.empty([sizes[dim] for dim in order], dtype=kind, device=device)
        return dense.permute([order.index(dim) for dim in range(len(shape))])

    def _size(self, size: int, other: int | None) -> Any:
        """A size that was `size` at the example, and `other` at other sizes."""
        if size == other:
            return size
        if other is not None:
            if (size, other) in self._known:
                return self._known[size, other]
            for (a, there), symbol in self._known.items():
                if a and not size % a and other == size // a * there:
                    return symbol * (size // a)
                if size and not a % size and there == a // size * other:
                    return symbol // (a // size)
            for (p, x), (q, y) in itertools.combinations(self._known.items(), 2):
                for combine in (operator.mul, operator.add):
                    if combine(p[0], q[0]) == size and combine(p[1], q[1]) == other:
                        return combine(x, y)
        self._fix_all()
        return size


def _memory(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None
