"""Learn the rounding of the temporal block as one unit (TIAR, temporal information aware
reconstruction).

features = tib_q(t), rounded to nearest    ->    rounded so that all features together stay put
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, fx

from tfmq_fx.core.config import ReconstructionSpec
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph_pass import Declined, Rewrite, graph_pass
from tfmq_fx.ir.subgraphs import at_timesteps
from tfmq_fx.quant.adaround import AdaRoundLayer, Batch, learn, start_of
from tfmq_fx.quant.modules import weight_rows
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.serialization.checkpoint import (
    Checkpoint,
    Part,
    finished,
    record,
    rounded_state,
    seeded_generator,
    with_rounded_state,
)


@graph_pass(takes=Stage.QUANTIZED, gives=Stage.QUANTIZED)
def reconstruct_tib(
    gm: fx.GraphModule,
    *,
    reference: fx.GraphModule,
    timesteps: Tensor,
    visits: Tensor,
    iters: int,
    spec: ReconstructionSpec,
    checkpoint: Checkpoint | None = None,
) -> Rewrite:
    """The quantized temporal block with weights rounded by AdaRound, all layers jointly.

    gm, reference: t (K,) -> features, quantized and full precision.  timesteps: (K,), the whole
    set: every one of them is in every step.  visits: (K,) weight of each, how often the sampler
    comes by.  The objective is TFMQ-DM's (section 3.2): the sum over features of their squared
    error, here relative to each feature's size, and only rounding moves, besides biases.
    Where the decided block is worse than the one given, that one stays and the pass says so.
    checkpoint: where the finished block is found and put.
    """
    sites = [name for name, m in gm.named_modules() if isinstance(m, QuantLayer)]
    if not sites or iters == 0:
        return Rewrite(gm, 0)
    result = finished(
        checkpoint,
        "temporal block",
        lambda: _learnt(gm, reference, sites, timesteps, visits, iters, spec),
    )
    for name, state in result.states.items():
        layer = gm.get_submodule(name)
        assert isinstance(layer, QuantLayer)
        gm.set_submodule(name, with_rounded_state(layer, state))
    declined = [Declined("temporal block", result.note)] if result.note else []
    return Rewrite(gm, len(result.states), declined, result.errors | record(checkpoint))


def _learnt(
    gm: fx.GraphModule,
    reference: fx.GraphModule,
    sites: Sequence[str],
    timesteps: Tensor,
    visits: Tensor,
    iters: int,
    spec: ReconstructionSpec,
) -> Part:
    """Learn the layers of the block; errors are mean relative errors of the features, and the share
    of weights whose rounding is decided."""
    targets = at_timesteps(reference, timesteps)
    trained = fx.GraphModule(gm, gm.graph)
    soft = {}
    for name in sites:
        layer, original = gm.get_submodule(name), weight_rows(reference.get_submodule(name))
        assert isinstance(layer, QuantLayer)
        soft[name] = AdaRoundLayer(layer, start_of(layer, original), quantize_input=False)
        trained.set_submodule(name, soft[name])
    before = feature_errors(gm, targets, timesteps)
    stopped = learn(
        partial(at_timesteps, trained),
        list(soft.values()),
        [Batch((timesteps,), targets, visits / visits.mean())],
        before=float(before.square().mean()),
        iters=iters,
        learning_rate=spec.learning_rate,
        regularization=spec.regularization,
        generator=seeded_generator(spec.seed, "temporal block"),
    )
    rounded = {name: layer.decided() for name, layer in soft.items()}
    for name, module in rounded.items():
        trained.set_submodule(name, module)
    after = feature_errors(trained, targets, timesteps)
    share = visits.to(before) / visits.sum()
    earlier, later = (float((errors @ share).mean()) for errors in (before, after))
    learnt = [s.rounding for s in soft.values() if s.rounding is not None]
    weights = sum(rounding.alpha.numel() for rounding in learnt)
    decided = sum(rounding.decided() * rounding.alpha.numel() for rounding in learnt)
    errors = {
        "error_before": earlier,
        "error_after": later,
        "decided": decided / weights if weights else 1.0,
    }
    if stopped or not later < earlier:  # NaN is no better
        why = stopped or f"learnt rounding is no better ({later:.4g})"
        return Part({}, errors, f"{why}: kept what it had ({earlier:.4g})")
    return Part({name: rounded_state(module) for name, module in rounded.items()}, errors)


def feature_errors(gm: fx.GraphModule, targets: tuple[Tensor, ...], timesteps: Tensor) -> Tensor:
    """Relative L2 error of each feature at each timestep: (features, K)."""
    with torch.no_grad():
        features = at_timesteps(gm, timesteps)
    return relative_errors(features, targets)


def relative_errors(values: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> Tensor:
    """|found - target| / |target| for each feature (K, ...) and row: (features, K), 0/0 is 0."""
    return torch.stack(
        [
            (f.float() - t.float()).reshape(len(t), -1).norm(dim=1)
            / t.float().reshape(len(t), -1).norm(dim=1).clamp(min=1e-12)
            for f, t in zip(values, targets, strict=True)
        ]
    )
