"""Record what a conversion did, as JSON-ready facts that are saved and read by `report`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from tfmq_fx.backends.support import keeps_integer_weights, obstacle
from tfmq_fx.calibration.observers import Ranges
from tfmq_fx.ir.graph_pass import Rewrite
from tfmq_fx.ir.opaque_layers import inner_sites
from tfmq_fx.ir.sites import find_sites
from tfmq_fx.quant.activation import QuantActivation
from tfmq_fx.quant.low_rank import LowRank
from tfmq_fx.quant.quant_layer import QuantLayer

_OPAQUE = "inside an opaque module, which runs as the model's own code"
_NO_BLOCK: dict[str, list[Any]] = {"features": [], "modules": [], "shared": [], "declined": []}


@dataclass(frozen=True, kw_only=True)
class ConversionRecord:
    """The facts in `Converted.record`, as attributes.

    capture: how the model was captured.  block: the temporal block's features and modules.
    temporal: the candidate forms of each temporal feature, and the chosen one.
    samples: how many calibration samples were used, and how many the recipe takes.
    sites: each layer, by module path.  products: each rounded operand of attention.
    declined: [layer, reason] of those left in floating point.  left_weights: the number of weights
    in floating point.  parameters: where the model's parameters ended up.  bits: the bit plan.
    steps: each step of the conversion.  passes: the report of each graph pass.
    float_bytes: the size before.  removed: layers that tables replaced.
    """

    capture: dict[str, Any]
    sites: dict[str, dict[str, Any]]
    declined: list[list[str]]
    left_weights: int
    parameters: dict[str, Any]
    float_bytes: int
    block: dict[str, Any] = field(default_factory=lambda: dict(_NO_BLOCK))
    temporal: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=lambda: {"used": 0, "asked": 0})
    products: dict[str, dict[str, Any]] = field(default_factory=dict)
    bits: dict[str, Any] | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)
    removed: dict[str, Any] = field(default_factory=dict)


def pass_record(rewrite: Rewrite) -> dict[str, Any]:
    """The record of one pass: its name, changes, declined sites and duration."""
    return {
        "name": rewrite.name,
        "changed": rewrite.changed,
        "seconds": round(rewrite.seconds, 3),
        "declined": [[d.site, d.reason] for d in rewrite.declined],
        "details": rewrite.details,
    }


def site_records(gm: fx.GraphModule, ranges: Mapping[str, Ranges]) -> dict[str, dict[str, Any]]:
    """The record of every convolution and linear layer that is left in the graph."""
    records = {}
    inner = {site.name for site in inner_sites(gm)[0]}
    for site in (*find_sites(gm)[0], *inner_sites(gm)[0]):
        layer = site.layer
        record: dict[str, Any] = {
            "kind": type(layer).__name__,
            "weights": site.weights,
            "weight_bits": None,
            "weight_format": "float",
            "weight_groups": 1,
            "act_bits": None,
            "act_format": "float",
            "reference_only": None,
            "ranges": "none",
            "interpolated": 0,
            "bytes": sum(p.nbytes for p in layer.parameters()),
        }
        if isinstance(layer, QuantLayer):
            seen = ranges.get(site.name)
            record |= {
                "weights": layer.weight_shape_numel(),
                "weight_bits": layer.weight_bits,
                "weight_format": layer.weight_format,
                "weight_groups": layer.weight_groups,
                "act_bits": layer.act_bits,
                "act_format": layer.act_format if layer.act_bits else "float",
                "reference_only": _OPAQUE if site.name in inner else _why_reference(layer),
                "ranges": layer.range_kind(),
                "interpolated": seen.interpolated if seen and layer.per_timestep else 0,
                "bytes": sum(b.nbytes for b in layer.buffers()),
            }
        records[site.name] = record
    return records


def _why_reference(layer: QuantLayer) -> str | None:
    return None if keeps_integer_weights(layer) else obstacle(layer)


def branch_weights(gm: fx.GraphModule) -> int:
    """The number of 16-bit weights in low-rank branches."""
    branches = [m for m in gm.modules() if isinstance(m, LowRank)]
    return sum(p.numel() for branch in branches for p in branch.parameters())


def product_records(gm: fx.GraphModule) -> dict[str, dict[str, Any]]:
    """The bits and grid of every operand of attention's products that is rounded to integers."""
    return {
        name: {"bits": module.bits, "grid": module.grid}
        for name, module in gm.named_modules()
        if isinstance(module, QuantActivation)
    }
