"""Find matrix products of two activations, as in attention, and replace their operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import fx, nn

from .binding_times import Binding, binding_times
from .node_info import is_view, op_name

Side = Literal["left", "right"]
SIDES: tuple[Side, Side] = ("left", "right")
_OPERANDS: dict[str, tuple[tuple[int, tuple[str, ...]], ...]] = {
    # position and names of both operands
    "matmul": ((0, ("input", "self")), (1, ("other", "tensor2"))),
    "bmm": ((0, ("input", "self")), (1, ("mat2",))),
    "baddbmm": ((1, ("batch1",)), (2, ("batch2",))),
}
_SOFTMAX = ("softmax", "_softmax", "_safe_softmax")


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product of two activations.

    probabilities: the side whose operand is a softmax's result, if there is exactly one.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    probabilities: Side | None

    @property
    def name(self) -> str:
        """The name of the product's node."""
        return self.node.name

    def operand(self, side: Side) -> fx.Node:
        """The operand on one side."""
        return self.left if side == "left" else self.right


def find_products(gm: fx.GraphModule) -> list[Product]:
    """Every matmul, @, bmm, baddbmm and two-operand einsum of values that both depend on inputs,
    one of them on more than the timestep; in graph order."""
    times, products = binding_times(gm), []
    for node in gm.graph.nodes:
        values = [_at(node, place) for place in _places(node)]
        if len(values) != 2 or not all(isinstance(value, fx.Node) for value in values):
            continue
        if times[node] is not Binding.X or not all(times.deps[value] for value in values):
            continue
        sides = [s for s, v in zip(SIDES, values, strict=True) if _is_probabilities(gm, v)]
        products.append(Product(node, values[0], values[1], sides[0] if len(sides) == 1 else None))
    return products


def replace_operand(product: Product, side: Side, value: fx.Node) -> None:
    """Let the product's node read `value` on one side; `product` itself keeps the old operand."""
    where, *path = _places(product.node)[SIDES.index(side)]
    if where == "kwargs":
        product.node.update_kwarg(str(path[0]), value)
    elif len(path) == 1:
        product.node.update_arg(int(path[0]), value)
    else:
        operands: list[Any] = list(product.node.args[int(path[0])])  # type: ignore[arg-type]
        operands[int(path[1])] = value
        product.node.update_arg(int(path[0]), operands)


def _places(node: fx.Node) -> list[tuple[str | int, ...]]:
    """The places of a product's operands in its arguments; empty for other nodes."""
    name = op_name(node)
    if name == "einsum":
        listed = len(node.args) == 2 and isinstance(node.args[1], (list, tuple))
        inner: Any = node.args[1] if listed else node.args[1:]
        if len(inner) != 2:
            return []
        return [("args", 1, 0), ("args", 1, 1)] if listed else [("args", 1), ("args", 2)]
    places: list[tuple[str | int, ...]] = []
    for position, words in _OPERANDS.get(name, ()):
        if position < len(node.args):
            places.append(("args", position))
        else:
            places += [("kwargs", word) for word in words if word in node.kwargs]
    return places


def _at(node: fx.Node, place: tuple[str | int, ...]) -> Any:
    value: Any = node.args if place[0] == "args" else node.kwargs
    for key in place[1:]:
        value = value[key]
    return value


def _is_probabilities(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a value is a softmax's result, through casts, dropout, views and zeroed rows."""
    while True:
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if op_name(node) in _SOFTMAX or isinstance(module, nn.Softmax):
            return True
        passes = isinstance(module, (nn.Dropout, nn.Identity)) or op_name(node) == "masked_fill"
        if not (passes or is_view(node)) or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
