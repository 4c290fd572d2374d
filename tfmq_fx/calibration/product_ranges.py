"""Measure the ranges of the operands of products, such as attention's, over samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.core.config import AttentionSpec
from tfmq_fx.core.errors import CalibrationError
from tfmq_fx.core.layer_config import ActivationSpec
from tfmq_fx.ir.graph import timestep_node, timestep_position
from tfmq_fx.ir.products import SIDES, Product, Side, find_products

from .executor import LayerwiseExecutor
from .input_profiles import ProfileObserver, input_ranges
from .observers import Ranges


@dataclass(frozen=True, slots=True)
class Operand:
    """The calibrated range of one operand over K timesteps.

    ranges: groups and clipping are applied.  probabilities: whether it is the result of a softmax.
    static: why one range serves all timesteps, or None.
    """

    ranges: Ranges
    probabilities: bool
    static: str | None


Measured = Mapping[str, Mapping[Side, Operand]]
Reasons = dict[tuple[str, Side], str]  # product and side -> why its rows are not the samples'


def measure_products(
    gm: fx.GraphModule,
    chunks: Iterable[Sequence[Any]],
    *,
    spec: AttentionSpec,
    timesteps: Tensor,
    seed: int = 0,
) -> dict[str, dict[Side, Operand]]:
    """The range of each operand of each product of `gm`, by the name of the product's node.

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
    position = timestep_position(gm)
    static: Reasons | None = None
    chunk: Sequence[Any] = ()
    for chunk in chunks:
        t = chunk[position]
        if static is None and len(t) > 1:
            static = _reordered_rows(gm, products, chunk)
        walk = LayerwiseExecutor(gm, [chunk])
        for product in products:
            walk.stop_before(product.node)
            for side in SIDES:
                (x,) = walk.values[product.operand(side)]
                own = static is None or (product.name, side) not in static
                # as one channel: a text may have another length at the next call
                flat = x.reshape(x.shape[0] if own and x.dim() else 1, -1, 1)
                observers[product.name, side](flat, t if own else t.unique())
    if not chunk:
        raise CalibrationError("the products of attention are to be quantized, but saw no data")
    if static is None:
        static = _unbatched_rows(gm, products)

    def operand(product: Product, side: Side) -> Operand:
        probabilities, reason = product.probabilities == side, static.get((product.name, side))
        acts = _activation_spec(spec, probabilities, reason)
        profile = observers[product.name, side].profile()
        return Operand(input_ranges(profile, acts, timesteps, torch.ones(1)), probabilities, reason)

    return {p.name: {side: operand(p, side) for side in SIDES} for p in products}


def _activation_spec(
    spec: AttentionSpec, probabilities: bool, static: str | None
) -> ActivationSpec:
    """The settings by which the range of an operand is estimated."""
    acts = spec.activations
    if probabilities:
        acts = dataclasses.replace(acts, bits=spec.probabilities_bits)
        if spec.probabilities == "log2":  # nothing to clip: the grid is finest near 0
            acts = dataclasses.replace(acts, ranges="minmax")
    if static is not None:
        acts = dataclasses.replace(acts, per_timestep=False, timestep_groups=None)
    return acts


def _reordered_rows(
    gm: fx.GraphModule, products: Sequence[Product], chunk: Sequence[Any]
) -> Reasons:
    """Reasons why the rows of operands are not those of sample after sample, found by experiment.

    Sizes cannot tell (B heads, ...) from (heads B, ...). So the first sample is changed: then only
    the first n of n B rows may change.
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
    walk, reasons = LayerwiseExecutor(gm, [chunk, other]), Reasons()
    for product in products:
        walk.stop_before(product.node)
        for side in SIDES:
            x, y = walk.values[product.operand(side)]
            own = x.shape[0] // count
            if x.dim() < 2 or x.shape[0] % count:
                reasons[product.name, side] = _not_the_batch(side, x.shape)
            elif not torch.allclose(x[own:], y[own:], rtol=1e-3, atol=1e-6):
                reason = f"the rows of its {side} operand do not follow the order of the batch"
                reasons[product.name, side] = reason
    return reasons


def _unbatched_rows(gm: fx.GraphModule, products: Sequence[Product]) -> Reasons:
    """Reasons found from sizes alone, where calibration never saw two samples at once."""
    batch, reasons = timestep_node(gm).meta["val"].shape[0], Reasons()
    for product in products:
        for side in SIDES:
            shape = product.operand(side).meta["val"].shape
            if len(shape) < 2 or not _is_multiple(shape[0], batch):
                reasons[product.name, side] = _not_the_batch(side, shape)
    return reasons


def _not_the_batch(side: Side, shape: Sequence[Any]) -> str:
    return f"dim 0 of its {side} operand {tuple(shape)} is not the batch"


def _is_multiple(size: int | torch.SymInt, batch: int | torch.SymInt) -> bool:
    if isinstance(size, int) or isinstance(batch, int):
        return batch == 1 or (isinstance(size, int) and size == batch)
    return bool((size.node.expr / batch.node.expr).is_integer)
