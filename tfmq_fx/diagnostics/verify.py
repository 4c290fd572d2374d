"""Compare a converted model with its reference: prove exact parts equal, measure lossy ones, name
culprits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.capture.call_spec import CallSpec
from tfmq_fx.capture.capture import capture
from tfmq_fx.capture.input_checks import BATCH
from tfmq_fx.capture.replay import arguments
from tfmq_fx.conversion.models import Compiled, Converted
from tfmq_fx.core.arguments import check_many, check_module, check_number, check_whole
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.inference import outside_inference_mode
from tfmq_fx.core.progress import progress_bar
from tfmq_fx.passes.correct_outputs import CORRECTION
from tfmq_fx.passes.merge_duplicates import merge_duplicates
from tfmq_fx.prologue.bound_model import Bound
from tfmq_fx.quant.activation import QuantActivation
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.quant.sqnr import decibels, energies, pooled
from tfmq_fx.quant.timestep_lookup import check_timesteps
from tfmq_fx.quant.timestep_table import QuantTimestepTable

from .culprits import find_culprits, worst
from .feature_errors import FeatureError, feature_errors
from .layer_errors import site_errors
from .random_inputs import Example, RandomInputs, batches, draw_examples, join, rows_of
from .verification_result import Verification

_CHANGED = 10  # names of changed parameters in the result
_SITES, _BATCH = 64, 8  # examples that layers are measured on, and how many at once


@outside_inference_mode
def verify(
    reference: nn.Module,
    model: Converted | Compiled,
    inputs: Iterable[Sequence[Any]] | None = None,
    *,
    batch: int = 8,
    conditions: int | None = None,
    threshold: float | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> Verification:
    """Compare `model` with the model it was made from, over its whole set of timesteps.

    inputs: (sample, timestep, ...) tuples to compare on, placeholder by placeholder; left out, they
    are drawn (see `random_inputs.RandomInputs`), one for each timestep.
    batch: examples at once; an exact model is also called with each of them alone.
    conditions: how many values are drawn (3) of the inputs besides sample and timestep; an exact
    model is compared at every timestep with each, a lossy one takes them in turn.
    threshold: the output SQNR in dB, pooled over all examples, that a lossy model must reach.
    Layers are measured on 64 examples at most, evenly spread.
    Neither model is changed.  Raises ConfigError for a reference that is called otherwise.
    """
    check_module(reference, "reference")
    if not isinstance(model, (Converted, Compiled)):
        raise ConfigError(
            "verify(reference, model): the second is what convert(), fold_timesteps(), load() or "
            f"compile() returned, not a {type(model).__name__}"
        )
    check_whole(batch, "batch", 1)
    if inputs is not None and (conditions, seed) != (None, None):
        raise ConfigError("conditions and seed are of inputs that are drawn; these are given")
    conditions, seed = 3 if conditions is None else conditions, 0 if seed is None else seed
    check_whole(conditions, "conditions", 1)
    check_whole(seed, "seed", 0)
    check_number(threshold, "threshold")
    check_many(inputs, "inputs", "tuples of tensors")
    keys, lossy = _timesteps(model), _is_lossy(model)
    draw = RandomInputs(model.gm, model.call, keys, seed=seed)
    full = _captured(reference, model, draw.example(0, draw.conditions()))
    if inputs is None:
        named = {str(n.target): n for n in full.graph.find_nodes(op="placeholder")}
        draw.rows = {name: rows for name, n in named.items() if (rows := rows_of(full, n))}
        examples = draw_examples(draw, conditions=conditions, every=not lossy)
    elif not (examples := [_example(model.call, values) for values in inputs]):
        raise ConfigError("inputs are empty: leave them out to have some drawn")
    outputs = _compare_outputs(full, model, examples, batch, lossy, progress)
    full = merge_duplicates(full).gm  # as conversion did: values are looked up by name
    causes = _diagnose(full, model, examples, keys, random=inputs is None)
    mine = dict(graph_of(model).named_parameters())
    changed = [
        name
        for name, value in full.named_parameters()
        if name in mine and value.is_floating_point() and not torch.equal(value, mine[name])
    ]
    return Verification(
        exact=not lossy, changed=changed[:_CHANGED], threshold=threshold, **outputs, **causes
    )


def _diagnose(
    full: fx.GraphModule,
    model: Converted | Compiled,
    examples: Sequence[Example],
    keys: Tensor,
    random: bool,
) -> dict[str, Any]:
    """The fields of Verification on features and layers.  random: whether examples are no data."""
    if not isinstance(model, Converted):
        return {"features": [], "sites": []}
    call, gm = model.call, graph_of(model)
    places = torch.linspace(0, len(examples) - 1, min(len(examples), _SITES)).round().long()
    few = batches(call, [examples[place] for place in places.tolist()], _BATCH)
    steps = torch.cat([values[call.timestep_position] for values in few])
    floating = {spec.name for spec in call.inputs if spec.dtype.is_floating_point}
    features = feature_errors(full, gm, keys)
    layers = site_errors(
        full, gm, few, random_conditions=floating.intersection(call.conditions) if random else ()
    )
    alone = [(each.name, *worst(each.alone, steps)) for each in layers]
    return {
        "features": [_summary(feature, keys) for feature in features],
        "sites": sorted(alone, key=lambda site: (not math.isnan(site[1]), site[1])),
        "running": [(each.name, *worst(each.running, steps)) for each in layers],
        "culprits": find_culprits(layers, features, steps=steps, timesteps=keys),
    }


def _summary(feature: FeatureError, timesteps: Tensor) -> tuple[str, float, float, float]:
    """A feature's name, mean and worst error, and the timestep of the worst."""
    errors = feature.errors
    place = int(errors.nan_to_num(nan=math.inf).argmax())
    return feature.name, float(errors.mean()), float(errors[place]), float(timesteps[place])


def _example(call: CallSpec, values: Any) -> Example:
    """One of the inputs to compare on. Raises ConfigError unless there is one value for each
    placeholder that fits it."""
    if not isinstance(values, (tuple, list)) or len(values) != len(call.names):
        count = f"{len(values)} values" if isinstance(values, (tuple, list)) else repr(values)
        raise ConfigError(f"inputs must be tuples ({', '.join(call.names)}), got {count:.80}")
    for spec, value in zip(call.inputs, values, strict=True):
        if not isinstance(value, Tensor) or value.dim() != len(spec.shape):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"inputs: {spec.path} must be a tensor {spec.shape}, got {shape}")
    return list(values)


def graph_of(model: Converted | Compiled) -> fx.GraphModule:
    """The whole graph of `model`; weights that were offloaded are restored."""
    if isinstance(model, Bound) and model.prologue.offloaded.is_away:
        model.prologue.restore()
    return model.gm


def _timesteps(model: Converted | Compiled) -> Tensor:
    """The timesteps to verify over, (K,): those of the model's tables, or of its schedule."""
    keys = model.timesteps
    if keys is None and isinstance(model, Bound) and model.prologue.schedule:
        spec = model.call.inputs[model.call.timestep_position]
        keys = check_timesteps(model.prologue.schedule.values(), spec.dtype).to(model.device)
    if keys is None:
        raise ConfigError("this model has no finite set of timesteps to verify over")
    return keys


def _is_lossy(model: Converted | Compiled) -> bool:
    """Whether anything in a model is rounded or corrected."""
    rounded = (QuantLayer, QuantActivation, QuantTimestepTable)
    return (
        isinstance(model, Compiled)
        or any(isinstance(m, rounded) for m in model.gm.modules())
        or any(name.startswith(CORRECTION) for name, _ in model.gm.named_buffers())
    )


def _captured(
    reference: nn.Module, model: Converted | Compiled, example: Example
) -> fx.GraphModule:
    """The reference as a graph with the same inputs and free sizes."""
    call = model.call
    values = join(call, [example, example])  # of one sample torch would make a constant
    assert values is not None
    samples = call.sizes_of(values).get(BATCH, len(values[call.timestep_position]))
    free = {
        spec.path: {i: size for i, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in call.inputs
    }
    try:
        named = arguments(call, values, samples)
        return capture(reference, named, timestep=call.timestep_path, dynamic=free).gm
    except TypeError as error:
        raise ConfigError(f"the reference takes other inputs than the model: {error}") from error


@torch.no_grad()
def _compare_outputs(
    reference: fx.GraphModule,
    model: Converted | Compiled,
    examples: Sequence[Example],
    batch: int,
    lossy: bool,
    progress: bool,
) -> dict[str, Any]:
    """The fields of Verification on how the outputs differ."""
    position = model.call.timestep_position
    equal, most, relative = True, 0.0, 0.0
    energy: dict[float, Tensor] = {}
    first = batches(model.call, examples, batch) if lossy else examples
    for values in progress_bar(first, "outputs", enabled=progress):
        expected, outputs = reference(*values), model.run(values)
        steps = values[position].tolist()
        _check_alike(expected, outputs, steps)
        for a, b in zip(expected, outputs, strict=True):
            equal &= torch.equal(a, b)
            most = max(most, float((a - b).abs().max()))
            relative = max(relative, _relative(a, b) if lossy else 0.0)
        for t, each in zip(steps, energies(expected[0], outputs[0], len(steps)).T, strict=True):
            energy[float(t)] = energy.get(float(t), 0) + each
    for start in range(0, 0 if lossy else len(examples), batch):
        part = list(examples[start : start + batch])
        part += part[:1] * (batch - len(part))
        wide = join(model.call, part) or join(model.call, part[:1] * batch)
        assert wide is not None
        for a, b in zip(reference(*wide), model.run(wide), strict=True):
            relative = max(relative, _relative(a, b))
    return {
        "equal": equal,
        "difference": (most, relative),
        "steps": {t: float(decibels(energy[t])) for t in sorted(energy)},
        "pooled": pooled(torch.stack(list(energy.values()), 1)),
    }


def _relative(expected: Tensor, output: Tensor) -> float:
    return float((expected - output).norm() / expected.norm().clamp(min=1e-12))


def _check_alike(
    expected: Sequence[Tensor], outputs: Sequence[Tensor], steps: Sequence[float]
) -> None:
    shapes = [[tuple(value.shape) for value in values] for values in (expected, outputs)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"the reference gives outputs of shapes {shapes[0]}, the model of {shapes[1]}: "
            "it was not made from this reference"
        )
    if not all(bool(torch.isfinite(value).all()) for value in expected):
        raise ConfigError(
            f"the reference itself gives NaN or Inf at t={steps[0]:g}: there is nothing to compare "
            "with. Give inputs= that it is used on, or check its weights."
        )
