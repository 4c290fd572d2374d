"""Change the set of timesteps of a folded graph: every look-up gets new rows.

row = timestep_row(table, keys, t)    ->    row = timestep_row(table', keys', t)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph import timestep_node
from tfmq_fx.ir.graph_pass import Rewrite, graph_pass
from tfmq_fx.ir.verifier import is_timestep_row
from tfmq_fx.quant.activation import QuantActivation
from tfmq_fx.quant.affine import levels
from tfmq_fx.quant.timestep_lookup import check_timesteps, timestep_index
from tfmq_fx.quant.timestep_table import FEATURE, TABLE, QuantTimestepTable


@graph_pass(takes=(Stage.FOLDED, Stage.QUANTIZED), gives=None)
def change_timesteps(
    gm: fx.GraphModule,
    *,
    timesteps: Tensor,
    rows: Mapping[str, Tensor] | None = None,
    calibrated: tuple[Tensor, Mapping[str, Tensor]] | None = None,
) -> Rewrite:
    """The graph for `timesteps` (K,), finite, unique, in any order.

    Scales and corrections are measured, so between the timesteps that have some they are
    interpolated in t, and beyond the ends they stay as at the ends; where a timestep was in the set
    before its row stays bit for bit.  A site's zero point serves all timesteps: with it, a scale
    between two covers every range between theirs.  Features are computed, so their rows are never
    interpolated.
    rows: each feature at each timestep, (K, ...), by name; integer tables round them anew.  Left
    out, rows are selected, and all timesteps must be in the set already.
    calibrated: timesteps and, by buffer, rows to interpolate from in place of the graph's own.
    details: how many timesteps were kept and interpolated, and the features.
    Raises ConfigError for timesteps or rows that cannot be used.
    """
    tables = [node for node in gm.graph.nodes if is_timestep_row(node)]
    caches = [node for node in gm.graph.nodes if _cache(gm, node) is not None]
    old = _keys(gm, tables)
    new = check_timesteps(timesteps, timestep_node(gm).meta["val"].dtype).to(old.device)
    features = [name for node in (*tables, *caches) for name, _ in _features(node)]
    # the part of a graph that only hands rows on does not say which features they hold
    computed = [node for node in tables if _buffer(node, 0).startswith(TABLE)] + caches
    unchanged = int((timestep_index(old, new) >= 0).sum())
    details: dict[str, Any] = {"timesteps": len(new), "kept": unchanged, "interpolated": 0}
    details["features"] = features
    if rows is None and calibrated is None and torch.equal(old, new):
        return Rewrite(gm, 0, [], details)
    _check_rows(
        features or ["the temporal block"] * bool(computed), rows, new, missing=len(new) - unchanged
    )
    known, measured = calibrated or (old, {})
    for node in tables:
        name = _buffer(node, 0)
        table = getattr(gm, name)
        if not name.startswith(TABLE):
            own = measured.get(name, table).to(table.device)
            log2 = dict(_choices(gm, node))
            new_rows, filled = _interpolate(own, known.to(old.device), new, log2)
            details["interpolated"] = max(details["interpolated"], filled)
        elif rows is None:
            new_rows = table[timestep_index(old, new)]
        else:
            new_rows = table.new_zeros((len(new), table.shape[1]))
            for feature, columns in _features(node):
                width = columns.stop - columns.start
                new_rows[:, columns] = _columns(feature, rows[feature], width).to(table)
        setattr(gm, name, new_rows)  # buffers of a fork are its own
    for name in {_buffer(node, 1) for node in tables}:
        setattr(gm, name, new.clone())
    for node in caches:
        gm.set_submodule(str(node.target), _cached(gm, node, old, new, rows))
    gm.meta["timesteps"] = new
    return Rewrite(gm, len(tables) + len(caches), [], details)


def _keys(gm: fx.GraphModule, tables: list[fx.Node]) -> Tensor:
    """The sorted timesteps (K,) that the tables of the graph have rows for."""
    known = gm.meta.get("timesteps")
    if known is None and tables:
        known = getattr(gm, _buffer(tables[0], 1))
    if not isinstance(known, Tensor):
        raise ConfigError("the graph is over no finite set of timesteps; fold it first")
    return known


def _check_rows(
    features: list[str], rows: Mapping[str, Tensor] | None, new: Tensor, missing: int
) -> None:
    if rows is None:
        if features and missing:
            raise ConfigError(
                f"{missing} of {len(new)} timesteps are new to the table of {', '.join(features)}, "
                "whose rows are computed, never interpolated. Call tfmq_fx.refresh(model, source, "
                "timesteps=...) with the model that this one was made from."
            )
        return
    if different := sorted(set(rows) ^ set(features)):
        raise ConfigError(
            f"rows must be given for the features {', '.join(features) or '(none)'}; "
            f"{', '.join(different)} differs"
        )
    for name, values in rows.items():
        if len(values) != len(new):
            raise ConfigError(f"{name}: {len(values)} rows given for {len(new)} timesteps")


def _columns(feature: str, rows: Tensor, width: int) -> Tensor:
    """The rows (K, ...) of a feature as (K, width); a table may hold one row for all frames."""
    flat = rows.reshape(len(rows), -1)
    copies = flat.reshape(len(rows), -1, width)
    if not torch.equal(copies, copies[:, :1].expand_as(copies)):
        raise ConfigError(
            f"{feature}: the table holds one row for all frames, which differ in the rows given. "
            "Prepare and convert the source anew"
        )
    return copies[:, 0]


def _interpolate(
    table: Tensor, old: Tensor, new: Tensor, log2: Mapping[int, tuple[int, int]]
) -> tuple[Tensor, int]:
    """The rows of `table` (K, F) at the timesteps `new`, and how many of them are interpolated.

    log2: column of a scale -> column that is 1 where its grid is logarithmic, and the largest code.
    There the grid follows the nearer timestep, and what is interpolated is the highest value.
    """
    index = timestep_index(old, new)
    above = torch.searchsorted(old, new).clamp(max=len(old) - 1)
    below = (above - 1).clamp(min=0)
    span = (old[above] - old[below]).double()
    share = torch.where(span > 0, (new - old[below]).double() / span, 0.0).clamp(0, 1)[:, None]
    values = table.double()
    for scale, (flag, top) in log2.items():
        values[:, scale] *= torch.where(table[:, flag] != 0, 1, top)
    interpolated = values[below] * (1 - share) + values[above] * share
    for scale, (flag, top) in log2.items():
        nearer = torch.where(share[:, 0] <= 0.5, below, above)
        interpolated[:, flag] = values[nearer, flag]
        interpolated[:, scale] /= torch.where(interpolated[:, flag] != 0, 1, top)
    hit = index >= 0
    interpolated = torch.where(
        hit[:, None], table[index.clamp(min=0)], interpolated.to(table.dtype)
    )
    return interpolated, int((~hit).sum())


def _cached(
    gm: fx.GraphModule,
    node: fx.Node,
    old: Tensor,
    new: Tensor,
    rows: Mapping[str, Tensor] | None,
) -> QuantTimestepTable:
    """The integer table that `node` calls, with rows for the new timesteps."""
    table = _cache(gm, node)
    assert table is not None
    if rows is not None:
        names = {columns.start: feature for feature, columns in _features(node)}
        features, start = [], 0
        for width in table.widths:
            none = torch.zeros(
                len(new), width, dtype=torch.float32, device=table.scale.device
            )  # nothing reads it
            name = names.get(start)
            feature = none if name is None else _columns(name, rows[name], width)
            features.append(feature.to(none.device))
            start += width
        cached = QuantTimestepTable.from_rows(new, features, bits=table.bits)
        cached.dtype = table.dtype
        return cached
    cached = QuantTimestepTable.from_spec({**table.spec(), "rows": len(new)}).to(table.scale.device)
    index = timestep_index(old, new)
    cached.keys = new.clone()
    cached.codes, cached.scale = table.codes[index], table.scale[index]
    cached.zero = table.zero[index]
    return cached


def _cache(gm: fx.GraphModule, node: fx.Node) -> QuantTimestepTable | None:
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, QuantTimestepTable) else None


def _features(row: fx.Node) -> Iterator[tuple[str, slice]]:
    """The name of each feature that is read from a row, with its columns."""
    for user in row.users:
        if FEATURE in user.meta:
            columns: Any = user.args[1]
            yield user.meta[FEATURE], columns[1]


def _choices(gm: fx.GraphModule, row: fx.Node) -> Iterator[tuple[int, tuple[int, int]]]:
    """The columns of scales whose grid depends on the timestep, each with the column that says
    which grid it is, and the largest code."""
    columns = {user: user.args[1] for user in row.users if user.target is operator.getitem}
    for user, column in columns.items():
        for call in user.users:
            module = gm.get_submodule(str(call.target)) if call.op == "call_module" else None
            if isinstance(module, QuantActivation) and len(call.args) > 2 and call.args[1] is user:
                choice: Any = columns[call.args[2]]  # type: ignore[index]
                scale: Any = column
                yield scale[1], (choice[1], levels(module.bits))


def _buffer(row: fx.Node, argument: int) -> str:
    """The name of the buffer that a look-up reads: its rows (argument 0) or its keys (1)."""
    read = row.args[argument]
    assert isinstance(read, fx.Node)
    return str(read.target)
