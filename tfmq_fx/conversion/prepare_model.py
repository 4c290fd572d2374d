"""Build a `Prepared` model from a captured graph, either freshly or from saved provenance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from tfmq_fx.calibration.observers import SampleCache
from tfmq_fx.capture.call_spec import CallSpec
from tfmq_fx.capture.capture import Captured
from tfmq_fx.capture.outside_tensors import OUTSIDE
from tfmq_fx.core.config import Config
from tfmq_fx.core.errors import CalibrationError
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.ir.graph import timestep_node
from tfmq_fx.ir.opaque_layers import inner_sites
from tfmq_fx.ir.sites import check_weights, find_sites, left_by_module, plan_sites
from tfmq_fx.passes.merge_duplicates import merge_duplicates
from tfmq_fx.passes.observe_layers import observe_layers
from tfmq_fx.serialization.module_settings import Behaviour
from tfmq_fx.serialization.provenance import Calibration, Provenance, Rows, describe
from tfmq_fx.serialization.staleness import OutsideTensors, StalenessCheck

from .coverage import opaque_declined, parameter_record
from .exposed_layers import with_layers
from .models import Converted, Prepared
from .records import ConversionRecord, site_records


def capture_facts(captured: Captured) -> dict[str, Any]:
    """Return what a report says of a capture."""
    return {
        "route": captured.route,
        "seconds": captured.seconds,
        "guards": [f"{g.text} is {g.holds} ({g.source})" for g in captured.call.guards],
        "notes": list(captured.notes),
    }


def captured_only(prepared: Prepared) -> Converted:
    """The captured model as a converted one in which nothing is changed, for any timesteps."""
    gm = prepared.gm
    gm.meta.pop("timesteps", None)
    origin, watch = record_provenance(prepared, None)
    sites, declined = find_sites(gm)
    capture = gm.meta.pop("capture", {})
    record = ConversionRecord(
        capture=capture,
        sites=site_records(gm, {}),
        declined=[[d.site, d.reason] for d in (*declined, *opaque_declined(gm))],
        left_weights=sum(left_by_module(gm, sites).values()),
        parameters=parameter_record(gm, origin, prepared.source, capture.get("folded", {})),
        float_bytes=prepared.nbytes(),
    )
    return Converted(
        gm,
        prepared.call,
        recipe=prepared.recipe,
        record=vars(record),
        model_config=prepared.model_config,
        outline=prepared.outline,
        origin=origin,
        watch=watch,
    )


def observe_graph(
    captured: fx.GraphModule,
    call: CallSpec,
    *,
    recipe: Config,
    overrides: Mapping[str, LayerConfig],
    source: nn.Module,
    timesteps: Tensor | None,
    facts: Mapping[str, Any],
    behaves: Behaviour,
) -> Prepared:
    """The model for calibration: a captured graph with observers and without its repetitions.

    timesteps: the finite set (K,) if it is known, sorted.  facts: for the report, from capturing.
    behaves: the settings of the source's modules when it was captured.
    Raises ConfigError for weights that hold NaN and overrides that match nothing.
    """
    merged = merge_duplicates(captured)
    folded = with_layers(merged.gm, recipe, overrides)
    gm = folded.gm
    sites, _ = find_sites(gm)
    sites += inner_sites(gm)[0]
    check_weights(sites)
    plan_sites(sites, recipe, overrides=overrides)  # refuse a pattern that matches nothing now
    if timesteps is not None:
        gm.meta["timesteps"] = timesteps.to(timestep_node(gm).meta["val"].device)
    gm.meta["capture"] = {
        **facts,
        "nodes": len(gm.graph.nodes),
        "merged": merged.details["merged"],
        "folded": folded.details["folded"],
    }
    return Prepared(
        gm,
        observe_layers(gm).gm,
        call,
        recipe=recipe,
        overrides=overrides,
        source=source,
        unmerged=captured,
        behaviour=behaves,
    )


def record_provenance(
    prepared: Prepared,
    timesteps: Tensor | None,
    *,
    calibrated: bool = False,
    sampled: bool = False,
    steps: tuple[str, ...] = (),
) -> tuple[Provenance, StalenessCheck]:
    """The provenance of a conversion of `prepared`, and the check that its source is unchanged.

    timesteps: the finite set (K,); None where there is no table.  calibrated: whether the
    conversion read calibration at all.  sampled: whether it read the samples.  steps: the names of
    its steps, in order.
    """
    spec, cache = prepared.recipe.reconstruction, prepared.cache
    calibration = None
    if calibrated:
        center = spec.center if spec.sampling == "normal" else None
        rows = cache.needed(spec.samples, seed=spec.seed, center=center) if sampled else {}
        calibration = Calibration(
            seen={observer.site: dict(observer.seen) for observer in prepared.observers()},
            rows=_moved(rows, "cpu"),
            sampling=prepared.sampling if spec.rounds else None,
        )
    origin = Provenance(
        call=prepared.call,
        overrides=prepared.overrides,
        timesteps=None if timesteps is None else timesteps.cpu(),
        visits=dict(cache.visits),
        merged=prepared.gm.meta.get("capture", {}).get("merged", {}),
        calibrated=calibrated,
        calibration=calibration,
        behaviour=prepared.behaviour,
        steps=steps,
        **describe(prepared.unmerged, prepared.source),
    )
    outside = OutsideTensors(prepared.unmerged.meta.get(OUTSIDE, {}))
    watch = StalenessCheck(prepared.source, origin.fingerprints, origin.behaviour, outside)
    return origin, watch


def rebuild(
    origin: Provenance, recipe: Config, source: nn.Module, facts: Mapping[str, Any]
) -> Prepared:
    """The calibrated model that `origin` describes, with the weights of `source`.

    facts: for the report, from capturing.  Raises ConfigError where `source` is another model,
    CalibrationError where the recipe calibrates again and cannot.
    """
    captured = origin.captured(source)
    calibration = origin.calibration
    if recipe.reconstruction.rounds and (calibration is None or calibration.sampling is None):
        raise CalibrationError(
            f"recipe {recipe.name!r} samples again with the quantized model, by the pipeline or "
            "scheduler that it was calibrated with, which no save holds: prepare, calibrate and "
            "convert the source."
        )
    prepared = observe_graph(
        captured,
        origin.call,
        recipe=recipe,
        overrides=origin.overrides,
        source=source,
        timesteps=origin.timesteps,
        facts=facts,
        behaves=origin.behaviour,
    )
    rows: Rows = {}
    if calibration is not None:
        rows, prepared.sampling = _moved(calibration.rows, prepared.device), calibration.sampling
        for observer in prepared.observers():
            # layers merged when ranges were observed read the same value
            names = (observer.site, origin.merged.get(observer.site, ""))
            seen = [calibration.seen[name] for name in names if name in calibration.seen]
            observer.seen = dict(seen[0]) if seen else {}
    prepared.cache = SampleCache.holding(rows, origin.visits)
    return prepared


def _moved(rows: Rows, device: torch.device | str) -> Rows:
    moved: Rows = pytree.tree_map_only(Tensor, lambda value: value.to(device), rows)
    return moved
