"""From a captured graph to a model that `convert` takes, the first time and, recalled, later on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from .behaviour import Behaviour
from .config import Config, LayerConfig
from .errors import CalibrationError
from .graph import timestep_node
from .modules import Prepared
from .observers import RangeObserver, SampleCache
from .origin import Calibration, Origin, Rows, describe
from .outside import OUTSIDE, Outside
from .passes.fold_weights import fold_weights
from .passes.merge_duplicates import merge_duplicates
from .passes.observe_layers import observe_layers
from .signature import CallSpec
from .sites import check_weights, find_sites, plan_sites
from .watch import SourceWatch


def observed(
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
    """A captured graph without its repetitions, with observers, that has seen nothing yet.

    timesteps: the finite set (K,) if it is known, sorted keys.  facts: what to report of capturing.
    behaves: how the source did when it was captured.
    Raises ConfigError for weights that hold NaN and overrides that match nothing.
    """
    merged = merge_duplicates(captured)
    folded = fold_weights(merged.gm)
    gm = folded.gm
    sites, _ = find_sites(gm)
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
    spec = recipe.reconstruction
    return Prepared(
        gm,
        observe_layers(gm).gm,
        call,
        recipe=recipe,
        overrides=overrides,
        cache=SampleCache(capacity=spec.cache, seed=spec.seed),
        source=source,
        model_config=getattr(source, "config", None),
        unmerged=captured,
        behaviour=behaves,
    )


def remember(
    prepared: Prepared,
    timesteps: Tensor | None,
    *,
    calibrated: bool,
    sampled: bool,
    steps: tuple[str, ...] = (),
) -> tuple[Origin, SourceWatch]:
    """What a conversion of `prepared` over `timesteps` (K,) was made from, and a watch over that.
    timesteps: None where there is no table.

    calibrated: whether it read calibration at all.  sampled: whether it read the samples, too.
    steps: the names of its steps, in order.
    """
    spec, cache = prepared.recipe.reconstruction, prepared.cache
    calibration = None
    if calibrated:
        observers = prepared.observed.modules()
        center = spec.center if spec.sampling == "normal" else None
        rows = cache.needed(spec.samples, seed=spec.seed, center=center) if sampled else {}
        calibration = Calibration(
            seen={o.site: dict(o.seen) for o in observers if isinstance(o, RangeObserver)},
            rows=_moved(rows, "cpu"),
            sampling=prepared.sampling if spec.rounds else None,
        )
    described, held = describe(prepared.unmerged, prepared.source)
    origin = Origin(
        call=prepared.call,
        overrides=prepared.overrides,
        timesteps=None if timesteps is None else timesteps.cpu(),
        visits=dict(cache.visits),
        merged=prepared.gm.meta.get("capture", {}).get("merged", {}),
        calibrated=calibrated,
        calibration=calibration,
        behaviour=prepared.behaviour,
        steps=steps,
        **described,
    )
    outside = Outside(prepared.unmerged.meta.get(OUTSIDE, {}))
    watch = SourceWatch(prepared.source, origin.fingerprints, held, origin.behaviour, outside)
    return origin, watch


def recall(origin: Origin, recipe: Config, source: nn.Module, facts: Mapping[str, Any]) -> Prepared:
    """The calibrated model that `remember` was given, on the weights of `source`.

    facts: what was reported of capturing.  Raises ConfigError where `source` is another model,
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
    prepared = observed(
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
        for observer in prepared.observed.modules():
            if isinstance(observer, RangeObserver):
                # a layer that was one with another when ranges were observed read the same value
                names = (observer.site, origin.merged.get(observer.site, ""))
                seen = [calibration.seen[name] for name in names if name in calibration.seen]
                observer.seen = dict(seen[0]) if seen else {}
    prepared.cache = SampleCache.holding(rows, origin.visits)
    return prepared


def _moved(rows: Rows, device: Any) -> Rows:
    return {
        step: [tuple(value.to(device) for value in row) for row in samples]
        for step, samples in rows.items()
    }
