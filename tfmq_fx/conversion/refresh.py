"""A converted model made anew: of other weights, or for other timesteps, without calibration."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.conversion.convert import convert
from tfmq_fx.conversion.models import Compiled, Converted
from tfmq_fx.conversion.prepare_model import captured_only, rebuild
from tfmq_fx.conversion.records import pass_record
from tfmq_fx.conversion.step import Steps
from tfmq_fx.conversion.steps import STEPS
from tfmq_fx.core.arguments import check_module
from tfmq_fx.core.errors import CalibrationError, ConfigError
from tfmq_fx.core.inference import outside_inference_mode
from tfmq_fx.core.timesteps import timestep_values
from tfmq_fx.ir.graph import own_modules, timestep_node
from tfmq_fx.ir.subgraphs import compute_rows
from tfmq_fx.ir.temporal_block import temporal_block
from tfmq_fx.ir.verifier import is_timestep_row
from tfmq_fx.passes.change_timesteps import change_timesteps
from tfmq_fx.passes.fold_weights import fold_weights
from tfmq_fx.passes.merge_duplicates import merge_duplicates
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.quant.timestep_lookup import check_timesteps
from tfmq_fx.quant.timestep_table import FEATURE, TABLE
from tfmq_fx.serialization.provenance import Provenance
from tfmq_fx.serialization.source_tensors import shown
from tfmq_fx.serialization.staleness import StalenessCheck


@outside_inference_mode
def refresh(
    model: Converted,
    source: nn.Module | None = None,
    *,
    timesteps: Any = None,
    steps: Steps | None = None,
    progress: bool = True,
) -> Converted:
    """`model` made anew of the weights of `source`, or for other timesteps; `model` stays as it is.

    The conversion runs again on what calibration saw the first time: nothing is captured or
    calibrated.  With the weights that it had, the same bits come out.
    source: the model that this one was made from, with other weights: trained on, loaded, or with a
    LoRA fused into it.  Parameters are found by name.  Left out, weights stay.
    timesteps: the new set, as for `prepare`: an int, a 1-d tensor or sequence, or a scheduler; left
    out, the set stays.  Tables are computed from `source`.  Scales and corrections were measured by
    calibration: they are interpolated between its timesteps, always from those, and `report` tells
    how many.  Without a source, all timesteps must have rows already, or nothing be tabled.
    steps: the steps that `convert` was given; needed where some were your own.

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
    if values is not None and hasattr(timesteps, "timesteps"):
        values = values.unique()  # some schedulers visit a timestep twice
    made = model.unbound()
    if values is None and not _is_calibrated(made, origin):
        values = made.timesteps
    if source is None:
        if model.watch is not None:
            model.watch.check_contents()
    elif timesteps is None or not _is_made_from(made, origin, source):
        made = _reconverted(made, origin, source, steps, progress)
    if values is not None and origin.timesteps is not None:
        made = _retimed(made, values, source)
    return model.bound_alike(made, timesteps)


@outside_inference_mode
def check_source(model: Converted | Compiled, source: nn.Module) -> list[str]:
    """Names of the tensors of `source` that are not what `model` was made from, or that it lacks,
    and of attributes of its modules ("to_q.scaling") that are set otherwise.

    All elements count; in another dtype than before, some.  Layers that an adapter wraps and is not
    fused into count as changed.  Raises ConfigError where the model does not remember its origin.
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


def _is_calibrated(made: Converted, origin: Provenance) -> bool:
    """Whether the model is over the timesteps of its conversion."""
    keys = made.timesteps
    if keys is None or origin.timesteps is None:
        return True
    return torch.equal(keys.cpu(), origin.timesteps)


def _is_made_from(made: Converted, origin: Provenance, source: nn.Module) -> bool:
    """Whether the model holds the weights of `source`, and shares memory with no other."""
    watched = made.watch is None or made.watch.watches(source)
    return watched and not origin.changed(source)


def _same_steps(origin: Provenance, steps: Steps | None) -> Steps:
    """The steps that made the model, looked up by name. Raises ConfigError where one is missing."""
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


def _reconverted(
    made: Converted, origin: Provenance, source: nn.Module, steps: Steps | None, progress: bool
) -> Converted:
    """The conversion of `source` that gave `made`, over the timesteps that it was made for."""
    if origin.calibrated and origin.calibration is None:
        layers = [n for n, m in made.gm.named_modules() if isinstance(m, QuantLayer)]
        raise CalibrationError(
            f"recipe {made.recipe.name!r} reads calibration, which this model was saved without: "
            f"quantized weights cannot be made anew ({shown(layers)}). Save with save(model, path, "
            "calibration=True) before loading, or prepare, calibrate and convert the source."
        )
    if made.watch is not None and (names := made.watch.outside.changed()):
        raise ConfigError(
            f"{shown(names)}: a tensor that the model's code reads from outside its modules has "
            "changed since. Prepare and convert the source anew"
        )
    prepared = rebuild(origin, made.recipe, source, made.record["capture"])
    if origin.timesteps is None:
        new = captured_only(prepared)
    else:
        new = convert(
            prepared, bits=made.bit_plan, steps=_same_steps(origin, steps), progress=progress
        )
    if (new.device, new.dtype) != (made.device, made.dtype):
        new.to(device=made.device, dtype=made.dtype)
    return new


def _retimed(made: Converted, values: Tensor, source: nn.Module | None) -> Converted:
    """`made` for other timesteps, on the same memory."""
    origin, watch, rows = made.origin, made.watch, None
    assert origin is not None and origin.timesteps is not None
    if source is not None:
        captured = origin.captured(source)
        rows = _rows(captured, values, {n.meta.get(FEATURE) for n in made.gm.graph.nodes})
        watch = watch or StalenessCheck(source, origin.fingerprints, origin.behaviour)
    scales = origin.scales or _scales(made.gm)
    calibrated = (origin.timesteps, scales)
    done = change_timesteps(made.gm, timesteps=values, rows=rows, calibrated=calibrated)
    own_modules(done.gm)
    record = copy.deepcopy(made.record)
    record["passes"].append(pass_record(done))
    record["interpolated"] = done.details["interpolated"]
    new = Converted(
        done.gm,
        made.call,
        recipe=made.recipe,
        record=record,
        model_config=made.model_config,
        origin=origin,
        watch=watch,
    )
    new.origin = dataclasses.replace(origin, scales={} if _is_calibrated(new, origin) else scales)
    return new


def _rows(captured: fx.GraphModule, values: Tensor, features: Container[str]) -> dict[str, Tensor]:
    """Each of `features` at each timestep, sorted, as folding computes them."""
    gm = fold_weights(merge_duplicates(captured).gm).gm
    block = temporal_block(gm)
    keys = check_timesteps(values, timestep_node(gm).meta["val"].dtype)
    rows = compute_rows(block.graph, keys)
    named = zip(block.features, rows, strict=True)
    return {feature.name: row for feature, row in named if feature.name in features}


def _scales(gm: fx.GraphModule) -> dict[str, Tensor]:
    """The rows that were measured and not computed, by buffer, on the CPU."""
    read = [str(node.args[0].target) for node in gm.graph.nodes if is_timestep_row(node)]
    return {name: getattr(gm, name).cpu() for name in read if not name.startswith(TABLE)}
