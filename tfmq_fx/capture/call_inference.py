"""What an example says about calls of a model: its inputs, which sizes are free, what is what."""

from __future__ import annotations

import builtins
import dataclasses
import inspect
import re
from collections.abc import Collection, Mapping
from keyword import kwlist
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.graph import _custom_builtins as _GLOBALS

from tfmq_fx.core.errors import CaptureError, ConfigError

from .call_spec import Argument, CallSpec
from .input_checks import BATCH, Input, plain_number
from .nested_values import Const, Leaf, Structure, outline, per_sample

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "time_step", "time_cond", "noise_level")
_SPATIAL = "spatial"
_TEXT = "text"
# Inputs that have a row for each token of the text, and the dim of the tokens.
_TEXT_DIMS = {
    "encoder_hidden_states": 1,
    "encoder_attention_mask": 1,
    "encoder_hidden_states_mask": 1,
    "txt_ids": -2,
}
_KNOWN = {BATCH, _SPATIAL, _TEXT}
_STEPWISE = ("residual", "block_samples")  # in the names of what a ControlNet adds at every step

Dynamic = Collection[str] | Mapping[str, Mapping[int, str]]


def describe_call(
    model: nn.Module, example_inputs: Mapping[str, Any], timestep: str, dynamic: Dynamic
) -> tuple[CallSpec, list[Tensor]]:
    """How forward is called, its output left open, and the example's tensors in order.

    Arguments as for `capture`; free sizes of one are two in the tensors.  Raises ConfigError for
    names that are not there, CaptureError for a timestep that does not fit the sample.
    """
    if not isinstance(dynamic, Mapping) and (wrong := set(dynamic) - _KNOWN):
        raise ConfigError(
            f"dynamic: unknown {sorted(wrong)}; known are {', '.join(sorted(_KNOWN))}"
        )
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind is not parameter.VAR_POSITIONAL
    }
    catch_all = [n for n, p in parameters.items() if p.kind is p.VAR_KEYWORD]
    for name in catch_all:
        del parameters[name]
    given = dict(example_inputs)
    unknown = [name for name in given if name not in parameters]
    if unknown and not catch_all:
        raise ConfigError(
            f"example_inputs: forward has no {', '.join(map(repr, unknown))}; it takes "
            f"{', '.join(parameters)}"
        )
    if timestep not in given:
        raise ConfigError(
            f"timestep={timestep!r} is not among the example inputs {', '.join(given)}"
        )
    for name in unknown:
        parameters[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
    return_dict = None
    if "return_dict" in parameters:
        return_dict = parameters["return_dict"].default is not False
    given.pop("return_dict", None)

    declared: list[Argument] = []
    leaves: list[tuple[str, Any]] = []
    for name, parameter in parameters.items():
        default = parameter.default
        structure: Structure = Const(default)
        found: list[tuple[str, Any]] = []
        omittable = True
        if name == "return_dict":
            pass
        elif name == timestep:
            structure, found, omittable = Leaf(0), [(name, given[name])], False
        elif name in given:
            structure, found = outline(given[name], name)
            omittable = not found and default is not parameter.empty
            omittable = omittable and structure == outline(default, name)[0]
        elif default is parameter.empty:
            raise ConfigError(f"example_inputs: forward needs {name!r}")
        else:
            structure = outline(default, name)[0]
        positional = parameter.kind is not parameter.KEYWORD_ONLY
        declared.append(Argument(name, structure, len(leaves), positional, omittable))
        leaves += found
    paths = [path for path, _ in leaves]
    at = paths.index(timestep)
    values = [value for _, value in leaves]
    sample = _sample(paths, values, at)
    rows = 0 if sample is None else values[sample].shape[0]
    tensors = _tensors(values, at, sample)
    free = (
        _named_sizes(paths, tensors, at, dynamic)
        if isinstance(dynamic, Mapping)
        else _usual_sizes(paths, tensors, sample, dynamic)
    )
    inputs = _inputs(paths, tensors, free)
    tensors = [_doubled(tensor, sizes) for tensor, sizes in zip(tensors, free, strict=True)]
    if sample is not None and inputs[sample].shape[0] == BATCH:
        declared = [
            dataclasses.replace(argument, structure=per_sample(argument.structure, rows))
            for argument in declared
        ]
    call = CallSpec(
        tuple(declared),
        inputs,
        inputs[at].name,
        Const(None),
        return_dict,
        conditions=_conditions(inputs, at, sample),
    )
    return call, tensors


def _conditions(inputs: tuple[Input, ...], timestep: int, sample: int | None) -> tuple[str, ...]:
    """The inputs that are fixed for a whole request, judged by name: all but the sample (the first
    argument, where it is a list), timesteps and what another network computes at every step."""
    others = [spec for i, spec in enumerate(inputs) if i != timestep]
    paths = [spec.path.split(".")[0] for spec in others]
    denoised = inputs[sample].path if sample is not None else next(iter(paths), "")
    return tuple(
        spec.name
        for spec, path in zip(others, paths, strict=True)
        if path != denoised
        and path not in TIMESTEP_NAMES
        and not any(word in path for word in _STEPWISE)
    )


def _sample(paths: list[str], values: list[Any], timestep: int) -> int | None:
    """The input whose dim 0 is the batch: the first image-like one, else the one with most dims.

    Not an element of a list, where each sample is a tensor of its own."""
    found = {
        i: value
        for i, (path, value) in enumerate(zip(paths, values, strict=True))
        if i != timestep
        and isinstance(value, Tensor)
        and value.ndim
        and not re.search(r"\.\d+(\.|$)", path)
    }
    images = [i for i, value in found.items() if value.ndim >= 4]
    if images:
        return images[0]
    return max(found, key=lambda i: found[i].ndim, default=None)


def _tensors(values: list[Any], timestep: int, sample: int | None) -> list[Tensor]:
    """The example's tensors, the timestep made a tensor (batch,)."""
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
            f"of the {batch} samples, or one for all"
        )
    tensors = [value.detach() if isinstance(value, Tensor) else value for value in values]
    device = t.device if sample is None else tensors[sample].device
    row = t.detach().reshape(-1).to(device)
    tensors[timestep] = row if len(row) == batch else row[:1].expand(batch).contiguous()
    return tensors


def _doubled(tensor: Tensor, free: Mapping[int, str]) -> Tensor:
    """`tensor` with two of what it has one of where that is free: torch fixes sizes of one."""
    times = [2 if i in free and size == 1 else 1 for i, size in enumerate(tensor.shape)]
    return tensor.repeat(times) if 2 in times else tensor


def _rows(value: Any) -> int | None:
    return value.shape[0] if isinstance(value, Tensor) and value.ndim else None


def _inputs(
    paths: list[str], tensors: list[Tensor], free: list[dict[int, str]]
) -> tuple[Input, ...]:
    inputs: list[Input] = []
    for path, tensor, sizes in zip(paths, tensors, free, strict=True):
        shape = tuple(sizes.get(i, size) for i, size in enumerate(tensor.shape))
        name = re.sub(r"\W", "_", path)
        if _is_taken(name) or name in {spec.name for spec in inputs}:
            name = f"{name}_{len(inputs)}"
        inputs.append(Input(name, path, shape, tensor.dtype, tensor.device.type))
    return tuple(inputs)


def _is_taken(name: str) -> bool:
    """Whether the code of a graph may use the name for something else than an argument."""
    used = {*kwlist, *dir(builtins), *_GLOBALS, "self", "math", "operator"} - {"input"}
    return name in used


def _usual_sizes(
    paths: list[str], tensors: list[Tensor], sample: int | None, dynamic: Collection[str]
) -> list[dict[int, str]]:
    """Dim -> name of the size, for each input, of the sizes that `dynamic` frees."""
    free: list[dict[int, str]] = [{} for _ in tensors]
    if sample is None:
        return free
    shape = tensors[sample].shape
    for sizes, tensor in zip(free, tensors, strict=True):
        if BATCH in dynamic and _rows(tensor) == shape[0]:
            sizes[0] = BATCH
        if _SPATIAL not in dynamic:
            continue
        if len(shape) >= 4:
            if tensor.ndim >= 4 and tensor.shape[-2:] == shape[-2:]:
                sizes |= {tensor.ndim - 2: "height", tensor.ndim - 1: "width"}
        elif len(shape) == 3:
            same = [i for i in range(min(tensor.ndim - 1, 2)) if tensor.shape[i] == shape[1]]
            sizes |= {i: "tokens" for i in same if i not in sizes}
    if _TEXT in dynamic:
        _free_text(paths, tensors, free)
    return free


def _free_text(paths: list[str], tensors: list[Tensor], free: list[dict[int, str]]) -> None:
    """Free the tokens of the text, where the example has as many in all inputs that hold them."""
    dims = {i: _TEXT_DIMS[path] for i, path in enumerate(paths) if path in _TEXT_DIMS}
    dims = {i: dim % tensors[i].ndim for i, dim in dims.items() if tensors[i].ndim >= 2}
    counts = {tensors[i].shape[dim] for i, dim in dims.items()}
    if len(counts) == 1 and counts != {1}:
        for i, dim in dims.items():
            free[i][dim] = _TEXT


def _named_sizes(
    paths: list[str], tensors: list[Tensor], timestep: int, dynamic: Mapping[str, Mapping[int, str]]
) -> list[dict[int, str]]:
    """As the user named them; the timestep has the batch of the others."""
    if unknown := [path for path in dynamic if path not in paths]:
        raise ConfigError(f"dynamic: no input {unknown[0]!r}; choose from {', '.join(paths)}")
    found: dict[str, int] = {}
    for path, sizes in dynamic.items():
        tensor = tensors[paths.index(path)]
        for dim, name in sizes.items():
            if not (0 <= dim < tensor.ndim and name.isidentifier()):
                raise ConfigError(f"dynamic: {path} {tuple(tensor.shape)} has no {dim}: {name!r}")
            size = found.setdefault(name, tensor.shape[dim])
            if size != tensor.shape[dim]:
                raise ConfigError(
                    f"dynamic: {name} is {size} in one input and {tensor.shape[dim]} in {path}"
                )
    free = [dict(dynamic.get(path, {})) for path in paths]
    if BATCH in found and tensors[timestep].shape[0] == found[BATCH]:
        free[timestep] = {0: BATCH}
    return free
