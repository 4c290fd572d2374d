"""Public entry points: prepare, calibrate, convert, fold_timesteps, compile, save, load."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx import backends
from tfmq_fx.backends.auto import compile_fastest, compile_or_fall_back, example_inputs
from tfmq_fx.backends.self_check import Reference

from .calibration.sampling_pass import sampling_pass
from .capture.call_inference import USUAL, Dynamic
from .capture.capture import capture
from .capture.inputs import example_timestep, find_timestep, named_inputs
from .conversion import capture_again as capture_again  # registers how
from .conversion.convert import convert as convert
from .conversion.distributed_calibration import run_calibration, run_settings
from .conversion.models import Compiled, Converted, Prepared
from .conversion.other_forms import captured_again
from .conversion.prepare_model import capture_facts, captured_only, observe_graph
from .conversion.save_model import save_model
from .core.arguments import check_dynamic, check_names, path_of
from .core.config import Config, PrologueSpec
from .core.distributed import check_same, rank, together, world
from .core.errors import ArtifactError, ConfigError, InputError
from .core.inference import outside_inference_mode
from .core.layer_config import LayerConfig
from .core.presets import resolve
from .core.timesteps import as_received, float_dtype, timestep_values
from .ir.graph import device_of
from .prologue.bound_model import Bound
from .prologue.load_model import load as load
from .prologue.weight_offload import check_offload
from .quant.timestep_lookup import check_timesteps
from .serialization.module_settings import behaviour


@outside_inference_mode
def prepare(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    timesteps: Any = None,
    timestep: str | None = None,
    config: str | Config = "w8a8",
    overrides: Mapping[str, LayerConfig] | None = None,
    dynamic: Dynamic | None = None,
) -> Prepared:
    """Capture and analyse `model`, which is never changed, and prepare it for calibration.

    example_inputs: arguments of model.forward as a tuple or a dict; left out, they are derived from
    a diffusers model's config.  timesteps: the finite set the model will be called with: an int N
    (0 to N - 1), a 1-d tensor or sequence of integers or floats, or a scheduler, whose distinct
    values count; left out, the steps that calibration visits.  Where they are floats and the
    example's timestep is whole, the graph takes floats of their dtype.  timestep: the name of that
    input; left out, it is found by name.
    config: a preset name or a Config.  overrides: module name patterns (fnmatch) -> LayerConfig.
    dynamic: the sizes the graph leaves free: of "batch", "text" (the number of its tokens),
    "spatial" (height and width) and "frames" those that are named; or, one by one, {input: {dim:
    name}}.  Left out, all of them, wherever the model's own code leaves them free.

    Derived inputs are only a start: as long as nothing is recorded, a call that the graph does not
    take has the model captured again as it is called.

    Calls of the result answer like the original and record ranges and samples.  Raises ConfigError
    for arguments that cannot be used, CaptureError where the model cannot be captured exactly.
    """
    recipe = resolve(config)
    check_dynamic(dynamic)
    if overrides is not None:
        check_names(overrides, "overrides", "LayerConfig")
    inputs = named_inputs(model, example_inputs)
    name = find_timestep(inputs, timestep)
    values = timestep_values(timesteps)
    inputs[name] = example_timestep(inputs[name], float_dtype(timesteps))
    captured = capture(model, inputs, timestep=name, dynamic=USUAL if dynamic is None else dynamic)
    behaves = behaviour(model)
    dtype = inputs[name].dtype
    return observe_graph(
        captured.gm,
        captured.call,
        recipe=recipe,
        overrides=overrides or {},
        source=model,
        timesteps=None if values is None else check_timesteps(as_received(values, dtype), dtype),
        facts=capture_facts(captured),
        behaves=behaves,
    )


@outside_inference_mode
def calibrate(
    prepared: Prepared,
    source: Any,
    *args: Any,
    num_inference_steps: int | None = None,
    samples: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Prepared:
    """Run one full-precision sampling pass through `prepared` and return it.

    source: a diffusers pipeline (called with *args and **kwargs), a (scheduler, shape) pair with
    shape that of one sample (**kwargs: the model's further inputs by name, a row for each sample;
    the scheduler's steps are taken by copies, with eta 0 and seeded noise), or any iterable of
    inputs (tuples or dicts of arguments).
    num_inference_steps (50 where left out), samples (64), batch_size (32), seed (0): of the
    sampling. An iterable brings its own, and prompts, class labels or embeddings the number of
    samples: ConfigError where they are given as well. These are drawn in one batch where batch_size
    is left out.
    Processes of torch.distributed's group share the batches: all call this, with the same arguments
    (ConfigError where they differ), and end with what one process would have.
    Raises CalibrationError naming the layer where NaN or Inf appears.
    """
    if not isinstance(prepared, Prepared):
        raise ConfigError(
            f"calibrate() takes what prepare() returned, not a {type(prepared).__name__}"
        )
    settings = {
        "num_inference_steps": num_inference_steps,
        "samples": samples,
        "batch_size": batch_size,
        "seed": seed,
    }
    with together("calibrate()"):
        if world() > 1:
            arguments = {"source": source, "args": args, "kwargs": kwargs}
            check_same("calibrate()", run_settings(prepared, **settings, **arguments))
        sampling = sampling_pass(
            source,
            args,
            kwargs,
            original=prepared.source,
            settings=settings,
            fixed_batch=prepared.fixed_batch,
            progress=progress and not rank(),
        )
        run_calibration(prepared, sampling)
    prepared.sampling = sampling
    return prepared


@outside_inference_mode
def fold_timesteps(
    model: nn.Module,
    timesteps: Any,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    timestep: str | None = None,
    dynamic: Dynamic | None = None,
) -> Converted:
    """Return `model` with exact tables for everything that depends on the timestep alone.

    timesteps, example_inputs, timestep, dynamic: as for `prepare`.
    Nothing lossy: at batch 1 outputs equal the model's bit for bit at every one of `timesteps`;
    at other batch sizes they are equal up to float reassociation.
    """
    prepared = prepare(
        model,
        example_inputs,
        timesteps=timesteps,
        timestep=timestep,
        config="fp",
        dynamic=dynamic,
    )
    return convert(prepared, progress=False)


@outside_inference_mode
def compile(
    model: Converted, backend: str = "auto", *, check: bool = True, **options: Any
) -> Compiled:
    """Return a new callable module that runs `model` on `backend`; `model` is not changed.

    backend: "inductor" (torch.compile, integer kernels on CPU and CUDA), "openvino" (CPU), "float"
    (CPU, torch.compile in bfloat16 on the weights that the codes stand for), "eager", or "auto":
    on the CPU whichever of these runs the model fastest, which is compiled on each and timed here,
    at the sizes it was captured with, and kept for the next start; models without integers, and
    CUDA, take inductor; where nothing can compile it is eager. `.millis` has what was measured,
    `.declined` why a backend was not tried. On CUDA, and with "auto", each layer's kernel is chosen
    by timing it as well.
    check: compares what was compiled with the model itself, at the sizes of capture and the first,
    the middle and the last of its timesteps, and each kernel of this package with its layer. A
    layer whose kernel is wrong runs in floating point; a backend that is further off than rounding
    explains (see `backends.self_check`) is not used but the next one, with a BackendWarning, and
    `.declined` says why. `.check` has the figures. It compiles at once, and costs about five calls
    of the model, one more for each further backend of "auto". Without, nothing is compared, and
    compiling happens at the first call, but for "auto".
    options: of the backend (`artifact`, `trial`, and torch.compile's mode, dynamic, options for
    inductor; `precision`, `threads`, `cache_dir` for openvino); with "auto" each goes to those
    backends that take it.
    Raises BackendError where the backend is unknown or cannot run here, ConfigError for an option
    that it does not take, StaleError where the model that this one was made from has other weights
    since.
    """
    if not isinstance(model, Converted):
        raise ConfigError(
            f"compile() takes what convert(), fold_timesteps() or load() returned, not a "
            f"{type(model).__name__}"
        )
    if model.watch is not None:
        model.watch.check_contents()
    if options.get("artifact") is not None:
        options["artifact"] = path_of(options["artifact"], "artifact")
    if backend != "auto":
        backends.backend(backend, device_of(model.gm))  # before the reference is run
    reference = _reference(model) if check and backend != "eager" else None
    if backend != "auto":
        result = compile_or_fall_back(backend, model.runnable, options, reference)
    else:
        result = compile_fastest(
            model.runnable, lambda: _inputs(model)[0], options=options, reference=reference
        )
    compiled = Compiled(
        model, result.runner, result.lowering, result.name, millis=result.millis, check=result.check
    )
    compiled.declined[:0] = [["the whole model", reason] for _, reason in result.missing]
    compiled.options = {"check": check} | {n: v for n, v in options.items() if n != "artifact"}
    return compiled


@captured_again.register
def _compiled_again(model: Compiled, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Compiled:
    """Return the form of the converted model for a call, compiled for the same backend."""
    converted = model.reference()
    if converted is None:
        raise InputError(
            "the converted model that it was compiled from is not in memory. Keep it, or compile "
            "one that was converted with such inputs"
        )
    refusal = InputError("the converted model does not take this call either")
    form = converted.forms.for_call(converted, args, kwargs, refusal)
    return compile(form, model.backend, **model.options)


def _reference(model: Converted) -> Reference:
    """Return the reference whose answers those of a backend are compared with."""
    keys = model.timesteps
    if isinstance(model, Bound) and model.prologue.schedule:  # which may refuse others
        keys = torch.tensor(sorted(model.prologue.schedule.values()), dtype=torch.float64)
    steps: list[Tensor | None] = [None]
    if keys is not None:
        steps = [keys[i] for i in sorted({0, len(keys) // 2, len(keys) - 1})]
    return Reference(
        model.runnable,
        lambda factor: _inputs(model, steps, factor),
        [None if step is None else float(step) for step in steps],
    )


def _inputs(
    model: Converted, steps: Sequence[Tensor | None] = (None,), factor: float = 1.0
) -> list[list[Tensor]]:
    """Return example inputs of the graph that a backend compiles, for each timestep of `steps`."""
    inputs = [example_inputs(model.gm, model.timesteps, timestep=s, factor=factor) for s in steps]
    return inputs if model.feed is None else [*map(model.feed, inputs)]


def save(model: Converted, path: str | Path, *, calibration: bool = False) -> None:
    """Write `model` to the directory `path`: the graph as JSON, tensors as safetensors, no pickle.

    calibration: whether to save the ranges and samples of calibration, which `refresh` needs to
    quantize other weights; without it, only models that did not read calibration can be refreshed.
    The files are written beside `path` and renamed, so an interrupted save changes nothing.
    Raises ArtifactError where `path` holds other files or cannot be written, StaleError where the
    source model has other weights since.
    If there are several processes all call this, and the first one writes.
    """
    if not isinstance(model, Converted):
        raise ArtifactError(
            f"save() takes what convert() or fold_timesteps() returned, not a "
            f"{type(model).__name__}; compile after loading"
        )
    save_model(model, path, calibration=calibration)


@outside_inference_mode
def bind_request(
    model: nn.Module,
    timesteps: Any = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    timestep: str | None = None,
    dynamic: Dynamic | None = None,
    spec: PrologueSpec | None = None,
    **options: Any,
) -> Bound:
    """Return `model` with everything that timestep and conditions fix computed once per request.

    Values that depend on the timestep and on inputs that stay for a whole request (class label,
    text, sizes, guidance) are computed for every step when such an input or the schedule is new,
    and read at the steps; values that depend on those inputs alone, once. Values are never stale:
    inputs are compared by object and version, or by content.

    model: a converted (and loaded) model, whose quantized layers and tables stay as they are; or
    any denoiser, captured here from example_inputs, timestep and dynamic (as for `prepare`) and
    left in floating point.
    timesteps: the schedule, as for `Bound.set_timesteps`; left out, timesteps are met as they come.
    options: of a PrologueSpec, in place of `spec`.
    Exact: outputs equal the model's bit for bit, at any batch size, where all samples are at one
    timestep, and up to float reassociation elsewhere.
    Raises ConfigError for options or inputs that cannot be used.
    """
    if spec is not None and options:
        raise ConfigError(f"give a PrologueSpec or {', '.join(options)}, not both")
    if isinstance(model, (Prepared, Compiled)):
        raise ConfigError(
            f"bind_request() takes a converted or a plain model, not a {type(model).__name__}; "
            "bind before compiling"
        )
    captures = (example_inputs, timestep, dynamic)
    if isinstance(model, Converted) and any(value is not None for value in captures):
        raise ConfigError(
            "a converted model is captured already: leave out example_inputs, timestep and dynamic"
        )
    if spec is not None and not isinstance(spec, PrologueSpec):
        raise ConfigError(f"spec must be a PrologueSpec, not a {type(spec).__name__}")
    known = [field.name for field in dataclasses.fields(PrologueSpec)]
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(f"bind_request() has no option {unknown[0]!r}; it has {', '.join(known)}")
    spec = PrologueSpec(**options) if spec is None else spec
    if isinstance(model, Converted):
        model = model.unbound()
    else:
        floats = float_dtype(timesteps)
        prepared = prepare(
            model,
            example_inputs,
            timesteps=None if floats is None else torch.zeros(1, dtype=floats),  # for its dtype
            timestep=timestep,
            config="fp",
            dynamic=dynamic,
        )
        model = captured_only(prepared)
        del prepared
        if spec.offload != "none":
            gc.collect()  # capture leaves cycles, which keep the weights that are to leave memory
    check_offload(spec.offload, model.device)
    bound = Bound(model, spec)
    if timesteps is not None:
        bound.set_timesteps(timesteps)
    return bound
