"""Add rows to a model's tables for the timesteps that it was not made for, as calls bring them.

Ranges and corrections were measured, so they are interpolated between those of calibration;
features are computed from the source, as folding computes them.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.core.errors import ConfigError, InputError
from tfmq_fx.core.inference import outside_inference_mode
from tfmq_fx.ir.graph import timestep_node
from tfmq_fx.ir.verifier import is_timestep_row
from tfmq_fx.passes.change_timesteps import Tables, feature_names, tables_at, tables_of
from tfmq_fx.quant.timestep_lookup import check_timesteps
from tfmq_fx.quant.timestep_table import TABLE, QuantTimestepTable

from .feature_rows import FeatureRows
from .graph_model import GraphModel

_MOST = 1024  # timesteps added; where calls bring more, those that came first go again
_log = logging.getLogger(__name__)


class UnvisitedTimesteps:
    """The tables of a converted model with the rows that calls have added, beside its own.

    The model's graph and buffers stay as they are: the same tables give the same file, and known
    timesteps the same bits.  Keeps neither the model nor its source alive.  Safe to use from
    several threads.

    met: the timesteps added so far.  interpolated: those of them that have interpolated ranges.
    """

    def __init__(self, model: GraphModel) -> None:
        self._model = weakref.ref(model)
        self._lock = threading.RLock()
        self.forget()

    def forget(self) -> None:
        """Drop what was added, where the model's own tables have changed, or moved."""
        with self._lock:
            self.met = list[float]()
            self.interpolated = 0
            self._tables: Tables | None = None
            self._features: FeatureRows | None = None
            self._seen: Any = None  # the state of the source that the features are computed from

    def on(self, graph: fx.GraphModule) -> fx.GraphModule:
        """`graph`, which is the model's or was cut from it, reading the rows added as well.

        What comes back shares everything else with `graph`, and is for one call.
        """
        tables = self._tables
        if tables is None:
            return graph
        copied: fx.GraphModule = object.__new__(type(graph))
        copied.__dict__ = graph.__dict__ | {
            "_buffers": dict(graph._buffers),
            "_modules": dict(graph._modules),
            "meta": dict(graph.meta),
        }
        tables.place(copied)
        return copied

    def interpolated_on(self, graph: fx.GraphModule) -> int:
        """How many of the timesteps added have interpolated ranges in `graph`, cut from the model's
        or the model's."""
        reads = [node.all_input_nodes[0] for node in graph.graph.nodes if is_timestep_row(node)]
        ranges = any(not str(read.target).startswith(TABLE) for read in reads)
        return self.interpolated if ranges else 0

    def serves(self) -> bool:
        """Whether the model is still there, to whose tables rows can be added."""
        return self._model() is not None

    @outside_inference_mode
    @torch.no_grad()
    def add(self, timesteps: Sequence[float]) -> None:
        """Add rows for `timesteps`, as the model receives them; those known already stay.

        Raises InputError, naming one, where its rows cannot be made.
        """
        model = self._model()
        assert model is not None
        with self._lock:
            tables = tables_of(model.gm) if self._tables is None else self._tables
            known = set(tables.keys.tolist())
            new = sorted({step for step in timesteps if step not in known})
            if not new:
                return
            if not all(map(math.isfinite, new)):
                bad = next(step for step in new if not math.isfinite(step))
                raise InputError(f"{model.why_unknown(bad)}, and cannot be: it is not finite.")
            added = self._rows(model, new)
            if self.interpolated == 0 and added.interpolated:
                _log.warning(
                    "timestep %s is not among the %d of calibration: its ranges, and those of "
                    "others to come, are interpolated between them (report() has the number)",
                    new[0],
                    len(model.gm.meta["timesteps"]),
                )
            dropped = self.met[: max(0, len(self.met) + len(new) - max(_MOST, len(new)))]
            self._tables = _joined(_without(tables, dropped), added)
            self.met = [*self.met[len(dropped) :], *new]
            self.interpolated += added.interpolated

    def _rows(self, model: GraphModel, new: list[float]) -> Tables:
        """The model's tables at the timesteps `new` alone."""
        gm, origin = model.gm, model.origin
        keys = check_timesteps(new, timestep_node(gm).meta["val"].dtype)
        keys = keys.to(gm.meta["timesteps"].device)
        calibrated = None
        if origin is not None and origin.timesteps is not None and origin.scales:
            calibrated = (origin.timesteps, origin.scales)
        names = feature_names(gm)
        source = self._source_of(model, new[0]) if names else None
        try:
            rows = None if source is None else self._computed_by(model, source).at(keys, names)
            return tables_at(gm, keys, rows=rows, calibrated=calibrated)
        except (ConfigError, IndexError) as error:  # of another dtype by now, or an embedding's end
            raise InputError(
                f"{model.why_unknown(new[0])}, and its rows cannot be computed: {error}"
            ) from error

    def _source_of(self, model: GraphModel, step: float) -> nn.Module:
        """The model that `model` was made from.  Raises InputError where it is gone."""
        source = None if model.watch is None or model.origin is None else model.watch.source
        if source is None:
            raise InputError(
                f"{model.why_unknown(step)}, and the model that its temporal features are computed "
                "from is not known here. Make rows for it with tfmq_fx.refresh(model, source, "
                "timesteps=...), or set the scheduler as in calibration."
            )
        return source

    def _computed_by(self, model: GraphModel, source: nn.Module) -> FeatureRows:
        """What computes the features, with the weights that the source has now."""
        watch, origin = model.watch, model.origin
        assert watch is not None and origin is not None
        if self._features is None or self._seen is not watch.seen:
            watch.check_contents()
            self._features, self._seen = FeatureRows(origin, model.recipe, source), watch.seen
            weakref.finalize(source, _forget_features, weakref.ref(self)).atexit = False
        return self._features


def _forget_features(reference: weakref.ref[UnvisitedTimesteps]) -> None:
    """Drop the weights of a source that is gone."""
    if (held := reference()) is not None:
        held._features = None


def _joined(first: Tables, second: Tables) -> Tables:
    """The tables over the timesteps of both."""
    keys, order = torch.cat([first.keys, second.keys.to(first.keys)]).sort()
    caches = dict[str, QuantTimestepTable]()
    for path, table in first.caches.items():
        caches[path] = _cache_rows(table, second.caches[path], keys, order)
    rows = {n: torch.cat([r, second.rows[n].to(r)])[order] for n, r in first.rows.items()}
    return Tables(keys, first.key_names, rows, caches, 0)


def _without(tables: Tables, dropped: Sequence[float]) -> Tables:
    """The tables without the rows of some timesteps."""
    if not dropped:
        return tables
    gone = set(dropped)
    kept = [i for i, step in enumerate(tables.keys.tolist()) if step not in gone]
    order = torch.tensor(kept, device=tables.keys.device)
    keys = tables.keys[order]
    caches = {path: _cache_rows(t, None, keys, order) for path, t in tables.caches.items()}
    rows = {name: values[order] for name, values in tables.rows.items()}
    return Tables(keys, tables.key_names, rows, caches, 0)


def _cache_rows(
    table: QuantTimestepTable, other: QuantTimestepTable | None, keys: Tensor, order: Tensor
) -> QuantTimestepTable:
    """An integer table over `keys` with the rows of one or two tables, in `order`."""
    made = QuantTimestepTable.from_spec({**table.spec(), "rows": len(keys)}).to(keys.device)
    made.keys = keys.clone()
    for name in ("codes", "scale", "zero"):
        parts = [getattr(each, name) for each in (table, other) if each is not None]
        setattr(made, name, torch.cat([part.to(parts[0]) for part in parts])[order])
    return made
