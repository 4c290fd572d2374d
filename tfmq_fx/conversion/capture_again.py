"""Capture the source of a model again, for a call that its graph does not take.

A prepared model that has recorded nothing yet takes the new graph in the place of its own: what a
pipeline passes decides, and derived example inputs were only a start. A converted model gets a
further form with the same weights, tables and quantization parameters.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_fx.backends.auto import example_inputs
from tfmq_fx.calibration.observers import SampleCache
from tfmq_fx.capture.call_inference import USUAL, describe_call
from tfmq_fx.capture.call_spec import CallSpec
from tfmq_fx.capture.capture import Captured, capture
from tfmq_fx.capture.replay import arguments, structural_clone
from tfmq_fx.core.distributed import world
from tfmq_fx.core.errors import CaptureError, ConfigError, InputError
from tfmq_fx.core.inference import outside_inference_mode
from tfmq_fx.passes.observe_layers import observer_name
from tfmq_fx.quant.timestep_lookup import check_timesteps
from tfmq_fx.serialization.module_settings import behaviour
from tfmq_fx.serialization.provenance import Provenance
from tfmq_fx.serialization.saved_names import is_own

from .convert import convert
from .models import Converted, Prepared
from .other_forms import captured_again, captured_in
from .other_sizes import with_other_sizes
from .prepare_model import capture_facts, captured_only, observe_graph, rebuild
from .refresh import same_steps

Values = Sequence[Any]
Named = Mapping[str, Any]


@captured_again.register
def _prepared(model: Prepared, args: Values, kwargs: Named) -> Prepared:
    """Return `model` itself with another graph, or, where it has recorded something, another form
    that records into the same observers."""
    if world() > 1:
        raise ConfigError(
            "processes that calibrate together need one graph: prepare the model with the inputs "
            "of the pipeline, prepare(model, tfmq_fx.record_inputs(pipe, ...))"
        )
    new = _prepared_for(model.source, model, args, kwargs)
    if not model.cache.visits and new.takes(args, kwargs):
        model.take_graph(new)
        return model
    known = {observer.site: observer for observer in model.observers()}
    for observer in new.observers():
        if observer.site in known:
            new.observed.set_submodule(observer_name(observer.site), known[observer.site])
    new.cache = _VisitsAlone(model.cache)
    return new


class _VisitsAlone(SampleCache):
    """A cache that counts visits into `other` and keeps no samples: they fit another graph."""

    def __init__(self, other: SampleCache) -> None:
        super().__init__(capacity=0, seed=0)
        self.visits = other.visits

    def add(self, inputs: Sequence[Tensor], batched: Sequence[bool], timestep: int) -> None:
        for step in inputs[timestep].tolist():
            self.visits[step] = self.visits.get(step, 0) + 1


@captured_again.register
@outside_inference_mode
def _converted(model: Converted, args: Values, kwargs: Named) -> Converted:
    """Return a converted model for the call, bound to requests where `model` is."""
    origin, source = _living(model)
    whole, device = model.unbound(), model.device
    if is_exact(whole):
        return model.bound_alike(_exact(whole, _like(source, model), args, kwargs))
    # Rounded weights fit the source as it is: the form is captured as that, and then moved.
    dtype = _dtype(origin.call)
    where = next((p.device for p in source.parameters()), device)
    args, kwargs = pytree.tree_map_only(Tensor, _moved(whole, dtype, where), (args, kwargs))
    prepared = _prepared_for(source, whole, args, kwargs)
    before = rebuild(origin, whole.recipe, source, whole.record["capture"])
    new = with_other_sizes(whole, before.gm, prepared)
    if (new.dtype, new.device) != (whole.dtype, device):
        new = copy.deepcopy(new).to(device=device, dtype=whole.dtype)
    return model.bound_alike(new)


@captured_in.register
@outside_inference_mode
def _converted_in(model: Converted, dtype: torch.dtype) -> Converted:
    """Return an exact form of `model` captured from a copy of its source in `dtype`."""
    _, source = _living(model)
    whole = model.unbound()
    if not is_exact(whole):
        raise InputError("its layers are quantized: convert the model as it is in that dtype")
    values = example_inputs(whole.gm, whole.timesteps)
    cast = copy.deepcopy(source).to(device=model.device, dtype=dtype)
    kwargs = arguments(model.call, values, len(values[model.call.timestep_position]))
    moved = _moved(whole, dtype, model.device)
    timestep = model.call.timestep_path
    kwargs = {
        name: value if name == timestep else pytree.tree_map_only(Tensor, moved, value)
        for name, value in kwargs.items()
    }
    return _exact(whole, cast, (), kwargs)


def is_exact(model: Converted) -> bool:
    """Whether nothing of a model is rounded: it was captured, or folded into exact tables."""
    return not any(is_own(type(module)) for module in model.gm.modules())


def _exact(model: Converted, source: nn.Module, args: Values, kwargs: Named) -> Converted:
    """Return what `model` is, made anew from `source` for a call."""
    assert model.origin is not None
    prepared = _prepared_for(source, model, args, kwargs)
    if model.origin.timesteps is None:
        new = captured_only(prepared)
    else:
        new = convert(prepared, steps=same_steps(model.origin, None), progress=False)
    new.watch = model.watch
    if source is not _living(model)[1]:  # a copy in another dtype: the source itself is not
        new.origin = model.origin
    return new


def _living(model: Converted) -> tuple[Provenance, nn.Module]:
    """The provenance and the unchanged source of a model; raises InputError where it is gone."""
    origin, source = model.origin, None if model.watch is None else model.watch.source
    if origin is None or source is None or model.watch is None:
        raise InputError(
            "the model that this one was made from is not in memory. Attach it: model = "
            "tfmq_fx.refresh(model, source)"
        )
    model.watch.check()
    return origin, source


def _dtype(call: CallSpec) -> torch.dtype:
    """The floating dtype of a call's inputs beside the timestep."""
    kinds = (spec.dtype for spec in call.inputs if spec.name != call.timestep)
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)


def _like(source: nn.Module, model: Converted) -> nn.Module:
    """The source, or a copy of it in the dtype that `model` was cast to since."""
    assert model.origin is not None
    if model.dtype == _dtype(model.origin.call):
        return source
    return copy.deepcopy(source).to(device=model.device, dtype=model.dtype)


def _moved(model: Converted, dtype: torch.dtype, device: torch.device) -> Any:
    """A function that moves inputs of `model` to another device and floating dtype."""

    def moved(value: Tensor) -> Tensor:
        floating = value.is_floating_point() and value.dtype == model.dtype
        return value.to(device=device, dtype=dtype if floating else value.dtype)

    return moved


@torch.no_grad()
def _prepared_for(
    source: nn.Module, model: Prepared | Converted, args: Values, kwargs: Named
) -> Prepared:
    """Return the source prepared for a call, by the recipe of `model`."""
    named = named_call(source, args, kwargs)
    timestep = model.call.timestep_path
    if timestep not in named:
        raise InputError(f"the call has no {timestep}")
    try:
        structural_clone(source)(**pytree.tree_map(lambda value: value, named))
    except Exception as error:
        raise InputError(
            f"the {type(source).__name__} itself does not take this call: {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}"
        ) from error
    captured = _with_free_sizes(source, named, timestep, model.call)
    kept = model if isinstance(model, Prepared) else model.origin
    return observe_graph(
        captured.gm,
        captured.call,
        recipe=model.recipe,
        overrides={} if kept is None else kept.overrides,
        source=source,
        timesteps=_timesteps(model, captured.call),
        facts=capture_facts(captured),
        behaves=behaviour(source),
    )


def named_call(source: nn.Module, args: Values, kwargs: Named) -> dict[str, Any]:
    """Return the arguments of a call by name, without those that are left at their default.

    Raises InputError where forward does not take them.
    """
    signature = inspect.signature(source.forward)
    try:
        named = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise InputError(f"{type(source).__name__}.forward: {error}") from error
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
        elif name in named and named[name] is parameter.default:
            del named[name]
    named.pop("return_dict", None)
    return named


def _with_free_sizes(
    source: nn.Module, named: Mapping[str, Any], timestep: str, old: CallSpec
) -> Captured:
    """The capture of a call, with those sizes free, too, in which it differs from the old one."""
    usual, _ = describe_call(source, named, timestep, USUAL)
    free = {spec.path: _names(spec.shape) for spec in usual.inputs}
    before = {spec.path: spec.shape for spec in old.inputs}
    varied = False
    for spec in usual.inputs:
        shape = before.get(spec.path, ())
        if spec.path == timestep or len(shape) != len(spec.shape):
            continue
        for dim, (was, now) in enumerate(zip(shape, spec.shape, strict=True)):
            if isinstance(was, int) and isinstance(now, int) and was != now > 1 < was:
                free[spec.path][dim] = f"size_{was}_{now}"
                varied = True
    if varied:
        try:
            return capture(source, named, timestep=timestep, dynamic=free)
        except (CaptureError, ConfigError):
            pass  # the code fixes them: as they are, then
    return capture(source, named, timestep=timestep, dynamic=USUAL)


def _names(shape: Sequence[int | str]) -> dict[int, str]:
    return {dim: size for dim, size in enumerate(shape) if isinstance(size, str)}


def _timesteps(model: Prepared | Converted, call: CallSpec) -> Tensor | None:
    """The finite set of `model` in the dtype of a new call's timestep.

    Raises InputError where that cannot hold them.
    """
    values, dtype = model.timesteps, call.inputs[call.timestep_position].dtype
    if values is None:
        return None
    cast = values.to(dtype)
    if not torch.equal(cast.double(), values.double()):
        raise InputError(f"timesteps in {dtype} cannot hold those of this model, {values.dtype}")
    return check_timesteps(copy.copy(cast), dtype)
