"""Define the steps of `convert`: `STEPS`, at the end, lists them in the order in which they run.

Each function is one step: it takes a Job and returns a new one. `print(tfmq_fx.STEPS)` shows what
each step does, guarantees and costs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tfmq_fx.calibration.output_errors import measure_errors
from tfmq_fx.calibration.product_ranges import measure_products as measure_product_ranges
from tfmq_fx.core.config import RewriteSpec
from tfmq_fx.core.distributed import from_first
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.sites import find_sites
from tfmq_fx.passes.correct_outputs import correct_outputs as correct_outputs_pass
from tfmq_fx.passes.decompose_attention import decompose_attention as decompose_attention_pass
from tfmq_fx.passes.fold_timesteps import fold_timesteps as fold_timesteps_pass
from tfmq_fx.passes.quantize_layers import quantize_layers as quantize_layers_pass
from tfmq_fx.passes.quantize_products import quantize_products as quantize_products_pass
from tfmq_fx.passes.quantize_tables import quantize_tables as quantize_tables_pass
from tfmq_fx.passes.reconstruct_blocks import reconstruct_blocks as reconstruct_blocks_pass
from tfmq_fx.passes.round_weights import round_weights as round_weights_pass

from .bit_planning import plan_bits as plan_bits_within
from .calibration_data import check_ranges, resampled
from .job import Job, Samples
from .layer_rewrites import profiled_ranges, unchanged_sites
from .layer_rewrites import rewrite_layers as rewrite_planned_layers
from .step import Guarantee, Need, Step, Steps
from .temporal_forms import choose_temporal


def rewrite_layers(job: Job) -> Job:
    """Rewrite layers so that they quantize better: split at concatenations (Q-Diffusion), scaled
    (TCAQ-DM's TCR, SmoothQuant), rotated (QuaRot, ConvRot), with a low-rank branch (SVDQuant)."""
    return rewrite_planned_layers(job)


def _no_rewrites(job: Job) -> str | None:
    return "the recipe asks for none" if job.recipe.rewrites == RewriteSpec() else None


def decompose_attention(job: Job) -> Job:
    """Take fused attention apart into its two products and the softmax."""
    return job.applied(decompose_attention_pass(job.gm))


def _no_attention(job: Job) -> str | None:
    attention = job.recipe.attention
    return "the recipe leaves attention's products in floating point" if attention is None else None


def measure_ranges(job: Job) -> Job:
    """Read the input range of each layer at each timestep from what calibration observed."""
    sites = [site for site in find_sites(job.captured)[0] if site.name in job.plan]
    observers = check_ranges(job.prepared, sites, job.plan)
    return replace(job, ranges={n: o.ranges(job.timesteps) for n, o in observers.items()})


def _nothing_ranged(job: Job) -> str | None:
    ranged = any(layer.calibrated for layer in job.plan.values())
    return None if ranged else "no layer's input range is calibrated"


def profile_ranges(job: Job) -> Job:
    """Measure anew the input ranges of rewritten layers, and those that are grouped or clipped."""
    profiled = profiled_ranges(job, _profiled(job))
    return replace(job, ranges={**job.ranges, **profiled})


def _profiled(job: Job) -> list[str]:
    """The layers whose ranges need more than the lowest and highest input that calibration saw."""
    unchanged = unchanged_sites(job.captured, job.gm)
    drawn = job.recipe.reconstruction.sampling != "uniform"
    return [
        name
        for name, layer in job.plan.items()
        if (acts := layer.calibrated) is not None
        and (name not in unchanged or acts.ranges != "minmax" or acts.timestep_groups or drawn)
    ]


def _nothing_profiled(job: Job) -> str | None:
    return None if _profiled(job) else "every range is the lowest and highest input observed"


def measure_products(job: Job) -> Job:
    """Measure the ranges of the operands of attention's products."""
    assert job.recipe.attention is not None
    measured = measure_product_ranges(
        job.reference,
        job.samples.chunks,
        spec=job.recipe.attention,
        timesteps=job.timesteps,
        seed=job.recipe.reconstruction.seed,
    )
    return replace(job, products=measured)


def choose_temporal_forms(job: Job) -> Job:
    """Choose for each temporal feature exact rows, int8 or int4 rows, or its layers quantized by
    TIAR, by measured error under a byte budget."""
    block = job.temporal_block()
    chosen = choose_temporal(
        block,
        config=job.recipe,
        plan=job.plan,
        ranges=job.ranges,
        timesteps=job.timesteps,
        visits=job.visits,
        checkpoint=job.parts("choose_temporal_forms"),
    )
    return replace(job, block=block, temporal=chosen, passes=(*job.passes, *chosen.passes))


def fold_timesteps(job: Job) -> Job:
    """Replace temporal features by look-ups in a table with one row for each timestep."""
    only = job.temporal.tabled
    return job.applied(fold_timesteps_pass(job.gm, timesteps=job.timesteps, only=only))


def quantize_tables(job: Job) -> Job:
    """Keep the rows of features that were chosen to be cached as int8 or int4."""
    return job.applied(quantize_tables_pass(job.gm, bits=job.temporal.cached))


def _nothing_cached(job: Job) -> str | None:
    if not job.temporal.choice:
        return "the model has no temporal features"
    return None if job.temporal.cached else "no feature was chosen to be cached as integers"


def plan_bits(job: Job) -> Job:
    """Choose the weight bits of each layer within the budget, by measured output error."""
    trial = quantize_layers(job)  # at the widths of the recipe
    trial = trial if job.products is None else quantize_products(trial)
    planned = plan_bits_within(trial.gm, job)
    return replace(job, bits=from_first(planned, "bits"))  # processes measure different times


def _no_budget(job: Job) -> str | None:
    if job.budget is not None:
        return None
    return "no budget was given" if job.bits is None else "the bits were given"


def quantize_layers(job: Job) -> Job:
    """Give convolutions and linear layers integer weights and inputs, with an input range for each
    timestep (FSC), group of timesteps, or call."""
    plan = job.plan if job.bits is None else job.bits.layers(dict(job.plan))
    quantized = quantize_layers_pass(
        job.gm,
        plan=plan,
        ranges=job.ranges,
        timesteps=job.timesteps,
        ready=job.temporal.layers,
    )
    return job.applied(quantized, plan=plan)


def quantize_products(job: Job) -> Job:
    """Round the operands of attention's products to integers."""
    assert job.recipe.attention is not None and job.products is not None
    return job.applied(
        quantize_products_pass(
            job.gm, measured=job.products, spec=job.recipe.attention, timesteps=job.timesteps
        )
    )


def round_weights(job: Job) -> Job:
    """Round weights to second order (GPTQ) on the inputs that each layer really gets, in execution
    order."""
    options = _rounding_options(job, "round_weights")
    return job.applied(round_weights_pass(job.gm, plan=dict(job.plan), **options))


def _rounding_options(job: Job, group: str) -> dict[str, Any]:
    """The arguments that both passes take which round weights on samples."""
    return {
        "reference": job.reference,
        "chunks": job.samples.chunks,
        "spec": job.recipe.reconstruction,
        "weights": job.samples.weights,
        # layers that TIAR has rounded are left alone
        "skip": job.temporal.layers if job.recipe.temporal.tiar_iters else {},
        "checkpoint": job.parts(group),
        "progress": job.progress,
    }


def _no_second_order(job: Job) -> str | None:
    if not job.quantizes:
        return "no weights are quantized"
    nearest = job.recipe.reconstruction.rounding == "nearest"
    return "the recipe rounds to nearest" if nearest else None


def reconstruct_blocks(job: Job) -> Job:
    """Learn the rounding of each block (BRECQ, AdaRound) so that its output is the full-precision
    one."""
    options = _rounding_options(job, "reconstruct_blocks")
    iters = job.recipe.reconstruction.iters
    return job.applied(reconstruct_blocks_pass(job.gm, iters=iters, **options))


def _not_learnt(job: Job) -> str | None:
    if not job.quantizes:
        return "no weights are quantized"
    return None if job.recipe.reconstruction.iters else "the recipe learns no rounding (iters=0)"


def resample_and_reconstruct(job: Job) -> Job:
    """Sample again with the quantized model (TCAQ-DM's PAR), and learn the rounding of each block
    on that."""
    spec, samples = job.recipe.reconstruction, job.samples
    for i in range(spec.rounds):
        job = replace(job, samples=Samples(resampled(job.prepared, job.gm)))
        options = _rounding_options(job, f"resample_and_reconstruct {i}")
        job = job.applied(reconstruct_blocks_pass(job.gm, iters=spec.round_iters, **options))
    return replace(job, samples=samples)


def _not_resampled(job: Job) -> str | None:
    if not job.quantizes:
        return "no weights are quantized"
    return None if job.recipe.reconstruction.rounds else "the recipe samples once (rounds=0)"


def correct_outputs(job: Job) -> Job:
    """Subtract the mean error of the output at each timestep (PTQD), where that helps on held-out
    samples."""
    errors = measure_errors(job.reference, job.gm, job.samples.chunks, timesteps=job.timesteps)
    kind = job.recipe.correction
    return job.applied(
        correct_outputs_pass(job.gm, errors=errors, kind=kind, timesteps=job.timesteps)
    )


def _not_corrected(job: Job) -> str | None:
    if job.recipe.correction == "none":
        return "the recipe corrects nothing"
    changed = job.quantizes or job.recipe.attention is not None
    return None if changed else "nothing is quantized"


def _step(run: Callable[[Job], Job], *, cost: str = "seconds", **options: Any) -> Step:
    """A step with the name of its function."""
    return Step(name=run.__name__, run=run, cost=cost, **options)


_captured = functools.partial(
    _step, takes=Stage.CAPTURED, gives=Stage.CAPTURED, guarantee=Guarantee.UNCHANGED
)
_folded = functools.partial(_step, takes=Stage.FOLDED, gives=Stage.FOLDED)
_quantized = functools.partial(
    _step, takes=Stage.QUANTIZED, gives=Stage.QUANTIZED, guarantee=Guarantee.MEASURED
)
_SAMPLES = frozenset({Need.SAMPLES})
_PASS = "a pass over the samples"

STEPS = Steps(
    _captured(
        rewrite_layers,
        skip=_no_rewrites,
        needs=_SAMPLES,
        guarantee=Guarantee.REASSOCIATION,
        cost="a pass over the samples for each rewrite",
    ),
    _captured(decompose_attention, skip=_no_attention, guarantee=Guarantee.REASSOCIATION),
    _captured(measure_ranges, skip=_nothing_ranged, needs=frozenset({Need.RANGES})),
    _captured(profile_ranges, skip=_nothing_profiled, needs=_SAMPLES, cost=_PASS),
    _captured(measure_products, skip=_no_attention, needs=_SAMPLES, cost=_PASS),
    _captured(choose_temporal_forms, cost="seconds, or tiar_iters steps of learning"),
    _step(
        fold_timesteps,
        takes=Stage.CAPTURED,
        gives=Stage.FOLDED,
        guarantee=Guarantee.BIT_EXACT,
    ),
    _folded(quantize_tables, skip=_nothing_cached, guarantee=Guarantee.MEASURED),
    _folded(
        plan_bits,
        skip=_no_budget,
        needs=_SAMPLES,
        guarantee=Guarantee.UNCHANGED,
        cost="layers x bit widths, each a pass over the samples",
    ),
    _step(
        quantize_layers,
        takes=Stage.FOLDED,
        gives=Stage.QUANTIZED,
        guarantee=Guarantee.MEASURED,
    ),
    _quantized(quantize_products, skip=_no_attention),
    _quantized(
        round_weights,
        skip=_no_second_order,
        needs=_SAMPLES,
        cost="two passes over the samples, and a factorization for each layer",
    ),
    _quantized(
        reconstruct_blocks,
        skip=_not_learnt,
        needs=_SAMPLES,
        cost="blocks x iters steps of learning",
    ),
    _quantized(
        resample_and_reconstruct,
        skip=_not_resampled,
        needs=frozenset({Need.SAMPLES, Need.RESAMPLING}),
        cost="rounds x (a calibration, and blocks x round_iters steps of learning)",
    ),
    _quantized(
        correct_outputs,
        skip=_not_corrected,
        needs=_SAMPLES,
        cost="two passes over the samples",
    ),
)
