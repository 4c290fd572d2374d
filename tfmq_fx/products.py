"""Products of two values that both vary with the inputs, as in attention: found and measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from .config import ActivationSpec, AttentionSpec
from .dataflow import Binding, binding_times
from .errors import CalibrationError
from .graph import timestep_node
from .observers import Ranges
from .ops import is_view, op_name
from .profiles import ProfileObserver, input_ranges
from .walk import Walk

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
    """A product of two activations.  probabilities: the operand that is a softmax's result."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    probabilities: Side | None

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name

    def operand(self, side: Side) -> fx.Node:
        """One of the operands."""
        return self.left if side == "left" else self.right


@dataclass(frozen=True, slots=True)
class Operand:
    """What calibration found of one operand, over a set of K timesteps.

    ranges: to be covered, groups and clipping included.  probabilities: whether it is a softmax's
    result.  static: why one range must do for all timesteps, or None.
    """

    ranges: Ranges
    probabilities: bool
    static: str | None


Measured = Mapping[str, Mapping[Side, Operand]]
Reasons = dict[tuple[str, Side], str]  # product and side -> why its rows are not the samples'


# ---------------------------------------------------------------------------- finding


def find_products(gm: fx.GraphModule) -> list[Product]:
    """Every matmul, @, bmm, baddbmm and two-operand einsum of values that both depend on inputs,
    one of them on more than the timestep; in graph order."""
    times, found = binding_times(gm), []
    for node in gm.graph.nodes:
        values = [_at(node, place) for place in _places(node)]
        if len(values) != 2 or not all(isinstance(value, fx.Node) for value in values):
            continue
        if times[node] is not Binding.X or not all(times.deps[value] for value in values):
            continue
        sides = [s for s, v in zip(SIDES, values, strict=True) if _is_probabilities(gm, v)]
        found.append(Product(node, values[0], values[1], sides[0] if len(sides) == 1 else None))
    return found


def replace_operand(product: Product, side: Side, value: fx.Node) -> None:
    """Let the product read `value` on one side, in place; `product` still names the old one."""
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
    """Where a product holds its operands; empty for other nodes."""
    name = op_name(node)
    if name == "einsum":
        listed = len(node.args) == 2 and isinstance(node.args[1], (list, tuple))
        inner: Any = node.args[1] if listed else node.args[1:]
        if len(inner) != 2:
            return []
        return [("args", 1, 0), ("args", 1, 1)] if listed else [("args", 1), ("args", 2)]
    found: list[tuple[str | int, ...]] = []
    for position, words in _OPERANDS.get(name, ()):
        if position < len(node.args):
            found.append(("args", position))
        else:
            found += [("kwargs", word) for word in words if word in node.kwargs]
    return found


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


# ---------------------------------------------------------------------------- measuring


def measure_products(
    gm: fx.GraphModule,
    chunks: Iterable[Sequence[Any]],
    *,
    spec: AttentionSpec,
    timesteps: Tensor,
    seed: int = 0,
) -> dict[str, dict[Side, Operand]]:
    """What each operand of each product of `gm` needs, by the name of the product's node.

    chunks: for each batch the placeholder values in order; run one by one, up to the last product.
    timesteps: (K,) sorted; ranges at those not visited are interpolated.  seed: of the values kept
    for the search of clipped ranges.
    Raises CalibrationError on NaN or Inf in an operand, and where there are products and no data.
    """
    products = find_products(gm)
    if not products:
        return {}
    observers = {
        (product.name, side): ProfileObserver(
            f"the product {product.name} ({side})",
            channel_dim=-1,
            seed=seed,
            keeps_values=spec.activations.ranges != "minmax",
        )
        for product in products
        for side in SIDES
    }
    position = list(gm.graph.find_nodes(op="placeholder")).index(timestep_node(gm))
    static: Reasons | None = None
    seen = False
    for chunk in chunks:
        seen, t = True, chunk[position]
        if static is None and len(t) > 1:
            static = _without_order(gm, products, chunk)
        walk = Walk(gm, [chunk])
        for product in products:
            walk.stop_before(product.node)
            for side in SIDES:
                (x,) = walk.values[product.operand(side)]
                own = static is None or (product.name, side) not in static
                # all values alike, as if of one channel: a text may have another length next time
                flat = x.reshape(x.shape[0] if own and x.dim() else 1, -1, 1)
                observers[product.name, side](flat, t if own else t.unique())
    if not seen:
        raise CalibrationError("the products of attention are to be quantized, but saw no data")
    if static is None:
        static = _without_batch(gm, products)
    found: dict[str, dict[Side, Operand]] = {}
    for product in products:
        found[product.name] = {}
        for side in SIDES:
            probabilities = product.probabilities == side
            reason = static.get((product.name, side))
            ranged = _as_ranged(spec, probabilities, reason)
            profile = observers[product.name, side].profile()
            ranges = input_ranges(profile, ranged, timesteps, torch.ones(1))
            found[product.name][side] = Operand(ranges, probabilities, reason)
    return found


def _as_ranged(spec: AttentionSpec, probabilities: bool, static: str | None) -> ActivationSpec:
    """How the range of an operand is found."""
    acts = spec.activations
    if probabilities:
        acts = dataclasses.replace(acts, bits=spec.probabilities_bits)
        if spec.probabilities == "log2":  # nothing to clip: the grid is finest near 0
            acts = dataclasses.replace(acts, ranges="minmax")
    if static is not None:
        acts = dataclasses.replace(acts, per_timestep=False, timestep_groups=None)
    return acts


# ---------------------------------------------------------------------------- whose rows


def _without_order(
    gm: fx.GraphModule, products: Sequence[Product], chunk: Sequence[Any]
) -> Reasons:
    """Why the rows of operands are not the samples' own, one sample after the other.

    Judged by an experiment, as sizes cannot tell (B heads, ...) from (heads B, ...): with another
    first sample, no row may change but the first n of n B.
    """
    t = timestep_node(gm)
    batch = str(t.meta["val"].shape[0])
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    other = []
    for node, value in zip(inputs, chunk, strict=True):
        shape = node.meta["val"].shape
        if node is not t and value.is_floating_point() and shape and str(shape[0]) == batch:
            value = torch.cat([value[:1] / 2 + value[1:2], value[1:]])
        other.append(value)
    count = len(chunk[inputs.index(t)])
    walk, found = Walk(gm, [chunk, other]), Reasons()
    for product in products:
        walk.stop_before(product.node)
        for side in SIDES:
            x, y = walk.values[product.operand(side)]
            own = x.shape[0] // count
            if x.dim() < 2 or x.shape[0] % count:
                shape = tuple(x.shape)
                found[product.name, side] = f"dim 0 of its {side} operand {shape} is not the batch"
            elif not torch.allclose(x[own:], y[own:], rtol=1e-3, atol=1e-6):
                reason = f"the rows of its {side} operand do not follow the order of the batch"
                found[product.name, side] = reason
    return found


def _without_batch(gm: fx.GraphModule, products: Sequence[Product]) -> Reasons:
    """The same by sizes alone, where calibration never saw two samples at once."""
    batch, found = timestep_node(gm).meta["val"].shape[0], Reasons()
    for product in products:
        for side in SIDES:
            shape = product.operand(side).meta["val"].shape
            if len(shape) < 2 or not _is_multiple(shape[0], batch):
                shape = tuple(shape)
                found[product.name, side] = f"dim 0 of its {side} operand {shape} is not the batch"
    return found


def _is_multiple(size: int | torch.SymInt, batch: int | torch.SymInt) -> bool:
    if isinstance(size, int) or isinstance(batch, int):
        return batch == 1 or (isinstance(size, int) and size == batch)
    return bool((size.node.expr / batch.node.expr).is_integer)
