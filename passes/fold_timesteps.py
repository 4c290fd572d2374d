"""Replace everything that depends on the timestep alone by rows of a table.

h = linear(silu(embed(t)))
    ->    row = timestep_row(temporal_table, temporal_keys, t);  h = row[:, a:b]
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.ir.binding_times import Binding, binding_times
from tfmq_fx.ir.graph import call_method, feature_slice, fork, insert_timestep_row, timestep_node
from tfmq_fx.ir.graph_pass import Declined, Rewrite, graph_pass, prune
from tfmq_fx.ir.node_info import is_view, op_name
from tfmq_fx.ir.request_cut import tensors_of
from tfmq_fx.ir.row_copies import rows_per_sample
from tfmq_fx.ir.subgraphs import as_input, compute_rows, fixed_batch
from tfmq_fx.ir.temporal_block import Feature, TemporalBlock, temporal_block
from tfmq_fx.quant.timestep_lookup import check_timesteps
from tfmq_fx.quant.timestep_table import FEATURE, TABLE


@graph_pass(takes=(Stage.CAPTURED, Stage.FOLDED), gives=Stage.FOLDED)
def fold_timesteps(
    gm: fx.GraphModule, *, timesteps: Tensor, only: Collection[str] | None = None
) -> Rewrite:
    """The graph that reads its temporal features from tables over `timesteps`.

    timesteps: (K,) finite, unique, in any order, of values the timestep's dtype can hold.
    only: names of the features to fold (`temporal_block(gm).features`); None folds all.
    Rows are computed one timestep at a time at batch 1; where the graph takes one other batch size
    only, at that, of which the first sample counts.  Outputs there are the same bit for bit; at
    other batch sizes matrix products round differently, as they do in the original (about 1e-6
    relative in float32).  Raises ConfigError for timesteps or names that cannot be used.
    details: features, rows, table_bytes, and weight_bytes, the bytes of parameters that left.
    """
    t = timestep_node(gm)
    keys = check_timesteps(timesteps, t.meta["val"].dtype)
    _check_same_set(gm, keys)
    block = temporal_block(gm)
    chosen, declined = _choose(block.features, only), list(block.declined)
    before = tensors_of(gm, gm.graph.nodes)
    rows = compute_rows(block.graph, keys)
    picked = []
    mixing = _mixing(block, keys, rows)
    for feature, values, mixes in zip(block.features, rows, mixing, strict=True):
        if feature.name in chosen and mixes:
            reason = "its value for one sample depends on the rest of the batch"
            declined.append(Declined(feature.name, reason))
        elif feature.name in chosen:
            picked.append((feature, feature.stored(values)))
    table_bytes = 0
    by_dtype = sorted(picked, key=lambda each: str(each[0].dtype))
    for _, group in itertools.groupby(by_dtype, key=lambda each: each[0].dtype):
        features, tables = zip(*group, strict=True)
        table = torch.cat([values.reshape(len(values), -1) for values in tables], 1)
        row = insert_timestep_row(gm, TABLE, table, keys)
        start = 0
        for feature, values in zip(features, tables, strict=True):
            _place(gm, feature, row, start, values.shape[1:])
            start += values.shape[1:].numel()
        table_bytes += table.nbytes
    if picked:
        _free_sizes(gm)
        prune(gm.graph)
        gm = fork(gm)  # without the tensors that nothing reads now
    gm.meta["timesteps"] = keys
    after = tensors_of(gm, gm.graph.nodes)
    freed = [value for key, value in before.items() if key not in after]
    details = {
        "features": [feature.name for feature, _ in picked],
        "rows": len(keys),
        "table_bytes": table_bytes,
        "weight_bytes": sum(p.nbytes for p in freed if isinstance(p, nn.Parameter)),
    }
    return Rewrite(gm, len(picked), declined, details)


def _mixing(block: TemporalBlock, keys: Tensor, rows: Sequence[Tensor]) -> list[bool]:
    """Which features of one sample depend on the other samples of the batch.

    A value that mixes samples (a mean over the batch, t[0]) or reads the batch size is off by its
    own magnitude; rounding in another order is not: 1 % of the norm tells them apart.  Where a
    sample has several rows, they also have to fit better as they are than in the other order.
    """
    graph = block.graph
    if not rows or rows[0].is_meta:
        return [False] * len(rows)
    picks = torch.linspace(0, len(keys) - 1, fixed_batch(graph) or 3).long()
    batch = graph(as_input(graph, keys[picks.to(keys.device)]))
    mixes = []
    for feature, value, row in zip(block.features, batch, rows, strict=True):
        expected = row[picks.to(row.device)]
        error = _distance(value, expected)
        wrong = error > 0.01 * _distance(expected, torch.zeros_like(expected))
        if feature.several:
            swapped = value.transpose(0, 1).reshape(value.shape)
            wrong |= 2 * _distance(swapped, expected) < error
        mixes.append(wrong or not torch.equal(value.isnan(), expected.isnan()))
    return mixes


def _distance(value: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vector_norm((value - other).nan_to_num().abs().double()))


def _place(
    gm: fx.GraphModule, feature: Feature, row: fx.Node, start: int, shape: Sequence[int]
) -> None:
    """Replace the node of a feature by its columns, from `start`, of a table row (B, F).

    shape: of the feature's value in the table; without its rows for each sample where they are
    copies of one.
    """
    old, graph, width = feature.node, gm.graph, math.prod(shape)
    with graph.inserting_before(old):
        columns = feature_slice(graph, row, start, width, f"{old.name}_row")
        columns.meta |= _inherited(old)
        new = call_method(columns, "contiguous") if _is_viewed(old) else columns
        if tuple(shape) != (width,):
            new = call_method(new, "reshape", -1, *shape)
        if feature.several:
            new = _all_rows(new, feature)
    columns.meta[FEATURE] = feature.name
    old.replace_all_uses_with(new)


def _all_rows(node: fx.Node, feature: Feature) -> fx.Node:
    """The rows of all samples below each other, from a value for each sample (B, *shape)."""
    count, *rest = feature.shape
    if node.meta["val"].dim() < 1 + len(feature.shape):  # one row for all
        node = call_method(node, "unsqueeze", 1)
        node = call_method(node, "expand", -1, count, *[-1] * len(rest))
    if feature.apart:
        node = call_method(node, "transpose", 0, 1)
    return call_method(node, "reshape", -1, *rest)


def _inherited(node: fx.Node) -> dict[str, Any]:
    """The metadata of a node that a look-up in its place takes over."""
    meta = {key: node.meta[key] for key in ("source", "stack_trace") if key in node.meta}
    stack = OrderedDict(node.meta.get("nn_module_stack") or {})
    if node.op == "call_module" and stack:
        stack.popitem()  # the look-up must not pass for the layer that it replaces
    return meta | {"nn_module_stack": stack}


def _is_viewed(node: fx.Node) -> bool:
    """Whether `view`, which refuses some strides, is called on a value or on a view of it."""
    return any(
        op_name(user) in ("view", "view_as") or (is_view(user) and _is_viewed(user))
        for user in node.users
    )


def _free_sizes(gm: fx.GraphModule) -> None:
    """Read batch sizes from the timestep instead of from values that are about to be removed."""
    times, t = binding_times(gm), timestep_node(gm)
    batch = t.meta["val"].shape[0]
    for node in list(gm.graph.nodes):
        if op_name(node) != "sym_size" or times[node.all_input_nodes[0]] is not Binding.T:
            continue
        rows = rows_per_sample(node.meta["val"], batch)
        if rows == 1:
            node.args = (t, 0)
        elif rows is not None:
            with gm.graph.inserting_before(node):
                size = gm.graph.call_function(node.target, (t, 0))
                size.meta = {**node.meta, "val": batch}
                several = gm.graph.call_function(operator.mul, (size, rows))
                several.meta = dict(node.meta)
            node.replace_all_uses_with(several)


def _choose(features: Collection[Feature], only: Collection[str] | None) -> set[str]:
    names = [feature.name for feature in features]
    if only is None:
        return set(names)
    if unknown := sorted(set(only) - set(names)):
        known = ", ".join(names) or "none"
        raise ConfigError(f"no temporal feature {', '.join(unknown)}; the graph has {known}")
    return set(only)


def _check_same_set(gm: fx.GraphModule, keys: Tensor) -> None:
    """Raise ConfigError if the graph has tables over other timesteps."""
    known = gm.meta.get("timesteps")
    if stage_of(gm) is not Stage.FOLDED or known is None:
        return
    if not torch.equal(known.to(keys.device), keys):
        raise ConfigError(
            f"the graph was folded for {len(known)} other timesteps; "
            "fold the captured graph instead"
        )
