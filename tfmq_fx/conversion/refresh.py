"""Convert a model again with other weights or timesteps, without capturing or calibrating it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.core.arguments import check_module
from tfmq_fx.core.errors import CalibrationError, ConfigError
from tfmq_fx.core.inference import outside_inference_mode
from tfmq_fx.core.timesteps import as_received, timestep_values
from tfmq_fx.ir.graph import own_modules
from tfmq_fx.ir.verifier import is_timestep_row
from tfmq_fx.passes.change_timesteps import change_timesteps, feature_names
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.quant.timestep_table import TABLE
from tfmq_fx.serialization.provenance import Provenance
from tfmq_fx.serialization.source_tensors import shown
from tfmq_fx.serialization.staleness import StalenessCheck

from .convert import convert
from .feature_rows import FeatureRows
from .models import Compiled, Converted
from .prepare_model import captured_only, rebuild
from .records import pass_record
from .step import Steps
from .steps import STEPS


@outside_inference_mode
def refresh(
    model: Converted,
    source: nn.Module | None = None,
    *,
    timesteps: Any = None,
    steps: Steps | None = None,
    progress: bool = True,
) -> Converted:
    """A new model with the weights of `source`, or for other timesteps; `model` stays as it is.

    The conversion runs again on the first calibration: nothing is captured or calibrated.  With
    unchanged weights the result has the same bits.
    source: the model that this one was made from, with other weights: trained on, loaded, or with a
    LoRA fused into it.  Parameters are found by name.  Left out, weights stay.
    timesteps: the new set, as for `prepare`: an int, a 1-d tensor or sequence, or a scheduler; left
    out, the set stays.  Tables are computed from `source`.  Scales and corrections were measured by
    calibration: they are interpolated between its timesteps, always from those, and `report` has
    their number.  Without a source, all timesteps must have rows already, or nothing be tabled.
    steps: those of `convert`; needed where some were your own.
    A loaded model whose source has the same weights is not made anew, only attached to it: then a
    call that its graph does not take has the source captured again.

    Raises ConfigError where `source` is another model or a step of the conversion is not among
    `steps`, CalibrationError where a loaded model was saved without the calibration that its
    weights need, StaleError where weights are to stay that have changed in the source.
    """
    origin = _origin(model, "refresh()")
    values = timestep_values(timesteps)
    if source is None and values is None:
        raise ConfigError(
            "refresh() needs the source whose weights are new, timesteps that are, or both"
        )
    if origin.timesteps is None and values is not None and model.unbound() is model:
        raise ConfigError("this model has no tables: it takes any timesteps as it is")
    if values is not None:
        values = as_received(values, model.call.inputs[model.call.timestep_position].dtype)
    new = model.unbound()
    if values is None and not _has_calibrated_timesteps(new, origin):
        values = new.timesteps
    if source is None:
        if model.watch is not None:
            model.watch.check_contents()
    else:
        # the weights of `source` may be in place already, in memory shared with no other model
        same = (new.watch is None or new.watch.watches(source)) and not origin.changed(source)
        if same and new.watch is None and origin.calibrated and origin.calibration is None:
            new = _watching(new, origin, source)
        elif timesteps is None or not same:
            new = _reconverted(new, origin, source, steps, progress)
    if values is not None and origin.timesteps is not None:
        new = _retimed(new, values, source)
    return model.bound_alike(new, timesteps)


@outside_inference_mode
def check_source(model: Converted | Compiled, source: nn.Module) -> list[str]:
    """Names of the tensors of `source` that differ from those that `model` was made from or are
    missing, and of attributes of its modules ("to_q.scaling") with another value.

    All elements are compared; in another dtype than before, some.  Layers that an adapter wraps and
    is not fused into count as changed.  Raises ConfigError for a model without provenance.
    """
    check_module(source, "source")
    return _origin(model, "check_source()").changed(source)


def _origin(model: Any, caller: str) -> Provenance:
    if isinstance(model, Compiled):
        raise ConfigError(
            f"{caller} takes the converted model that was compiled; compile what comes out"
        )
    if not isinstance(model, Converted):
        raise ConfigError(
            f"{caller} takes what convert(), fold_timesteps() or load() returned, not a "
            f"{type(model).__name__}"
        )
    if model.origin is None:
        raise ConfigError(
            "this model does not remember what it was made from: it was saved by a version of "
            "tfmq_fx that did not keep it. Prepare and convert the source anew."
        )
    return model.origin


def _has_calibrated_timesteps(model: Converted, origin: Provenance) -> bool:
    keys = model.timesteps
    return keys is None or origin.timesteps is None or torch.equal(keys.cpu(), origin.timesteps)


def same_steps(origin: Provenance, steps: Steps | None) -> Steps:
    """Return the steps that made the model, looked up by name.

    Raises ConfigError where one is missing.
    """
    known = STEPS if steps is None else steps
    if not isinstance(known, Steps):
        raise ConfigError(f"steps must be a tfmq_fx.Steps, not a {type(known).__name__}")
    names = origin.steps or STEPS.names
    if missing := [name for name in names if name not in known.names]:
        raise ConfigError(
            f"refresh() cannot find the step {missing[0]!r} that this model was converted with; "
            "pass the steps that convert() was given: refresh(model, source, steps=...)"
        )
    if steps is not None and names != steps.names:
        raise ConfigError(
            f"this model was converted with the steps {', '.join(names)}; refresh() was given "
            f"{', '.join(steps.names)}. Pass the same steps, or convert the source anew"
        )
    return Steps(*(known[known.position(name)] for name in names))


def _watching(model: Converted, origin: Provenance, source: nn.Module) -> Converted:
    """A loaded model with the source that it was made from, whose weights are the same: it can be
    captured again for other calls, and notices when they change."""
    watch = StalenessCheck(source, origin.fingerprints, origin.behaviour)
    return Converted(model.gm, model.call, **model.settings() | {"watch": watch})


def _reconverted(
    model: Converted, origin: Provenance, source: nn.Module, steps: Steps | None, progress: bool
) -> Converted:
    """The conversion of `source` by the recipe of `model`, for its original timesteps."""
    if origin.calibrated and origin.calibration is None:
        layers = [n for n, m in model.gm.named_modules() if isinstance(m, QuantLayer)]
        raise CalibrationError(
            f"recipe {model.recipe.name!r} reads calibration, which this model was saved without: "
            f"quantized weights cannot be made anew ({shown(layers)}). Save with save(model, path, "
            "calibration=True) before loading, or prepare, calibrate and convert the source."
        )
    if model.watch is not None and (names := model.watch.outside.changed()):
        raise ConfigError(
            f"{shown(names)}: a tensor that the model's code reads from outside its modules has "
            "changed since. Prepare and convert the source anew"
        )
    prepared = rebuild(origin, model.recipe, source, model.record["capture"])
    if origin.timesteps is None:
        new = captured_only(prepared)
    else:
        new = convert(
            prepared, bits=model.bit_plan, steps=same_steps(origin, steps), progress=progress
        )
    if (new.device, new.dtype) != (model.device, model.dtype):
        new.to(device=model.device, dtype=model.dtype)
    return new


def _retimed(model: Converted, values: Tensor, source: nn.Module | None) -> Converted:
    """`model` for other timesteps; other tensors than tables and scales are shared."""
    origin, watch, rows = model.origin, model.watch, None
    assert origin is not None and origin.timesteps is not None
    if source is not None:
        rows = FeatureRows(origin, model.recipe, source).at(values, feature_names(model.gm))
        watch = watch or StalenessCheck(source, origin.fingerprints, origin.behaviour)
    lookups = [str(n.args[0].target) for n in model.gm.graph.nodes if is_timestep_row(n)]
    measured = [name for name in lookups if not name.startswith(TABLE)]  # tables are computed
    scales = origin.scales or {name: getattr(model.gm, name).cpu() for name in measured}
    calibrated = (origin.timesteps, scales)
    rewrite = change_timesteps(model.gm, timesteps=values, rows=rows, calibrated=calibrated)
    own_modules(rewrite.gm)
    record = copy.deepcopy(model.record)
    record["passes"].append(pass_record(rewrite))
    record["interpolated"] = rewrite.details["interpolated"]
    new = Converted(rewrite.gm, model.call, **model.settings() | {"record": record, "watch": watch})
    if _has_calibrated_timesteps(new, origin):
        scales = {}
    new.origin = dataclasses.replace(origin, scales=scales)
    return new
