"""Store temporal features as integers (cache-based maintenance, arXiv 2407.19547).

row = timestep_row(temporal_table, keys, t); h = row[:, a:b]
    ->    cached = temporal_cache_int8(t); h = cached[:, c:d]; the table keeps the other features
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
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


@graph_pass(takes=Stage.FOLDED, gives=Stage.FOLDED)
def quantize_tables(gm: fx.GraphModule, *, bits: Mapping[str, int]) -> Rewrite:
    """The graph with the named features in cached tables, one for each bit width and dtype.

    bits: feature name -> 4 or 8, for features that `fold_timesteps` put into an exact table; one
    that is cached at that width already is left as it is.  Lossy: within half a step of each
    (timestep, feature) grid where nothing is clipped.  Raises ConfigError for other names or
    widths.
    details: bytes before and after, and the relative L2 error of each feature over its timesteps.
    """
    exact, cached = _features(gm)
    _check(bits, exact, cached)
    chosen = {name: node for name, node in exact.items() if name in bits}
    features: dict[str, Any] = {}
    rows = {_row(node): None for node in chosen.values()}
    before = sum(_table(gm, row).nbytes for row in rows)
    caches: dict[tuple[int, torch.dtype], list[fx.Node]] = {}
    for name, node in chosen.items():
        values = _values(gm, node)
        caches.setdefault((bits[name], values.dtype), []).append(node)
        error = cache_error(values, bits[name])
        features[name] = {
            "bits": bits[name],
            "error_mean": float(error.mean()),
            "error_worst": float(error.max()),
        }
    after = sum(_cache(gm, width, group) for (width, _), group in caches.items())
    for row in rows:
        after += _shrink(gm, row, [node for node in exact.values() if _row(node) is row])
    prune(gm.graph)
    gm = fork(gm)  # without the tables that nothing reads now
    details = {"features": features, "bytes_before": before, "bytes_after": after}
    return Rewrite(gm, len(chosen), details=details)


def _features(gm: fx.GraphModule) -> tuple[dict[str, fx.Node], dict[str, int]]:
    """The nodes that read features from exact tables, and the bits of features in cached tables."""
    exact, cached = dict[str, fx.Node](), dict[str, int]()
    for node in gm.graph.find_nodes(op="call_function", target=operator.getitem):
        if FEATURE not in node.meta:
            continue
        name, row = node.meta[FEATURE], _row(node)
        if is_timestep_row(row):
            exact[name] = node
        elif row.op == "call_module":
            table = gm.get_submodule(str(row.target))
            assert isinstance(table, QuantTimestepTable)
            cached[name] = table.bits
    return exact, cached


def _check(
    bits: Mapping[str, int], exact: Mapping[str, fx.Node], cached: Mapping[str, int]
) -> None:
    for name, width in bits.items():
        if width not in BITS:
            raise ConfigError(f"{name}: rows can be cached at 4 or 8 bits, not {width}")
        if name in cached and cached[name] != width:
            raise ConfigError(f"{name} is cached at {cached[name]} bits; its exact rows are gone")
        if name not in exact and name not in cached:
            known = ", ".join(exact) or "none"
            raise ConfigError(f"no feature {name} in an exact table; there are {known}")


def _row(node: fx.Node) -> fx.Node:
    """The look-up whose columns a feature's node takes."""
    row = node.args[0]
    assert isinstance(row, fx.Node)
    return row


def _table(gm: fx.GraphModule, row: fx.Node, argument: int = 0) -> Tensor:
    """The table (K, F) that a look-up reads its rows from; argument: 1 for its keys (K,)."""
    node: Any = row.args[argument]
    return gm.get_buffer(str(node.target))


def _values(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The values of a feature at each timestep, (K, width), in its exact table."""
    columns: Any = node.args[1]
    return _table(gm, _row(node))[columns]


def _cache(gm: fx.GraphModule, bits: int, group: Sequence[fx.Node]) -> int:
    """Move features into one new integer table, and return its bytes."""
    first, tables = _row(group[0]), [_values(gm, node) for node in group]
    module = QuantTimestepTable.from_rows(_table(gm, first, 1), tables, bits=bits)
    path, n = f"{CACHE}{bits}", 0
    while hasattr(gm, path):
        n += 1
        path = f"{CACHE}{bits}_{n}"
    gm.add_submodule(path, module)
    with gm.graph.inserting_after(first):
        row = gm.graph.call_module(path, (timestep_node(gm),))
    value = first.meta["val"]
    row.meta = {
        "val": value.new_empty((value.shape[0], sum(module.widths))),
        "nn_module_stack": first.meta["nn_module_stack"],
    }
    _read_from(row, group)
    return module.nbytes()


def _shrink(gm: fx.GraphModule, row: fx.Node, keep: Sequence[fx.Node]) -> int:
    """Drop all columns but those of `keep` from an exact table, and return the bytes left."""
    if not keep:
        return 0
    rest = torch.cat([_values(gm, node) for node in keep], 1)
    table: Any = row.args[0]
    setattr(gm, str(table.target), rest)  # buffers of a fork are its own
    row.meta["val"] = row.meta["val"].new_empty((row.meta["val"].shape[0], rest.shape[1]))
    _read_from(row, keep)
    return rest.nbytes


def _read_from(row: fx.Node, nodes: Sequence[fx.Node]) -> None:
    """Make the nodes of features take the columns of `row`, one feature after the other."""
    start = 0
    for node in nodes:
        columns = (slice(None), slice(start, start + node.meta["val"].shape[1]))
        node.args, start = (row, columns), columns[1].stop
        node.meta["val"] = row.meta["val"][columns]
