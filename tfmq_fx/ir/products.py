"""Find matrix products of two activations, as in attention, and replace their operands."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from torch import fx, nn

from .binding_times import Binding, binding_times
from .node_info import is_view, op_name, value_inputs

Side = Literal["left", "right"]
SIDES: tuple[Side, Side] = ("left", "right")
_PRODUCTS = {"matmul": 2, "bmm": 2, "einsum": 2, "baddbmm": 3}  # with the number of tensors
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
        values = value_inputs(node)
        if len(values) != _PRODUCTS.get(op_name(node)):
            continue
        values = values[-2:]
        if times[node] is not Binding.X or not all(times.deps[value] for value in values):
            continue
        sides = [s for s, v in zip(SIDES, values, strict=True) if _is_probabilities(gm, v)]
        products.append(Product(node, values[0], values[1], sides[0] if len(sides) == 1 else None))
    return products


def replace_operand(product: Product, side: Side, value: fx.Node) -> None:
    """Let the product's node read `value` on one side; `product` itself keeps the old operand."""
    node, reads = product.node, itertools.count()
    place = len(value_inputs(node)) - len(SIDES) + SIDES.index(side)
    args, kwargs = fx.map_arg(
        (node.args, node.kwargs), lambda used: value if next(reads) == place else used
    )
    node.args, node.kwargs = args, kwargs


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
