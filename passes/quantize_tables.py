"""Store temporal features as integers (cache-based maintenance, arXiv 2407.19547).

row = timestep_row(temporal_table, keys, t); h = row[:, a:b]
    ->    cached = temporal_cache_int8(t); h = cached[:, c:d]; the table keeps the other features
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph import fork, timestep_node
from tfmq_fx.ir.graph_pass import Rewrite, graph_pass, prune
from tfmq_fx.ir.verifier import is_timestep_row
from tfmq_fx.quant.timestep_table import BITS, FEATURE, QuantTimestepTable, cache_error

CACHE = "temporal_cache_int"  # followed by the bits: path of the cached table


@dataclass(frozen=True, slots=True)
class _Slice:
    """A feature in an exact table: `node` takes columns [start, stop) of the look-up `row`."""

    name: str
    node: fx.Node
    row: fx.Node
    start: int
    stop: int


@graph_pass(takes=Stage.FOLDED, gives=Stage.FOLDED)
def quantize_tables(gm: fx.GraphModule, *, bits: Mapping[str, int]) -> Rewrite:
    """The graph with the named features in cached tables, one for each bit width and dtype.

    bits: feature name -> 4 or 8, for features that `fold_timesteps` put into an exact table; one
    that is cached at that width already is left as it is.  Lossy: within half a step of each
    (timestep, feature) grid where nothing is clipped.  Raises ConfigError for other names or
    widths.
    details: bytes before and after, and the relative L2 error of each feature over its timesteps.
    """
    slices, cached = _features(gm)
    _check(bits, slices, cached)
    chosen = {name: s for name, s in slices.items() if name in bits}
    features: dict[str, Any] = {}
    rows = {each.row: None for each in chosen.values()}
    before = sum(_table(gm, row).nbytes for row in rows)
    caches: dict[tuple[int, torch.dtype], list[_Slice]] = {}
    for name, each in chosen.items():
        table = _table(gm, each.row)
        caches.setdefault((bits[name], table.dtype), []).append(each)
        error = cache_error(table[:, each.start : each.stop], bits[name])
        features[name] = {
            "bits": bits[name],
            "error_mean": float(error.mean()),
            "error_worst": float(error.max()),
        }
    after = sum(_cache(gm, width, group) for (width, _), group in caches.items())
    for row in rows:
        keep = [s for name, s in slices.items() if s.row is row and name not in chosen]
        after += _shrink(gm, row, keep)
    prune(gm.graph)
    gm = fork(gm)  # without the tables that nothing reads now
    details = {"features": features, "bytes_before": before, "bytes_after": after}
    return Rewrite(gm, len(chosen), details=details)


def _features(gm: fx.GraphModule) -> tuple[dict[str, _Slice], dict[str, int]]:
    """The features in exact tables by name, and the bits of those in cached tables."""
    exact, cached = dict[str, _Slice](), dict[str, int]()
    for node in gm.graph.find_nodes(op="call_function", target=operator.getitem):
        row, columns = node.args
        if FEATURE not in node.meta or not isinstance(row, fx.Node):
            continue
        name = node.meta[FEATURE]
        if is_timestep_row(row):
            assert isinstance(columns, tuple) and isinstance(columns[1], slice)
            exact[name] = _Slice(name, node, row, columns[1].start, columns[1].stop)
        elif row.op == "call_module":
            table = gm.get_submodule(str(row.target))
            assert isinstance(table, QuantTimestepTable)
            cached[name] = table.bits
    return exact, cached


def _check(
    bits: Mapping[str, int], slices: Mapping[str, _Slice], cached: Mapping[str, int]
) -> None:
    for name, width in bits.items():
        if width not in BITS:
            raise ConfigError(f"{name}: rows can be cached at 4 or 8 bits, not {width}")
        if name in cached and cached[name] != width:
            raise ConfigError(f"{name} is cached at {cached[name]} bits; its exact rows are gone")
        if name not in slices and name not in cached:
            known = ", ".join(slices) or "none"
            raise ConfigError(f"no feature {name} in an exact table; there are {known}")


def _table(gm: fx.GraphModule, row: fx.Node, argument: int = 0) -> Tensor:
    """The table (K, F) that a look-up reads its rows from; argument: 1 for its keys (K,)."""
    node: Any = row.args[argument]
    return gm.get_buffer(str(node.target))


def _cache(gm: fx.GraphModule, bits: int, group: Sequence[_Slice]) -> int:
    """Move features into one new integer table, and return its bytes."""
    t, first = timestep_node(gm), group[0].row
    tables = [_table(gm, s.row)[:, s.start : s.stop] for s in group]
    module = QuantTimestepTable.from_rows(_table(gm, first, 1), tables, bits=bits)
    path, n = f"{CACHE}{bits}", 0
    while hasattr(gm, path):
        n += 1
        path = f"{CACHE}{bits}_{n}"
    gm.add_submodule(path, module)
    with gm.graph.inserting_after(first):
        row = gm.graph.call_module(path, (t,))
    width = sum(module.widths)
    value = first.meta["val"]
    row.meta = {
        "val": value.new_empty((value.shape[0], width)),
        "nn_module_stack": first.meta["nn_module_stack"],
    }
    start = 0
    for each, columns in zip(group, module.widths, strict=True):
        _move(each, row, start, columns)
        start += columns
    return module.nbytes()


def _move(each: _Slice, row: fx.Node, start: int, width: int) -> None:
    """Read a feature from columns of another row."""
    columns = (slice(None), slice(start, start + width))
    each.node.args = (row, columns)
    each.node.meta["val"] = row.meta["val"][columns]


def _shrink(gm: fx.GraphModule, row: fx.Node, keep: Sequence[_Slice]) -> int:
    """Drop all columns but those of `keep` from an exact table, and return the bytes left."""
    if not keep:
        return 0
    rest = torch.cat([_table(gm, row)[:, s.start : s.stop] for s in keep], 1)
    (table, *_) = row.all_input_nodes
    setattr(gm, str(table.target), rest)  # buffers of a fork are its own
    row.meta["val"] = row.meta["val"].new_empty((row.meta["val"].shape[0], rest.shape[1]))
    start = 0
    for each in keep:
        _move(each, row, start, each.stop - each.start)
        start += each.stop - each.start
    return rest.nbytes
