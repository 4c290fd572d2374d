"""Convert a prepared model by an ordered list of steps, and record what each of them did."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tfmq_fx.core.arguments import path_of
from tfmq_fx.core.distributed import check_same, together, world
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.inference import outside_inference_mode
from tfmq_fx.ir.binding_times import Binding, binding_times
from tfmq_fx.ir.graph import fork, own_modules
from tfmq_fx.ir.opaque_layers import inner_sites, measured_at_calls
from tfmq_fx.ir.sites import find_sites, left_by_module, plan_sites, still_there
from tfmq_fx.quant.bit_plan import BitPlan
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.serialization.checkpoint import Checkpoint
from tfmq_fx.serialization.removed_layers import removed_layers

from .calibration_data import fingerprint, finite_set
from .coverage import check_coverage, opaque_declined, parameter_record
from .job import Job, Samples, StepRecord
from .models import Converted, Prepared
from .prepare_model import record_provenance
from .records import ConversionRecord, branch_weights, pass_record, product_records, site_records
from .step import Step, Steps
from .steps import STEPS
from .temporal_forms import final_details


@outside_inference_mode
@together("convert()")
def convert(
    prepared: Prepared,
    *,
    budget: object = None,
    bits: BitPlan | None = None,
    checkpoint: str | Path | None = None,
    steps: Steps = STEPS,
    progress: bool = True,
) -> Converted:
    """The folded and quantized model, by the recipe and the calibration of `prepared`.

    Runs `steps` in order, each on the graph that the previous one returned; `print(STEPS)` lists
    them. Deterministic for a seed on one machine.
    budget: weight bits are chosen layer by layer, 2 to 8, for the best output SQNR within it: bytes
    (a number, "900KiB"), a share of the bytes of `prepared` ("0.3x"), time of the planned layers in
    one call of the example ("8ms"), a share of what they take in floating point ("0.5x time"; both
    may leave layers in floating point), or several of these. Layers with an override keep its bits.
    `Converted.bit_plan` has the measured errors and the chosen bits.
    bits: a bit plan to replay, which may be edited, in place of a budget.
    checkpoint: a directory for finished layers and blocks. A later convert of the same recipe,
    model, calibration and steps continues from it, and ends with the same bits.
    steps: the steps to run, such as `STEPS.before("round_weights", mine)`.
    With processes of torch.distributed's group all call this, with the same arguments; they share
    the work and end with the same model.
    Warns (CoverageWarning), naming modules, where a substantial part of the weights stays in
    floating point though the recipe asks for integers.
    Raises CalibrationError where a step needs data that calibration did not see; ConfigError where
    nothing at all can be quantized, steps do not fit one another, the directory holds the
    checkpoint of another conversion, a plan is of another model, or a budget cannot be met, naming
    the smallest feasible one.
    """
    job = start(prepared, budget, bits, checkpoint, steps, progress)
    steps.check(job)  # before the long work
    for step in steps:
        job = run(step, job)
    return finish(job, steps)


def start(
    prepared: Prepared,
    budget: object,
    bits: BitPlan | None,
    checkpoint: str | Path | None,
    steps: Steps,
    progress: bool,
) -> Job:
    """The job before the first step: a copy of the captured graph, and the layer configurations.

    Raises CalibrationError where no timestep is known, ConfigError for an argument of a wrong type
    and where processes or the checkpoint's directory are of another conversion.
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
    if not isinstance(steps, Steps):
        raise ConfigError(
            f"steps must be a tfmq_fx.Steps, such as STEPS.before('round_weights', mine), "
            f"not a {type(steps).__name__}"
        )
    if checkpoint is not None:
        checkpoint = path_of(checkpoint, "checkpoint")
    timesteps, visits = finite_set(prepared)
    subject: dict[str, Any] = {}
    if world() > 1 or checkpoint is not None:
        subject = fingerprint(prepared, timesteps, visits) | {"steps": list(steps.names)}
    if world() > 1:
        plan_text = None if bits is None else repr(bits)
        settings = {"budget": repr(budget), "bits": plan_text, "checkpoint": checkpoint is not None}
        check_same("convert()", subject | settings)
    gm = fork(prepared.gm)
    sites, _ = find_sites(gm)
    times = binding_times(gm, gm.meta.get("conditions", ()))
    early = {s.name for s in sites if all(times[node] is not Binding.X for node in s.nodes)}
    inner, _ = inner_sites(gm)
    early |= {site.name for site in inner}
    plan = plan_sites([*sites, *inner], prepared.recipe, early=early, overrides=prepared.overrides)
    plan |= {site.name: measured_at_calls(plan[site.name]) for site in inner}
    if any(layer.weights for layer in plan.values()):
        # Only roundings are learnt; and torch 2.13 crashes in the backward of a channels-last
        # GroupNorm whose weight wants a gradient and whose input wants none.
        own_modules(gm)
        gm.requires_grad_(False)
    return Job(
        prepared=prepared,
        timesteps=timesteps,
        visits=visits,
        captured=gm,
        gm=gm,
        reference=gm,
        plan=plan,
        samples=Samples(prepared),
        budget=budget,
        bits=bits,
        checkpoint=None if checkpoint is None else Checkpoint(checkpoint, subject),
        progress=progress,
    )


def run(step: Step, job: Job) -> Job:
    """The job after `step`, unchanged where the step is left out, with an entry in the log."""
    entry, result = StepRecord(step.name, step.guarantee.value, skipped=step.skip(job)), job
    if entry.skipped is None:
        begun = time.perf_counter()
        result = step(job)
        if job.checkpoint is not None and step not in STEPS:
            result = result.marked()
        entry = replace(entry, seconds=round(time.perf_counter() - begun, 3))
    return replace(result, log=(*job.log, entry))


def finish(job: Job, steps: Steps) -> Converted:
    """The converted model from a job after its last step, with its record."""
    prepared, recipe, gm, samples = job.prepared, job.recipe, job.gm, job.samples
    block = job.temporal_block()
    temporal = final_details(job.temporal, block, gm, timesteps=job.timesteps, visits=job.visits)
    own_modules(gm)  # so that it moves alone
    origin, watch = record_provenance(
        prepared,
        job.timesteps,
        calibrated=bool(job.ranges or samples.used),
        sampled=bool(samples.used),
        steps=steps.names,
    )
    sites, declined = find_sites(job.captured)
    inner = [site for site in inner_sites(gm)[0] if isinstance(site.layer, QuantLayer)]
    left = still_there(gm, left_by_module(job.captured, [*sites, *inner]))
    declined = [*declined, *opaque_declined(gm)]
    layers = site_records(gm, job.ranges)
    if job.quantizes or (not job.plan and recipe.layers.weights is not None):
        integers = sum(s["weights"] for s in layers.values() if s["weight_bits"])
        check_coverage(integers, left, declined)
    folded = prepared.gm.meta["capture"]["folded"]
    record = ConversionRecord(
        capture=gm.meta.pop("capture", {}),
        block=block.summary(),
        temporal=temporal,
        samples={"used": samples.used, "asked": recipe.reconstruction.samples},
        sites=layers,
        products=product_records(gm),
        declined=[[d.site, d.reason] for d in declined],
        left_weights=sum(left.values()) + branch_weights(gm),
        parameters=parameter_record(gm, origin, prepared.source, folded),
        bits=None if job.bits is None else job.bits.to_dict(),
        steps=[asdict(entry) for entry in job.log],
        passes=[pass_record(rewrite) for rewrite in job.passes],
        float_bytes=prepared.nbytes(),
        removed=removed_layers(job.reference, gm),
    )
    return Converted(
        gm,
        prepared.call,
        recipe=recipe,
        record=vars(record),
        model_config=prepared.model_config,
        outline=prepared.outline,
        origin=origin,
        watch=watch,
    )
