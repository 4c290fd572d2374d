"""What calibration saw of a model, as conversion needs it: timesteps, ranges, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.calibration.observers import RangeObserver, Ranges, SampleCache
from tfmq_fx.core.config_json import to_dict
from tfmq_fx.core.errors import CalibrationError
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.version import __version__
from tfmq_fx.ir.sites import Site
from tfmq_fx.passes.observe_layers import observer_name
from tfmq_fx.quant.timestep_lookup import check_timesteps
from tfmq_fx.serialization.checkpoint import digest

from .distributed_calibration import run_calibration
from .models import Prepared


def finite_set(prepared: Prepared) -> tuple[Tensor, Tensor]:
    """The timesteps (K,), sorted, and how often calibration visited each (1 if it did not run)."""
    given, seen = prepared.timesteps, prepared.cache.visits
    if given is None:
        if not seen:
            raise CalibrationError(
                "convert() before any calibration: no timestep is known. Run "
                "tfmq_fx.calibrate(prepared, ...) or give prepare() the timesteps."
            )
        position = prepared.call.timestep_position
        given = check_timesteps(list(seen), prepared.call.inputs[position].dtype)
        given = given.to(prepared.device)
    visits = torch.tensor(
        [float(seen.get(step, 0)) for step in given.tolist()], dtype=torch.float32
    )
    return given, visits if bool(visits.sum() > 0) else torch.ones(len(given), dtype=torch.float32)


def check_sampling(prepared: Prepared, step: str) -> None:
    """Raise CalibrationError unless calibration can be repeated with another model, for `step`."""
    if prepared.sampling is None or not prepared.sampling.repeatable:
        raise CalibrationError(
            f"recipe {prepared.recipe.name!r} samples again with the quantized model (step "
            f"{step!r}), which inputs given as an iterable cannot do. Calibrate with a pipeline or "
            "a (scheduler, shape) pair."
        )


def resampled(prepared: Prepared, gm: torch.fx.GraphModule) -> Prepared:
    """What `prepared` would be had the model quantized so far, `gm`, been sampled with."""
    assert prepared.sampling is not None
    spec = prepared.recipe.reconstruction
    result = Prepared(
        prepared.gm,
        gm,
        prepared.call,
        recipe=prepared.recipe,
        overrides=prepared.overrides,
        cache=SampleCache(capacity=spec.cache, seed=spec.seed),
        source=prepared.source,
        model_config=prepared.model_config,
    )
    run_calibration(result, prepared.sampling)
    return result


def check_ranges(
    prepared: Prepared, sites: Sequence[Site], plan: Mapping[str, LayerConfig]
) -> dict[str, RangeObserver]:
    """The observer of every site whose input range is to be calibrated.

    Raises CalibrationError where one of them saw no data.
    """
    wanted = [s.name for s in sites if plan[s.name].calibrated]
    modules = {name: prepared.observed.get_submodule(observer_name(name)) for name in wanted}
    observers = {name: m for name, m in modules.items() if isinstance(m, RangeObserver)}
    empty = [name for name, observer in observers.items() if not observer.seen]
    if empty:
        raise CalibrationError(
            f"convert() before any calibration: {len(empty)} of {len(wanted)} layers saw no data "
            f"({', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}). "
            "Run tfmq_fx.calibrate(prepared, ...) first."
        )
    return observers


def observed_ranges(
    prepared: Prepared, sites: Sequence[Site], plan: Mapping[str, LayerConfig], timesteps: Tensor
) -> dict[str, Ranges]:
    """The input range of every site that calibration is to range, over the finite set."""
    observers = check_ranges(prepared, sites, plan)
    return {name: observer.ranges(timesteps) for name, observer in observers.items()}


def check_samples(prepared: Prepared) -> None:
    """Raise CalibrationError where calibration has kept no sample inputs."""
    if not len(prepared.cache):
        raise CalibrationError(
            "convert() before any calibration: rounding weights needs sample inputs. Run "
            "tfmq_fx.calibrate(prepared, ...) first, or use rounding='nearest' and iters=0."
        )


def sample_chunks(prepared: Prepared) -> list[tuple[Tensor, ...]]:
    """Calibration samples for rounding."""
    check_samples(prepared)
    spec = prepared.recipe.reconstruction
    return prepared.cache.chunks(
        spec.samples,
        batched=prepared.batched(),
        batch_size=prepared.fixed_batch or spec.batch_size,
        whole=prepared.fixed_batch is not None,
        seed=spec.seed,
        center=spec.center if spec.sampling == "normal" else None,
    )


def sample_count(prepared: Prepared, chunks: Sequence[Sequence[Tensor]]) -> int:
    """How many samples there are in `chunks`."""
    position = prepared.call.timestep_position
    return sum(len(chunk[position]) for chunk in chunks)


def sample_weights(prepared: Prepared, chunks: Sequence[Sequence[Tensor]]) -> list[Tensor] | None:
    """The weights of the samples of each chunk, by how often calibration visited their timestep;
    None where all are the same or the timesteps were chosen."""
    if prepared.recipe.reconstruction.sampling == "normal":
        return None
    position = prepared.call.timestep_position
    return prepared.cache.weights([chunk[position] for chunk in chunks])


def fingerprint(prepared: Prepared, timesteps: Tensor, visits: Tensor) -> dict[str, Any]:
    """All that decides what conversion finds, but for the machine and how much memory it takes."""
    recipe = to_dict(prepared.recipe)
    del recipe["reconstruction"]["memory"]
    observers = prepared.observed.named_modules()
    seen = {name: m.seen for name, m in observers if isinstance(m, RangeObserver)}
    cache = prepared.cache
    return {
        "versions": {"tfmq_fx": __version__, "torch": torch.__version__},
        "recipe": recipe,
        "overrides": {name: to_dict(layer) for name, layer in prepared.overrides.items()},
        "model": digest([list(prepared.gm.named_parameters()), list(prepared.gm.named_buffers())]),
        "calibration": digest([timesteps, visits, cache.visits, cache.rows, seen]),
    }
