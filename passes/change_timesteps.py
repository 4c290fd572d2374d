"""Change the set of timesteps of a folded graph: every look-up gets new rows.

row = timestep_row(table, keys, t)    ->    row = timestep_row(table', keys', t)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    old = _keys(gm)
    new = check_timesteps(timesteps, timestep_node(gm).meta["val"].dtype).to(old.device)
    tables = tables_at(gm, new, rows=rows, calibrated=calibrated)
    unchanged = int((timestep_index(old, new) >= 0).sum())
    details: dict[str, Any] = {"timesteps": len(new), "kept": unchanged}
    details |= {"interpolated": tables.interpolated, "features": feature_names(gm)}
    if rows is None and calibrated is None and torch.equal(old, new):
        return Rewrite(gm, 0, [], details)
    tables.place(gm)
    return Rewrite(gm, len(tables.rows) + len(tables.caches), [], details)


@dataclass(frozen=True, slots=True)
class Tables:
    """What the look-ups of a graph read, over one set of timesteps.

    keys: (K,), sorted.  key_names: the buffers that hold them.  rows: by buffer, (K, F).  caches:
    integer tables by the path of their module.  interpolated: how many of the timesteps have rows
    between those of others.
    """

    keys: Tensor
    key_names: frozenset[str]
    rows: Mapping[str, Tensor]
    caches: Mapping[str, QuantTimestepTable]
    interpolated: int

    def place(self, gm: fx.GraphModule) -> None:
        """Have the look-ups of `gm` read these, in place of what its buffers and modules hold."""
        for name, rows in self.rows.items():
            if name in gm._buffers:
                gm._buffers[name] = rows
        for name in self.key_names & gm._buffers.keys():
            gm._buffers[name] = self.keys.clone()
        for path, cache in self.caches.items():
            if path in gm._modules:
                gm._modules[path] = cache
        gm.meta["timesteps"] = self.keys


def tables_of(gm: fx.GraphModule) -> Tables:
    """The tables that a graph has now."""
    lookups, caches = _lookups(gm)
    return Tables(
        _keys(gm),
        frozenset(_buffer(node, 1) for node in lookups),
        {name: getattr(gm, name) for name in (_buffer(node, 0) for node in lookups)},
        {str(node.target): cache for node, cache in caches.items()},
        0,
    )


def tables_at(
    gm: fx.GraphModule,
    new: Tensor,
    *,
    rows: Mapping[str, Tensor] | None = None,
    calibrated: tuple[Tensor, Mapping[str, Tensor]] | None = None,
) -> Tables:
    """The tables of a graph for the timesteps `new`, keys as `check_timesteps` returns them.

    rows, calibrated: as for `change_timesteps`.  Raises ConfigError for rows that cannot be used.
    """
    lookups, caches = _lookups(gm)
    old = _keys(gm)
    features = feature_names(gm)
    # the part of a graph that only hands rows on does not say which features they hold
    computed = [node for node in lookups if _buffer(node, 0).startswith(TABLE)] + [*caches]
    missing = int((timestep_index(old, new) < 0).sum())
    _check_rows(features or ["the temporal block"] * bool(computed), rows, new, missing=missing)
    known, measured = calibrated or (old, {})
    found, interpolated = dict[str, Tensor](), 0
    for node in lookups:
        name = _buffer(node, 0)
        table = getattr(gm, name)
        if not name.startswith(TABLE):
            own = measured.get(name, table).to(table.device)
            log2 = dict(_choices(gm, node))
            found[name], filled = _interpolate(own, known.to(old.device), new, log2)
            interpolated = max(interpolated, filled)
        elif rows is None:
            found[name] = table[timestep_index(old, new)]
        else:
            found[name] = table.new_zeros((len(new), table.shape[1]))
            for feature, columns in _features(node):
                width = columns.stop - columns.start
                given = _columns(feature, rows[feature], width)
                found[name][:, columns] = given.to(table)
    return Tables(
        new,
        frozenset(_buffer(node, 1) for node in lookups),
        found,
        {str(node.target): _cached(node, table, old, new, rows) for node, table in caches.items()},
        interpolated,
    )


def feature_names(gm: fx.GraphModule) -> list[str]:
    """The names of the features that a graph reads from tables."""
    lookups, caches = _lookups(gm)
    return [name for node in (*lookups, *caches) for name, _ in _features(node)]


def _lookups(
    gm: fx.GraphModule,
) -> tuple[list[fx.Node], dict[fx.Node, QuantTimestepTable]]:
    """The nodes that read rows of tables, and those that call integer tables, with these."""
    modules = {node: _cache(gm, node) for node in gm.graph.nodes}
    caches = {node: cache for node, cache in modules.items() if cache is not None}
    return [node for node in gm.graph.nodes if is_timestep_row(node)], caches


def _keys(gm: fx.GraphModule) -> Tensor:
    """The sorted timesteps (K,) that the tables of the graph have rows for."""
    known = gm.meta.get("timesteps")
    if known is None:
        reads = [node for node in gm.graph.nodes if is_timestep_row(node)]
        known = getattr(gm, _buffer(reads[0], 1)) if reads else None
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
    node: fx.Node,
    table: QuantTimestepTable,
    old: Tensor,
    new: Tensor,
    rows: Mapping[str, Tensor] | None,
) -> QuantTimestepTable:
    """The integer table `table` that `node` calls, with rows for the new timesteps."""
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
