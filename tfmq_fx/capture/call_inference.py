"""Infer from an example how a model is called: its inputs, free sizes, timestep and conditions."""

from __future__ import annotations

import builtins
import dataclasses
import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from keyword import kwlist
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.graph import _custom_builtins as _GLOBALS

from tfmq_fx.core.errors import CaptureError, ConfigError

from .call_spec import Argument, CallSpec
from .input_checks import BATCH, Input, largest, plain_number
from .nested_values import Const, Leaf, outline, per_sample

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "time_step", "time_cond", "noise_level")
_SPATIAL = "spatial"
_TEXT = "text"
_FRAMES = "frames"
USUAL = (BATCH, _TEXT, _SPATIAL, _FRAMES)  # what is free unless the user says otherwise
# Inputs with a row for each token of the text -> the dim of the tokens.
_TEXT_DIMS = {
    "encoder_hidden_states": 1,
    "encoder_attention_mask": 1,
    "encoder_hidden_states_mask": 1,
    "txt_ids": -2,
}
# Names that the code of a graph may use for other things than arguments.
_RESERVED = {*kwlist, *dir(builtins), *_GLOBALS, "self", "math", "operator"} - {"input"}
_STEPWISE = ("residual", "block_samples")  # in names of inputs that a ControlNet adds at each step

Dynamic = Collection[str] | Mapping[str, Mapping[int, str]]


def describe_call(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    timestep: str,
    dynamic: Dynamic,
    form: tuple[int, ...] | None = None,
) -> tuple[CallSpec, list[Tensor]]:
    """The CallSpec of a model, without its output, and the example's tensors in order.

    Arguments as for `capture`; free sizes of one are doubled in the tensors.  form: the shape in
    which forward gets the timestep (see CallSpec), () where a row of them fails; None: as in the
    example.  A timestep for each token is an input like any other, and the largest of each sample
    becomes the timestep of the graph, as a last input that nothing reads.  Raises ConfigError for
    unknown names, CaptureError for a timestep that does not fit the sample.
    """
    if not isinstance(dynamic, Mapping) and (unknown := set(dynamic) - set(USUAL)):
        raise ConfigError(f"dynamic: unknown {sorted(unknown)}; known are {', '.join(USUAL)}")
    parameters = _parameters(model, example_inputs)
    if timestep not in example_inputs:
        raise ConfigError(
            f"timestep={timestep!r} is not among the example inputs {', '.join(example_inputs)}"
        )
    arguments, leaves = _arguments(parameters, example_inputs, timestep)
    paths, values = [path for path, _ in leaves], [value for _, value in leaves]
    t, per_token = paths.index(timestep), None
    sample = _sample(paths, values, t)
    values[t] = given = plain_number(values[t])
    if isinstance(given, Tensor) and given.shape[1:].numel() > 1:
        per_token, t = t, len(paths)
        paths.append(f"{timestep}.largest")
        values.append(largest(given))
    elif isinstance(given, Tensor) and given.dim() > 1:
        values[t] = given.flatten()
        form = (-1, *given.shape[1:]) if form is None else form
    tensors = _tensors(values, t, sample)
    if form == ():
        tensors[t] = tensors[t][:1]
    if isinstance(dynamic, Mapping):
        free = _named_sizes(paths, tensors, t, dynamic)
    else:
        shape = () if sample is None else tensors[sample].shape
        free = _usual_sizes(paths, tensors, sample, dynamic, _frames_dim(model, shape))
    if form == ():
        free[t] = {}
    inputs = _inputs(paths, tensors, free)
    if sample is not None and inputs[sample].shape[0] == BATCH:
        rows = len(tensors[sample])
        arguments = [
            dataclasses.replace(argument, structure=per_sample(argument.structure, rows))
            for argument in arguments
        ]
    call = CallSpec(
        tuple(arguments),
        inputs,
        inputs[t].name,
        output=Const(None),
        return_dict=parameters["return_dict"].default is not False
        if "return_dict" in parameters
        else None,
        conditions=_conditions(inputs, [t, per_token], sample),
        timestep_form=(-1,) if form is None else form,
        per_token=None if per_token is None else inputs[per_token].name,
    )
    return call, [_doubled(tensor, sizes) for tensor, sizes in zip(tensors, free, strict=True)]


def _parameters(model: nn.Module, names: Collection[str]) -> dict[str, inspect.Parameter]:
    """The parameters of forward by name, with those of `names` that its **kwargs takes."""
    parameters = dict(inspect.signature(model.forward).parameters)
    kinds = {parameter.kind for parameter in parameters.values()}
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = {name: p for name, p in parameters.items() if p.kind not in variable}
    unknown = [name for name in names if name not in parameters]
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise ConfigError(
            f"example_inputs: forward has no {', '.join(map(repr, unknown))}; it takes "
            f"{', '.join(parameters)}"
        )
    keyword = inspect.Parameter.KEYWORD_ONLY
    return parameters | {name: inspect.Parameter(name, keyword) for name in unknown}


def _arguments(
    parameters: Mapping[str, inspect.Parameter], example_inputs: Mapping[str, Any], timestep: str
) -> tuple[list[Argument], list[tuple[str, Any]]]:
    """The arguments of forward, and their tensors (and the timestep) by dotted path."""
    arguments: list[Argument] = []
    leaves: list[tuple[str, Any]] = []
    for name, parameter in parameters.items():
        default, tensors = parameter.default, list[tuple[str, Any]]()
        structure, omittable = outline(default, name)[0], True
        if name == timestep:
            structure, tensors, omittable = Leaf(0), [(name, example_inputs[name])], False
        elif name in example_inputs and name != "return_dict":
            usual = structure
            structure, tensors = outline(example_inputs[name], name)
            omittable = not tensors and default is not parameter.empty and structure == usual
        elif default is parameter.empty and name != "return_dict":
            raise ConfigError(f"example_inputs: forward needs {name!r}")
        positional = parameter.kind is not parameter.KEYWORD_ONLY
        arguments.append(Argument(name, structure, len(leaves), positional, omittable))
        leaves += tensors
    return arguments, leaves


def _conditions(
    inputs: tuple[Input, ...], timesteps: Sequence[int | None], sample: int | None
) -> tuple[str, ...]:
    """The names of the inputs that are fixed for a whole request, judged by their paths.

    These are all but the sample (or the first argument, where it is a list), timesteps and what
    another network computes at every step.
    """
    paths = {
        spec.name: spec.path.split(".")[0] for i, spec in enumerate(inputs) if i not in timesteps
    }
    denoised = inputs[sample].path if sample is not None else next(iter(paths.values()), "")
    stepwise = {denoised, *TIMESTEP_NAMES}
    return tuple(
        name
        for name, path in paths.items()
        if path not in stepwise and not any(word in path for word in _STEPWISE)
    )


def _sample(paths: list[str], values: list[Any], timestep: int) -> int | None:
    """The index of the input whose dim 0 is the batch: the first image, else one with most dims.

    Elements of lists do not count: there, each sample is a tensor of its own.
    """
    ndims = {
        i: min(value.ndim, 4)
        for i, (path, value) in enumerate(zip(paths, values, strict=True))
        if i != timestep
        and isinstance(value, Tensor)
        and value.ndim
        and not re.search(r"\.\d+(\.|$)", path)
    }
    return max(ndims, key=ndims.__getitem__, default=None)  # of equal ones the first


def _tensors(values: list[Any], timestep: int, sample: int | None) -> list[Tensor]:
    """The example's tensors, with the timestep as a tensor (batch,)."""
    t = plain_number(values[timestep])
    if isinstance(t, bool) or not isinstance(t, (int, float, Tensor)):
        raise ConfigError(f"the timestep must be a number or a tensor, got {type(t).__name__}")
    if not isinstance(t, Tensor):
        t = torch.tensor(t, dtype=torch.int64 if isinstance(t, int) else torch.float32)
    batch = max(t.numel(), 1) if sample is None else values[sample].shape[0]
    if batch == 0:
        raise ConfigError("example_inputs: the batch is empty; give one sample at least")
    if t.ndim > 1 or t.numel() not in (1, batch) or t.dtype == torch.bool:
        raise CaptureError(
            f"the timestep has shape {tuple(t.shape)} and {t.dtype}; expected one number for each "
            f"of the {batch} samples, one for all, or (batch, tokens) with one for each token"
        )
    tensors = [value.detach() if isinstance(value, Tensor) else value for value in values]
    device = t.device if sample is None else tensors[sample].device
    row = t.detach().reshape(-1).to(device)
    tensors[timestep] = row if len(row) == batch else row[:1].expand(batch).contiguous()
    return tensors


def _doubled(tensor: Tensor, free: Mapping[int, str]) -> Tensor:
    """The tensor, repeated along free dims of size one, since torch would fix those."""
    times = [2 if i in free and size == 1 else 1 for i, size in enumerate(tensor.shape)]
    return tensor.repeat(times) if 2 in times else tensor


def _inputs(
    paths: list[str], tensors: list[Tensor], free: list[dict[int, str]]
) -> tuple[Input, ...]:
    inputs: list[Input] = []
    for path, tensor, sizes in zip(paths, tensors, free, strict=True):
        shape = tuple(sizes.get(i, size) for i, size in enumerate(tensor.shape))
        name = re.sub(r"\W", "_", path)
        if name in _RESERVED or name in {spec.name for spec in inputs}:
            name = f"{name}_{len(inputs)}"
        inputs.append(Input(name, path, shape, tensor.dtype, tensor.device.type))
    return tuple(inputs)


def _usual_sizes(
    paths: list[str],
    tensors: list[Tensor],
    sample: int | None,
    dynamic: Collection[str],
    frames: int,
) -> list[dict[int, str]]:
    """The free sizes of each input, dim -> name, for `dynamic` as a collection of kinds.

    frames: the dim of the frames in a video (batch, ..., height, width).
    """
    free: list[dict[int, str]] = [{} for _ in tensors]
    if sample is None:
        return free
    shape = tensors[sample].shape
    for sizes, tensor in zip(free, tensors, strict=True):
        if BATCH in dynamic and tensor.shape[:1] == shape[:1]:
            sizes[0] = BATCH
        if _SPATIAL not in dynamic:
            continue
        if len(shape) >= 4:
            if tensor.ndim >= 4 and tensor.shape[-2:] == shape[-2:]:
                sizes |= {tensor.ndim - 2: "height", tensor.ndim - 1: "width"}
        elif len(shape) == 3:
            same = [i for i in range(min(tensor.ndim - 1, 2)) if tensor.shape[i] == shape[1]]
            sizes |= {i: "tokens" for i in same if i not in sizes}
    if _FRAMES in dynamic and len(shape) == 5 and shape[frames] > 1:
        for sizes, tensor in zip(free, tensors, strict=True):
            if tensor.ndim == 5 and tensor.shape[frames] == shape[frames]:
                sizes[frames] = _FRAMES
    dims = {i: _TEXT_DIMS[path] for i, path in enumerate(paths) if path in _TEXT_DIMS}
    dims = {i: dim % tensors[i].ndim for i, dim in dims.items() if tensors[i].ndim >= 2}
    counts = {tensors[i].shape[dim] for i, dim in dims.items()}
    if _TEXT in dynamic and len(counts) == 1 and counts != {1}:  # as many tokens in all inputs
        for i, dim in dims.items():
            free[i][dim] = _TEXT
    return free


def _frames_dim(model: nn.Module, shape: Sequence[int]) -> int:
    """The dim of the frames in a video of this shape: before the channels, or behind them."""
    channels = getattr(getattr(model, "config", None), "in_channels", None)
    return 1 if len(shape) == 5 and shape[2] == channels != shape[1] else 2


def _named_sizes(
    paths: list[str], tensors: list[Tensor], timestep: int, dynamic: Mapping[str, Mapping[int, str]]
) -> list[dict[int, str]]:
    """The free sizes of each input, dim -> name, as the user named them; the timestep gets the
    batch of the others."""
    if unknown := [path for path in dynamic if path not in paths]:
        raise ConfigError(f"dynamic: no input {unknown[0]!r}; choose from {', '.join(paths)}")
    named: dict[str, int] = {}
    for path, sizes in dynamic.items():
        tensor = tensors[paths.index(path)]
        for dim, name in sizes.items():
            if not (0 <= dim < tensor.ndim and name.isidentifier()):
                raise ConfigError(f"dynamic: {path} {tuple(tensor.shape)} has no {dim}: {name!r}")
            size = named.setdefault(name, tensor.shape[dim])
            if size != tensor.shape[dim]:
                raise ConfigError(
                    f"dynamic: {name} is {size} in one input and {tensor.shape[dim]} in {path}"
                )
    free = [dict(dynamic.get(path, {})) for path in paths]
    if named.get(BATCH) == len(tensors[timestep]):
        free[timestep] = {0: BATCH}
    return free
