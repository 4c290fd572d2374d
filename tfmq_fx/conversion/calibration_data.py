"""Read timesteps, ranges and samples from a calibrated model, and check that they are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.calibration.observers import RangeObserver, SampleCache
from tfmq_fx.core.errors import CalibrationError
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.version import __version__
from tfmq_fx.ir.sites import Site
from tfmq_fx.passes.observe_layers import observer_name
from tfmq_fx.quant.timestep_lookup import check_timesteps
from tfmq_fx.serialization.checkpoint import digest

from .distributed_calibration import run_calibration, run_settings
from .models import Prepared


def finite_set(prepared: Prepared) -> tuple[Tensor, Tensor]:
    """The timesteps (K,), sorted, and how often calibration visited each (1 if it did not run)."""
    timesteps, visited = prepared.timesteps, prepared.cache.visits
    if timesteps is None:
        if not visited:
            raise CalibrationError(
                "convert() before any calibration: no timestep is known. Run "
                "tfmq_fx.calibrate(prepared, ...) or give prepare() the timesteps."
            )
        dtype = prepared.timestep_of(prepared.call.inputs).dtype
        timesteps = check_timesteps(list(visited), dtype).to(prepared.device)
    counts = [float(visited.get(step, 0)) for step in timesteps.tolist()]
    visits = torch.tensor(counts, dtype=torch.float32)
    return timesteps, visits if any(counts) else torch.ones_like(visits)


def check_sampling(prepared: Prepared, step: str) -> None:
    """Raise CalibrationError unless calibration can be repeated with another model, for `step`."""
    if prepared.sampling is None or not prepared.sampling.repeatable:
        raise CalibrationError(
            f"recipe {prepared.recipe.name!r} samples again with the quantized model (step "
            f"{step!r}), which inputs given as an iterable cannot do. Calibrate with a pipeline or "
            "a (scheduler, shape) pair."
        )


def resampled(prepared: Prepared, gm: torch.fx.GraphModule) -> Prepared:
    """A copy of `prepared` calibrated with `gm`, the model quantized so far, as the denoiser."""
    assert prepared.sampling is not None
    result = Prepared(
        prepared.gm,
        gm,
        prepared.call,
        recipe=prepared.recipe,
        overrides=prepared.overrides,
        source=prepared.source,
    )
    run_calibration(result, prepared.sampling)
    return result


def check_ranges(
    prepared: Prepared, sites: Sequence[Site], plan: Mapping[str, LayerConfig]
) -> dict[str, RangeObserver]:
    """The observer of every site whose input range is calibrated.

    Raises CalibrationError where one of them saw no data.
    """
    names = [s.name for s in sites if plan[s.name].calibrated]
    modules = {name: prepared.observed.get_submodule(observer_name(name)) for name in names}
    observers = {name: m for name, m in modules.items() if isinstance(m, RangeObserver)}
    empty = [name for name, observer in observers.items() if not observer.seen]
    if empty:
        raise CalibrationError(
            f"convert() before any calibration: {len(empty)} of {len(names)} layers saw no data "
            f"({', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}). "
            "Run tfmq_fx.calibrate(prepared, ...) first."
        )
    return observers


def check_samples(cache: SampleCache) -> None:
    """Raise CalibrationError where `cache` has no sample inputs."""
    if not len(cache):
        raise CalibrationError(
            "convert() before any calibration: rounding weights needs sample inputs. Run "
            "tfmq_fx.calibrate(prepared, ...) first, or use rounding='nearest' and iters=0."
        )


def fingerprint(prepared: Prepared, timesteps: Tensor, visits: Tensor) -> dict[str, Any]:
    """Facts that decide the result of a conversion: recipe, model, calibration and versions."""
    facts = run_settings(prepared)
    del facts["recipe"]["reconstruction"]["memory"]  # changes where values wait, and no result
    seen = {observer.site: observer.seen for observer in prepared.observers()}
    cache = prepared.cache
    return {
        "versions": {"tfmq_fx": __version__, "torch": torch.__version__},
        **facts,
        "calibration": digest([timesteps, visits, cache.visits, cache.rows, seen]),
    }
