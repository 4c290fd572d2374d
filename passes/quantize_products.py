"""Round both operands of every product of activations, as in attention.

y = matmul(p, v)    ->    row = timestep_row(product_scales, keys, t);
                          y = matmul(round_p(p, row[:, i]), round_v(v, row[:, j]))
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.calibration.product_ranges import Measured, Operand
from tfmq_fx.core.config import AttentionSpec
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph import insert_timestep_row
from tfmq_fx.ir.graph_pass import Declined, Rewrite, graph_pass
from tfmq_fx.ir.layer_edits import call_before
from tfmq_fx.ir.products import SIDES, Product, Side, find_products, replace_operand
from tfmq_fx.quant.activation import Grid, QuantActivation
from tfmq_fx.quant.affine import levels, shared_zero_scales

SCALES = "product_scales"  # buffer: one row of scales for each timestep
PREFIX = "quantized_products"


@graph_pass(takes=(Stage.CAPTURED, Stage.FOLDED, Stage.QUANTIZED), gives=Stage.QUANTIZED)
def quantize_products(
    gm: fx.GraphModule, *, measured: Measured, spec: AttentionSpec, timesteps: Tensor
) -> Rewrite:
    """The graph with a QuantActivation in front of both operands of every product.

    measured: by `measure_products` on the graph in floating point, over `timesteps` (K,); products
    are matched by their node's name, which they keep.  An operand whose rows are not the samples'
    gets one static range, and is declined with that reason.
    details["products"]: for each product and side its bits, grid and kind of range.
    """
    declined, changed = [], 0
    columns: dict[fx.Node, Tensor] = {}  # calls that want a scale for each timestep
    details: dict[str, Any] = {}
    for product in find_products(gm):
        if product.name not in measured:
            declined.append(Declined(product.name, "calibration saw no such product"))
            continue
        operands = [product.operand(side) for side in SIDES]
        called = [gm.get_submodule(str(x.target)) for x in operands if x.op == "call_module"]
        if any(isinstance(module, QuantActivation) for module in called):
            declined.append(Declined(product.name, "it is quantized already"))
            continue
        details[product.name] = {}
        for side in SIDES:
            operand = measured[product.name][side]
            if operand.static is not None and spec.activations.per_timestep:
                declined.append(Declined(product.name, f"static range: {operand.static}"))
            module, scale = _rounding(operand, spec)
            call = _insert(gm, product, side, module)
            if module.per_timestep:
                columns[call] = scale
            details[product.name][side] = {
                "bits": module.bits,
                "grid": module.grid,
                "ranges": module.range_kind(),
                "interpolated": operand.ranges.interpolated,
            }
        changed += 1
    if columns:
        table = torch.stack(list(columns.values()), 1).to(timesteps.device)
        row = insert_timestep_row(gm, SCALES, table, timesteps)
        for column, call in enumerate(columns):
            place, name = (slice(None), column), f"scale_{call.name}"
            call.args = (call.args[0], call_before(call, operator.getitem, row, place, name=name))
    return Rewrite(gm, changed, declined, {"products": details})


def _rounding(operand: Operand, spec: AttentionSpec) -> tuple[QuantActivation, Tensor]:
    """The module that rounds an operand, and its scale at each timestep (K,) float32."""
    bits = spec.probabilities_bits if operand.probabilities else spec.activations.bits
    grid: Grid = spec.probabilities if operand.probabilities else "uniform"
    per_timestep = spec.activations.per_timestep and operand.static is None
    module = QuantActivation(bits=bits, grid=grid, per_timestep=per_timestep)
    low, high = operand.ranges.low, operand.ranges.high
    if operand.probabilities:  # no value is below 0, and a logarithmic grid ends at the highest
        top = 1 if grid == "log2" else levels(bits)
        scale, zero = torch.where(high > 0, high / top, 1.0), 0
    else:
        scale, zero = shared_zero_scales(low, high, bits=bits)
    module.set_static_range(float(scale.max()), zero)
    return module, scale


def _insert(gm: fx.GraphModule, product: Product, side: Side, module: QuantActivation) -> fx.Node:
    """Insert a call of `module` on one operand of a product, and return it."""
    value, node = product.operand(side), product.node
    path = f"{PREFIX}.{product.name}.{side}"
    gm.add_submodule(path, module.to(value.meta["val"].device))
    with gm.graph.inserting_before(node):
        call = gm.graph.create_node(
            "call_module", path, (value,), {}, name=f"{product.name}_{side}"
        )
    call.meta = {"val": value.meta["val"], "nn_module_stack": node.meta["nn_module_stack"]}
    replace_operand(product, side, call)
    return call
