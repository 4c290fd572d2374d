"""The way through: prepare, calibrate, convert. Each reads from top to bottom."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import artifact, backends
from .arguments import check_dynamic, check_names, path_of
from .backends.auto import compile_fastest, example_inputs
from .backends.proven import make_right
from .backends.self_check import Reference
from .behaviour import behaviour
from .bit_plan import BitPlan
from .bound import Bound
from .calibration import (
    check_sampling,
    fingerprint,
    finite_set,
    observed_ranges,
    resampled,
    sample_chunks,
    sample_count,
    sample_weights,
)
from .capture import capture
from .checkpoint import Checkpoint, digest
from .config import (
    Config,
    LayerConfig,
    ReconstructionSpec,
    RewriteSpec,
    to_dict,
)
from .correction import measure_errors
from .coverage import check_coverage, parameter_record
from .dataflow import Binding, binding_times, temporal_block
from .describe import Dynamic
from .errors import ArtifactError, ConfigError
from .graph import Rewrite, device_of, own_modules
from .inference import outside_inference_mode
from .loading import load as load
from .merging import facts, observe
from .modules import Compiled, Converted, Prepared, removed_layers
from .ops import check_timesteps
from .passes.correct_outputs import correct_outputs
from .passes.decompose_attention import decompose_attention
from .passes.fold_timesteps import fold_timesteps as fold_pass
from .passes.quantize_layers import quantize_layers
from .passes.quantize_products import quantize_products
from .passes.quantize_tables import quantize_tables
from .passes.reconstruct_blocks import reconstruct_blocks
from .passes.round_weights import round_weights
from .pipelines import find_timestep, named_inputs, sampling_pass
from .planning import given_bits, plan_bits
from .presets import resolve
from .processes import agree, from_first, rank, together, world
from .products import measure_products
from .recall import observed, remember
from .report import branch_weights, pass_record, product_records, site_records
from .rewriting import profiled_ranges, rewrite_layers, unchanged_sites
from .sites import Site, find_sites, left_by_module, plan_sites, still_there
from .temporal import choose_temporal, record_shipped
from .timesteps import timestep_values


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
    """A captured, analysed and observed form of `model`, which is never changed.

    example_inputs: arguments of model.forward as a tuple or a dict; left out, they are derived from
    a diffusers model's config.  timesteps: the finite set the model will be called with: an int N
    (0 to N - 1), a 1-d tensor or sequence of integers or floats, or a scheduler; left out, the
    steps that calibration visits.  timestep: the name of that input; left out, it is found by name.
    config: a preset name or a Config.  overrides: module name patterns (fnmatch) -> LayerConfig.
    dynamic: the sizes the graph leaves free: of "batch", "text" (the number of its tokens) and
    "spatial" (height and width) those that are named; or, one by one, {input: {dim: name}}.  Left
    out, "batch", and "text" too where the example inputs are derived.

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
    if values is not None and values.is_floating_point():
        inputs[name] = torch.as_tensor(inputs[name]).float()
    if dynamic is None:  # nobody said how long the text will be
        dynamic = ("batch", "text") if example_inputs is None else ("batch",)
    captured = capture(model, inputs, timestep=name, dynamic=dynamic)
    behaves = behaviour(model)
    dtype = inputs[name].dtype if isinstance(inputs[name], Tensor) else None
    return observed(
        captured.gm,
        captured.call,
        recipe=recipe,
        overrides=overrides or {},
        source=model,
        timesteps=None if values is None else check_timesteps(values, dtype or values.dtype),
        facts={
            "route": captured.route,
            "seconds": captured.seconds,
            "guards": [f"{g.text} is {g.holds} ({g.source})" for g in captured.call.guards],
            "notes": list(captured.notes),
        },
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
    """`prepared`, after one full-precision sampling pass that showed it every step.

    source: a diffusers pipeline (called with *args and **kwargs), a (scheduler, shape) pair with
    shape that of one sample (**kwargs: the model's further inputs by name, a row for each sample),
    or any iterable of inputs (tuples or dicts of arguments).
    num_inference_steps (50 where left out), samples (64), batch_size (32), seed (0): of the
    sampling. An iterable brings its own, and prompts, class labels or embeddings the number of
    samples: ConfigError where they are given as well.
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
            given = {"source": source, "args": args, "kwargs": kwargs}
            agree("calibrate()", facts(prepared, **settings, **given))
        sampling = sampling_pass(
            source,
            args,
            kwargs,
            original=prepared.source,
            settings=settings,
            fixed_batch=prepared.fixed_batch,
            progress=progress and not rank(),
        )
        observe(prepared, sampling)
    prepared.sampling = sampling
    return prepared


@outside_inference_mode
@together("convert()")
def convert(
    prepared: Prepared,
    *,
    budget: object = None,
    bits: BitPlan | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Converted:
    """The folded and quantized model that `prepared` and its calibration describe.

    capture -> exact rewrites of layers -> temporal block measured and chosen -> tables -> quantized
    layers (their bits chosen, under a budget) -> second-order rounding -> block reconstruction ->
    rounds of it on what the quantized model visits -> output correction.
    Deterministic for a seed on one machine.
    budget: weight bits are chosen layer by layer, 2 to 8, for the best output SQNR within it: bytes
    (a number, "900KiB"), a share of the bytes of `prepared` ("0.3x"), time of the planned layers in
    one call of the example ("8ms"), a share of what they take in floating point ("0.5x time"; both
    may leave layers in floating point), or several of these. Layers with an override keep its bits.
    `Converted.bit_plan` has what was measured and chosen.
    bits: such a plan, as it was or edited, in place of a budget.
    checkpoint: a directory for finished layers and blocks, from which a later convert of the same
    recipe, model and calibration takes them; it ends with the same bits.
    Of processes of torch.distributed's group all call this, with the same arguments; they share the
    work and end with the same model.
    Warns (CoverageWarning), naming modules, where a substantial part of the weights stays in
    floating point though the recipe asks for integers.
    Raises CalibrationError where a layer that needs data saw none, ConfigError where nothing at all
    can be quantized, where the directory
    holds the checkpoint of another conversion, a plan is of another model, or a budget cannot be
    met, naming the least that can.
    """
    if not isinstance(prepared, Prepared):
        raise ConfigError(
            f"convert() takes what prepare() returned, not a {type(prepared).__name__}"
        )
    if budget is not None and bits is not None:
        raise ConfigError("convert() takes a budget or bits=, the plan to replay, not both")
    if bits is not None and not isinstance(bits, BitPlan):
        raise ConfigError(
            f"bits must be a BitPlan, as Converted.bit_plan has it, not a {type(bits).__name__}"
        )
    if checkpoint is not None:
        checkpoint = path_of(checkpoint, "checkpoint")
    recipe, gm, spec = prepared.recipe, prepared.gm, prepared.recipe.reconstruction
    check_sampling(prepared)
    timesteps, visits = finite_set(prepared)
    many = world() > 1
    subject = fingerprint(prepared, timesteps, visits) if many or checkpoint is not None else {}
    if many:
        chosen = None if bits is None else repr(bits)
        settings = {"budget": repr(budget), "bits": chosen, "checkpoint": checkpoint is not None}
        agree("convert()", subject | settings)
    kept = None if checkpoint is None else Checkpoint(checkpoint, subject)

    def parts(group: str) -> Checkpoint | None:
        return None if kept is None else kept.within(group)

    block = temporal_block(gm)
    sites, declined = find_sites(gm)
    early = _before_the_sample(gm, sites)
    plan = plan_sites(sites, recipe, early=early, overrides=prepared.overrides)
    left = left_by_module(gm, sites)
    quantized = any(layer.weights for layer in plan.values())
    asked = quantized if plan else recipe.layers.weights is not None
    if quantized:
        # Only roundings are learnt; and torch 2.13 crashes in the backward of a channels-last
        # GroupNorm whose weight wants a gradient and whose input wants none.
        gm.requires_grad_(False)
    learnt = quantized and (spec.rounding == "second-order" or spec.iters > 0)
    rewriting = recipe.rewrites != RewriteSpec()
    ranges = observed_ranges(prepared, sites, plan, timesteps)
    corrected = recipe.correction != "none"
    sampled = learnt or rewriting or recipe.attention or corrected or budget is not None
    chunks = sample_chunks(prepared) if sampled or _profiled(plan, spec) else []
    done: list[Rewrite] = []

    def apply(rewrite: Rewrite) -> torch.fx.GraphModule:
        done.append(rewrite)
        return rewrite.gm

    if rewriting:
        rewritten = rewrite_layers(
            gm,
            recipe.rewrites,
            plan=plan,
            fixed=block.modules,
            chunks=chunks,
            seed=spec.seed,
            progress=progress,
        )
        gm, plan = rewritten.gm.requires_grad_(False), rewritten.plan
        done.extend(rewritten.passes)
    if recipe.attention is not None:
        gm = apply(decompose_attention(gm))
    reference = gm
    same = unchanged_sites(prepared.gm, gm)
    specs = {name: acts for name, layer in plan.items() if (acts := layer.calibrated)}
    profiled = [name for name in specs if name not in same or name in _profiled(plan, spec)]
    if profiled:
        ranges |= profiled_ranges(
            gm,
            {name: specs[name] for name in profiled},
            timesteps=timesteps,
            chunks=chunks,
            seed=spec.seed,
            progress=progress,
        )
    temporal = choose_temporal(
        block,
        config=recipe,
        plan=plan,
        ranges=ranges,
        timesteps=timesteps,
        visits=visits,
        checkpoint=parts("temporal"),
    )
    done.extend(temporal.passes)
    gm = apply(fold_pass(gm, timesteps=timesteps, only=temporal.tabled))
    if temporal.cached:
        gm = apply(quantize_tables(gm, bits=temporal.cached))
    measured = None
    if recipe.attention is not None:
        measured = measure_products(
            reference, chunks, spec=recipe.attention, timesteps=timesteps, seed=spec.seed
        )

    def quantize(gm: torch.fx.GraphModule) -> list[Rewrite]:
        ready = temporal.layers
        made = [quantize_layers(gm, plan=plan, ranges=ranges, timesteps=timesteps, ready=ready)]
        if measured is not None:
            assert recipe.attention is not None
            spec = recipe.attention
            made.append(
                quantize_products(made[0].gm, measured=measured, spec=spec, timesteps=timesteps)
            )
        return made

    if budget is not None:
        bits = plan_bits(
            quantize(gm)[-1].gm,
            prepared=prepared,
            reference=reference,
            layers=plan,
            fixed={*temporal.layers, *given_bits(plan, prepared.overrides)},
            chunks=chunks,
            timesteps=timesteps,
            budget=budget,
            checkpoint=parts("sensitivity"),
            progress=progress,
        )
        bits = from_first(bits, "bits")  # times differ
    if bits is not None:
        plan = bits.layers(plan)
    for made in quantize(gm):
        gm = apply(made)
    tag = "" if bits is None else f" {digest({n: s.chosen for n, s in bits.sites.items()})[:12]}"
    # Without TIAR the temporal block is layers like any other.
    skip = temporal.layers if recipe.temporal.tiar_iters else {}
    if quantized and spec.rounding == "second-order":
        gm = apply(
            round_weights(
                gm,
                reference=reference,
                chunks=chunks,
                plan=plan,
                spec=spec,
                weights=sample_weights(prepared, chunks),
                skip=skip,
                checkpoint=parts(f"rounding{tag}"),
                progress=progress,
            )
        )

    def reconstruct(given: Prepared, iters: int, group: str) -> torch.fx.GraphModule:
        chunks = sample_chunks(given)
        return apply(
            reconstruct_blocks(
                gm,
                reference=reference,
                chunks=chunks,
                spec=spec,
                iters=iters,
                weights=sample_weights(given, chunks),
                skip=skip,
                checkpoint=parts(f"{group}{tag}"),
                progress=progress,
            )
        )

    if quantized and spec.iters:
        gm = reconstruct(prepared, spec.iters, "blocks")
    for i in range(spec.rounds if quantized else 0):
        gm = reconstruct(resampled(prepared, gm), spec.round_iters, f"round {i}")
    record_shipped(temporal, block, gm, timesteps=timesteps, visits=visits)
    own_modules(gm)  # so that it moves alone
    gm.meta["timesteps"] = timesteps
    if recipe.correction != "none" and (quantized or recipe.attention is not None):
        errors = measure_errors(reference, gm, chunks, timesteps=timesteps)
        gm = apply(correct_outputs(gm, errors=errors, kind=recipe.correction, timesteps=timesteps))
    origin, watch = remember(
        prepared, timesteps, calibrated=bool(ranges or chunks), sampled=bool(chunks)
    )
    folded = prepared.gm.meta["capture"]["folded"]
    described = site_records(gm, plan, ranges)
    left = still_there(gm, left)
    if asked:
        integers = sum(s["weights"] for s in described.values() if s["weight_bits"])
        check_coverage(integers, left, declined)
    record = {
        "capture": gm.meta.pop("capture", {}),
        "block": block.summary(),
        "temporal": temporal.details,
        "samples": {"used": sample_count(prepared, chunks), "asked": spec.samples},
        "sites": described,
        "products": product_records(gm),
        "declined": [[d.site, d.reason] for d in declined],
        "left_weights": sum(left.values()) + branch_weights(gm),
        "parameters": parameter_record(gm, origin, prepared.source, folded),
        "bits": None if bits is None else bits.to_dict(),
        "passes": [pass_record(rewrite) for rewrite in done],
        "float_bytes": prepared.nbytes(),
        "removed": removed_layers(reference, gm),
    }
    return Converted(
        gm,
        prepared.call,
        recipe=recipe,
        record=record,
        model_config=prepared.model_config,
        origin=origin,
        watch=watch,
    )


@outside_inference_mode
def fold_timesteps(
    model: nn.Module,
    timesteps: Any,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    timestep: str | None = None,
) -> Converted:
    """`model` with everything that depends on the timestep alone read from exact tables.

    Nothing lossy: at batch 1 outputs equal the model's bit for bit at every one of `timesteps`;
    at other batch sizes they are equal up to float reassociation.
    """
    prepared = prepare(model, example_inputs, timesteps=timesteps, timestep=timestep, config="fp")
    return convert(prepared, progress=False)


@outside_inference_mode
def compile(
    model: Converted, backend: str = "auto", *, check: bool = True, **options: Any
) -> Compiled:
    """A new callable module that runs `model` on `backend`; `model` stays the reference.

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
        made, reasons = make_right(backend, model.runnable, options, reference)
        compiled = Compiled(model, made.runner, made.lowering, made.name, check=made.check)
    else:
        found = compile_fastest(
            model.runnable, lambda: _inputs(model)[0], options=options, reference=reference
        )
        compiled = Compiled(
            model, found.runner, found.lowering, found.name, millis=found.millis, check=found.check
        )
        reasons = [reason for _, reason in found.missing]
    compiled.declined[:0] = [["the whole model", reason] for reason in reasons]
    return compiled


def _reference(model: Converted) -> Reference:
    """What backends of a model are compared with."""
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
    """Example inputs of the graph that a backend compiles, for each of some timesteps."""
    found = []
    for step in steps:
        given = example_inputs(model.gm, model.timesteps, timestep=step, factor=factor)
        found.append(given if model.feed is None else model.feed(given))
    return found


@outside_inference_mode
@together("save()")
def save(model: Converted, path: str | Path, *, calibration: bool = False) -> None:
    """Write `model` to the directory `path`: the graph as JSON, tensors as safetensors, no pickle.

    calibration: whether to keep the ranges and samples of calibration as well, by which `refresh`
    quantizes other weights; without it a loaded model is refreshed where nothing was measured.
    Written beside it and renamed, so that an interrupted save leaves what was there.
    Raises ArtifactError where `path` is somebody else's or cannot be written, StaleError where the
    model that this one was made from has other weights since.
    Of many processes all call this, and the first one writes.
    """
    if not isinstance(model, Converted):
        raise ArtifactError(
            f"save() takes what convert() or fold_timesteps() returned, not a "
            f"{type(model).__name__}; compile after loading"
        )
    path = path_of(path, "path", ArtifactError)
    known = model.origin
    if calibration and known is not None and known.calibrated and known.calibration is None:
        raise ArtifactError(
            "save(calibration=True) of a model that was loaded without its calibration: there is "
            "none to keep. Leave the option out, or convert the source again"
        )
    if model.watch is not None:
        model.watch.check_contents()
    if rank():
        return
    origin = model.origin
    artifact.save(
        path,
        gm=model.gm,
        call=model.call.to_dict(),
        config=to_dict(model.recipe),
        extra={
            "record": model.record,
            "model_config": _plain(model.model_config),
            "prologue": to_dict(model.spec) if isinstance(model, Bound) else None,
        },
        origin=None if origin is None else origin.to_parts(calibration=calibration),
    )


def _plain(config: Any) -> dict[str, Any] | None:
    """A model configuration as JSON-ready values; entries that are not are left out."""
    if not isinstance(config, Mapping):
        return None
    plain: dict[str, Any] = {}
    for key, value in config.items():
        try:
            plain[key] = json.loads(json.dumps(value))
        except TypeError:
            continue
    return plain


def _before_the_sample(gm: torch.fx.GraphModule, sites: list[Site]) -> set[str]:
    """The sites whose results depend on the timestep and the conditions alone."""
    times = binding_times(gm, gm.meta.get("conditions", ()))
    return {s.name for s in sites if all(times[node] is not Binding.X for node in s.nodes)}


def _profiled(plan: Mapping[str, LayerConfig], spec: ReconstructionSpec) -> set[str]:
    """The sites whose ranges need more than the smallest and largest value of all calibration."""
    return {
        name
        for name, layer in plan.items()
        if (acts := layer.calibrated) is not None
        and (acts.ranges != "minmax" or acts.timestep_groups or spec.sampling != "uniform")
    }
