"""Temporal features of a model against rows recomputed from its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from .dataflow import compute_rows, temporal_block
from .dialect import is_timestep_row
from .graph import insert_timestep_row, timestep_node
from .passes.reconstruct_tib import relative_errors
from .regions import extract
from .tables import FEATURE, QuantTimestepTable, cache_rows, restore_rows

Form = Literal["table", "cache", "block"]  # exact rows, integer rows, computed by layers
_ROUNDING = 16  # of the dtype's eps: what another machine's order of additions leaves in a row


@dataclass(frozen=True, slots=True)
class FeatureError:
    """One temporal feature over the set of K timesteps.

    node: its name in the model's graph.  rows: the reference's, (K, ...).  stored: what a sound
    model of this form has in their place.  found: what this one has.  errors: |found - rows| /
    |rows| of each row, (K,).  bits: of integer rows.
    """

    name: str
    node: str
    form: Form
    bits: int | None
    rows: Tensor
    stored: Tensor
    found: Tensor
    errors: Tensor

    @property
    def wrong(self) -> Tensor:
        """The timesteps whose row is not what its form explains: (K,) bool.

        Features that layers compute are judged by those.
        """
        if self.form == "block":
            return torch.zeros(len(self.errors), dtype=torch.bool)
        (sound,) = relative_errors((self.stored,), (self.rows,))
        rounding = _ROUNDING * torch.finfo(self.rows.dtype).eps
        explained: Tensor = self.errors <= 2 * sound.cpu() + rounding
        return ~explained

    @property
    def broken(self) -> bool:
        """Whether any row is wrong."""
        return bool(self.wrong.any())

    def twin(self, row: int) -> int | None:
        """The other timestep whose row is found at position `row`, if one."""
        for i, stored in enumerate(self.stored):
            if i != row and torch.equal(stored, self.found[row]):
                return i
        return None


def feature_errors(
    reference: fx.GraphModule, model: fx.GraphModule, timesteps: Tensor
) -> list[FeatureError]:
    """Each temporal feature of `reference` that `model` still has.

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
    found = dict(zip(nodes, compute_rows(graph, timesteps), strict=True))
    result = []
    for name, node in nodes.items():
        values = found[name].view_as(rows[name])
        form, bits = _form(model, node)
        stored = rows[name]
        if bits is not None:
            cached = restore_rows(*cache_rows(stored.reshape(len(stored), -1), bits))
            stored = cached.to(stored.dtype).view_as(stored)
        (errors,) = relative_errors((values,), (rows[name],))
        result.append(
            FeatureError(name, node.name, form, bits, rows[name], stored, values, errors.cpu())
        )
    return result


def temporal_errors(
    reference: fx.GraphModule, model: fx.GraphModule, timesteps: Tensor
) -> tuple[list[str], Tensor]:
    """Names of the temporal features and their relative error in `model`: (features, K).

    reference: the captured graph.  model: folded or quantized from it.
    """
    found = feature_errors(reference, model, timesteps)
    if not found:
        return [], torch.zeros(0, len(timesteps), dtype=torch.float32)
    return [f.name for f in found], torch.stack([f.errors for f in found])


def with_rows(node: str, rows: Tensor, timesteps: Tensor) -> Callable[[fx.GraphModule], None]:
    """A change of a graph: the value of `node` looked up in `rows` (K, ...) instead."""

    def change(gm: fx.GraphModule) -> None:
        row = insert_timestep_row(gm, "fixed_rows", rows.reshape(len(rows), -1), timesteps)
        (old,) = [n for n in gm.graph.nodes if n.name == node]
        new = row
        if old.meta["val"].dim() != 2:
            with gm.graph.inserting_after(row):
                new = gm.graph.call_method("reshape", (row, (-1, *rows.shape[1:])))
        old.replace_all_uses_with(new)
        gm.recompile()

    return change


def _form(model: fx.GraphModule, node: fx.Node) -> tuple[Form, int | None]:
    """How a model holds a feature, and the bits of integer rows."""
    row = node.args[0] if FEATURE in node.meta else None
    if isinstance(row, fx.Node) and is_timestep_row(row):
        return "table", None
    if isinstance(row, fx.Node) and row.op == "call_module":
        table = model.get_submodule(str(row.target))
        if isinstance(table, QuantTimestepTable):
            return "cache", table.bits
    return "block", None
