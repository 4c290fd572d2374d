"""Products of two values that both vary with the inputs, as in attention: found and measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from .affine import dequantize, qparams, quantize
from .config import ActivationSpec, AttentionSpec
from .dataflow import Binding, binding_times
from .errors import CalibrationError
from .graph import timestep_node
from .likelihood import LikelihoodTest, likelihood_test
from .observers import RangeObserver, Ranges
from .ops import is_view, op_name
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
_VALUES = 1 << 18  # values of an operand kept for all timesteps together
_PER_STEP = (256, 16384)  # and for one timestep: least and most
_ENOUGH = 256  # values that a test or a search wants
_SHRINK, _CLIPS = 0.02, 45  # each candidate range is smaller by this share, and their number


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

    ranges: to be covered, groups and clipping included.  log2: (K,) bool, where a logarithmic grid
    was chosen.  tests: of each group of timesteps, where the choice was tested.  static: why one
    range must do for all timesteps, or None.
    """

    ranges: Ranges
    probabilities: bool
    log2: Tensor
    tests: tuple[LikelihoodTest, ...]
    static: str | None


Measured = Mapping[str, Mapping[Side, Operand]]


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
    for the likelihood test and the search of clipped ranges.  Groups of timesteps with fewer than
    256 such values decide together with their neighbours.
    Raises CalibrationError on NaN or Inf in an operand, and where there are products and no data.
    """
    products = find_products(gm)
    watched = {
        (product.name, side): _Watch(
            f"the product {product.name} ({side})", product.probabilities == side, timesteps, seed
        )
        for product in products
        for side in SIDES
    }
    if not products:
        return {}
    position = list(gm.graph.find_nodes(op="placeholder")).index(timestep_node(gm))
    checked = False
    for chunk in chunks:
        if not checked and len(chunk[position]) > 1:
            _check_order(gm, products, watched, chunk)
            checked = True
        walk = Walk(gm, [chunk])
        for product in products:
            walk.stop_before(product.node)
            for side in SIDES:
                (value,) = walk.values[product.operand(side)]
                watched[product.name, side].see(value, chunk[position])
    if not next(iter(watched.values())).observer.seen:
        raise CalibrationError("the products of attention are to be quantized, but saw no data")
    if not checked:
        _check_shapes(gm, products, watched)
    return {
        product.name: {side: watched[product.name, side].result(spec) for side in SIDES}
        for product in products
    }


class _Watch:
    """Ranges and a seeded sample of the values of one operand, by timestep."""

    def __init__(self, name: str, probabilities: bool, timesteps: Tensor, seed: int) -> None:
        self.observer = RangeObserver(name)
        self.probabilities, self.timesteps = probabilities, timesteps.double().cpu()
        self.static: str | None = None
        self.generator = torch.Generator().manual_seed(seed)
        least, most = _PER_STEP
        self.capacity = max(least, min(most, _VALUES // len(timesteps)))
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # position of t -> random keys, values

    def see(self, x: Tensor, t: Tensor) -> None:
        """x: (n B, ...), sample by sample, unless `static` says otherwise; t: (B,)."""
        if self.static is not None:
            x = x.detach()[None]
        self.observer(x, t)
        batched = x.shape[0] % len(t) == 0
        rows = x.detach().reshape(len(t) if batched else 1, -1)
        for row, step in zip(rows, t.tolist(), strict=False):
            self._keep(int((self.timesteps - step).abs().argmin()), row)

    def _keep(self, step: int, row: Tensor) -> None:
        # The values with the smallest random keys stay: all of a timestep's are equally likely.
        if len(row) > self.capacity:
            picks = torch.randint(len(row), (self.capacity,), generator=self.generator)
            row = row[picks.to(row.device)]
        keys, values = torch.rand(len(row), generator=self.generator), row.float().cpu()
        if step in self.kept:
            keys, values = (
                torch.cat(pair) for pair in zip(self.kept[step], (keys, values), strict=True)
            )
        order = keys.argsort()[: self.capacity]
        self.kept[step] = keys[order], values[order]

    def result(self, spec: AttentionSpec) -> Operand:
        """What was found, over the timesteps."""
        acts = spec.activations
        count = len(self.timesteps)
        groups = _groups(acts, count) if self.static is None else torch.zeros(count).long()
        seen = self.observer.ranges(self.timesteps)
        low, high = _per_group(seen.low, groups, "amin"), _per_group(seen.high, groups, "amax")
        log2 = torch.full((count,), self.probabilities and spec.probabilities == "log2")
        tests = []
        pools = self._pools(groups)
        if self.probabilities and spec.probabilities == "adaptive":
            for members, values in pools:
                tests.append(likelihood_test(values))
                log2[members] = tests[-1].power_law
        if acts.ranges == "mse":
            bits = spec.probabilities_bits if self.probabilities else acts.bits
            for members, values in pools:
                members = members[~log2[members]]
                if len(members):
                    share = best_clip(values, bits=bits)
                    low[members] *= share
                    high[members] *= share
        ranges = dataclasses.replace(seen, low=low, high=high)
        return Operand(ranges, self.probabilities, log2, tuple(tests), self.static)

    def _pools(self, groups: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Positions of timesteps, and the values kept for them: each group that has enough values,
        others together with the ones that follow (at the end, that come before)."""
        pools: list[tuple[Tensor, Tensor]] = []
        members: list[Tensor] = []
        values: list[Tensor] = []
        for group in groups.unique().tolist():
            steps = torch.nonzero(groups == group).flatten()
            members.append(steps)
            values += [self.kept[step][1] for step in steps.tolist() if step in self.kept]
            if sum(map(len, values)) >= _ENOUGH:
                pools.append((torch.cat(members), torch.cat(values)))
                members, values = [], []
        if members and pools:
            last = pools.pop()
            members, values = [last[0], *members], [last[1], *values]
        if members:
            pools.append((torch.cat(members), torch.cat(values)))
        return pools


def best_clip(values: Tensor, *, bits: int) -> float:
    """The share of the range of `values` (n,) to which a uniform grid of `bits` over them is best
    clipped: the one of 45 shares, 1 to 0.12, of least squared error."""
    low, high = values.min()[None], values.max()[None]
    shares = [1 - i * _SHRINK for i in range(_CLIPS)]
    losses = []
    for share in shares:
        grid = qparams(low * share, high * share, bits=bits)
        codes = quantize(values, grid.scale, grid.zero, bits)
        losses.append(float((dequantize(codes, grid.scale, grid.zero) - values).square().sum()))
    return shares[losses.index(min(losses))]


def _groups(acts: ActivationSpec, count: int) -> Tensor:
    """The group of each of `count` timesteps, (count,) int64, ascending."""
    if not acts.per_timestep:
        return torch.zeros(count).long()
    return torch.arange(count) * min(acts.timestep_groups or count, count) // count


def _per_group(values: Tensor, groups: Tensor, reduce: str) -> Tensor:
    shared = torch.zeros(int(groups.max()) + 1, dtype=values.dtype).scatter_reduce(
        0, groups, values, reduce, include_self=False
    )
    return shared[groups]


# ---------------------------------------------------------------------------- whose rows


def _check_order(
    gm: fx.GraphModule,
    products: Sequence[Product],
    watched: Mapping[tuple[str, Side], _Watch],
    chunk: Sequence[Any],
) -> None:
    """Mark operands whose rows are not the samples' own, one sample after the other.

    Judged by an experiment, as sizes cannot tell (B heads, ...) from (heads B, ...): with another
    first sample, no row may change but the first n of n B.
    """
    t = timestep_node(gm)
    batch = str(t.meta["val"].shape[0])
    other = []
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), chunk, strict=True):
        shape = node.meta["val"].shape
        if node is not t and value.is_floating_point() and shape and str(shape[0]) == batch:
            value = torch.cat([value[:1] / 2 + value[1:2], value[1:]])
        other.append(value)
    count = len(chunk[list(gm.graph.find_nodes(op="placeholder")).index(t)])
    walk = Walk(gm, [chunk, other])
    for product in products:
        walk.stop_before(product.node)
        for side in SIDES:
            x, y = walk.values[product.operand(side)]
            own = x.shape[0] // count
            if x.dim() < 2 or x.shape[0] % count:
                reason = f"dim 0 of its {side} operand {tuple(x.shape)} is not the batch"
            elif not torch.allclose(x[own:], y[own:], rtol=1e-3, atol=1e-6):
                reason = f"the rows of its {side} operand do not follow the order of the batch"
            else:
                continue
            watched[product.name, side].static = reason


def _check_shapes(
    gm: fx.GraphModule,
    products: Sequence[Product],
    watched: Mapping[tuple[str, Side], _Watch],
) -> None:
    """The same by sizes alone, where calibration never saw two samples at once."""
    batch = timestep_node(gm).meta["val"].shape[0]
    for product in products:
        for side in SIDES:
            shape = product.operand(side).meta["val"].shape
            if len(shape) < 2 or not _is_multiple(shape[0], batch):
                reason = f"dim 0 of its {side} operand {tuple(shape)} is not the batch"
                watched[product.name, side].static = reason


def _is_multiple(size: int | torch.SymInt, batch: int | torch.SymInt) -> bool:
    if isinstance(size, int) or isinstance(batch, int):
        return batch == 1 or (isinstance(size, int) and size == batch)
    return bool((size.node.expr / batch.node.expr).is_integer)
