"""Compare the temporal features of a model with rows recomputed from its reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tfmq_fx.ir.graph import timestep_node
from tfmq_fx.ir.subgraphs import compute_rows, extract
from tfmq_fx.ir.temporal_block import by_sample, temporal_block
from tfmq_fx.ir.verifier import is_timestep_row
from tfmq_fx.passes.reconstruct_tib import relative_errors
from tfmq_fx.quant.timestep_table import FEATURE, QuantTimestepTable, cache_rows, restore_rows

_ROUNDING = 16  # of the dtype's eps: what another machine's order of additions leaves in a row


@dataclass(frozen=True, slots=True)
class FeatureError:
    """The error of one temporal feature over the set of K timesteps.

    rows: the reference's, (K, ...).  stored: a sound model's; None where its layers compute them.
    actual: this model's.  errors: |actual - rows| / |rows|, (K,).
    """

    name: str
    rows: Tensor
    stored: Tensor | None
    actual: Tensor
    errors: Tensor

    @property
    def wrong(self) -> Tensor:
        """The timesteps whose row its number of bits does not explain, (K,) bool; none where layers
        compute the rows, which are judged themselves."""
        if self.stored is None:
            return torch.zeros(len(self.errors), dtype=torch.bool)
        (sound,) = relative_errors((self.stored,), (self.rows,))
        rounding = _ROUNDING * torch.finfo(self.rows.dtype).eps
        explained: Tensor = self.errors <= 2 * sound.cpu() + rounding
        return ~explained

    @property
    def broken(self) -> bool:
        """Whether any row is wrong."""
        return bool(self.wrong.any())

    @property
    def worst(self) -> int:
        """The index of the row that is furthest off, among the wrong ones where there are any."""
        errors = self.errors.nan_to_num(nan=math.inf)
        return int((errors.masked_fill(~self.wrong, -1.0) if self.broken else errors).argmax())

    def note(self, timesteps: Tensor) -> str:
        """The fault in words."""
        wrong, row = self.wrong, self.worst
        if self.stored is None or not self.broken:
            return ""
        faults = []
        if wrong.sum() > 1:
            faults.append(f"wrong at {int(wrong.sum())} of {len(wrong)} timesteps")
        twins = [i for i, each in enumerate(self.stored) if torch.equal(each, self.actual[row])]
        if twins:  # not the row itself, which would not be wrong
            there, other = float(timesteps[row]), float(timesteps[twins[0]])
            faults.append(f"at t={there:g} it has the row of t={other:g}")
        return "; ".join(faults)


def feature_errors(
    reference: fx.GraphModule, model: fx.GraphModule, timesteps: Tensor
) -> list[FeatureError]:
    """The error of each temporal feature of `reference` that `model` still has.

    reference: the captured graph.  model: folded or quantized from it.  timesteps: (K,).
    """
    block = temporal_block(reference)
    by_feature = {n.meta[FEATURE]: n for n in model.graph.nodes if FEATURE in n.meta}
    by_name = {n.name: n for n in model.graph.nodes}
    named = {f.name: by_feature.get(f.name) or by_name.get(f.node.name) for f in block.features}
    nodes = {name: node for name, node in named.items() if node is not None}
    if not nodes:
        return []
    computed = compute_rows(block.graph, timesteps)
    rows = {f.name: row for f, row in zip(block.features, computed, strict=True)}
    graph = extract(model, list(nodes.values()), [timestep_node(model)])
    computed_there = {f.name: f for f in block.features if f.name not in by_feature}
    graph = by_sample(graph, [computed_there.get(name) for name in nodes])
    result = []
    for (name, node), values in zip(nodes.items(), compute_rows(graph, timesteps), strict=True):
        actual = _like(values, rows[name])
        (errors,) = relative_errors((actual,), (rows[name],))
        stored = _stored(model, node, rows[name])
        result.append(FeatureError(name, rows[name], stored, actual, errors.cpu()))
    return result


def temporal_errors(
    reference: fx.GraphModule, model: fx.GraphModule, timesteps: Tensor
) -> tuple[list[str], Tensor]:
    """The names of the temporal features and their relative errors in `model`, (features, K).

    reference: the captured graph.  model: folded or quantized from it.
    """
    features = feature_errors(reference, model, timesteps)
    if not features:
        return [], torch.zeros(0, len(timesteps), dtype=torch.float32)
    return [f.name for f in features], torch.stack([f.errors for f in features])


def _stored(model: fx.GraphModule, node: fx.Node, rows: Tensor) -> Tensor | None:
    """The rows (K, ...) as a sound model holds them: exact, or rounded to its bits; None where
    layers compute them."""
    row = node.args[0] if FEATURE in node.meta else None
    if not isinstance(row, fx.Node):
        return None
    if is_timestep_row(row):
        return rows
    table = model.get_submodule(str(row.target)) if row.op == "call_module" else None
    if not isinstance(table, QuantTimestepTable):
        return None
    return restore_rows(*cache_rows(rows.flatten(1), table.bits)).to(rows.dtype).view_as(rows)


def _like(values: Tensor, rows: Tensor) -> Tensor:
    """Values of a feature in the shape of its rows (K, ...), repeated where the model holds one for
    all frames."""
    if values.numel() == rows.numel():
        return values.view_as(rows)
    return values.reshape(len(rows), 1, *rows.shape[2:]).expand_as(rows)
