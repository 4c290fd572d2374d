"""Replay a captured graph at several sizes, where it must equal its model exactly."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.core.errors import CaptureError, InputError
from tfmq_fx.ir.graph import same_memory
from tfmq_fx.ir.held_values import EXAMPLES, repeated

from .call_spec import CallSpec
from .input_checks import BATCH
from .nested_values import outline, rebuild

log = logging.getLogger(__name__)


def structural_clone(model: nn.Module) -> nn.Module:
    """A copy of the module tree in eval mode that shares the model's memory.

    Parameters of the copy are objects of their own with the model's requires_grad, by which torch
    chooses matrix kernels.
    """
    try:
        return copy.deepcopy(model, same_memory(model)).eval()
    except (TypeError, RuntimeError) as error:
        raise CaptureError(f"{type(model).__name__} cannot be copied: {error}") from error


def arguments(call: CallSpec, values: list[Any], samples: int) -> dict[str, Any]:
    """The keyword arguments of forward with `values` as its tensors, for a batch of `samples`."""
    values = call.as_taken(values)
    return {
        argument.name: rebuild(argument.structure, values[argument.first :], samples)
        for argument in call.arguments
        if argument.name != "return_dict"
    }


def model_error(model: nn.Module, call: CallSpec, examples: list[Tensor]) -> Exception | None:
    """The error that the model raises at the example's sizes in a first or second call, if any."""
    reference, sizes = structural_clone(model), call.sizes_of(examples)
    with torch.no_grad(), forked_rng(examples):
        for seed in (0, 1):
            try:
                reference(**random_inputs(call, examples, sizes, seed, True))
            except Exception as error:
                return error
    return None


def replay(
    model: nn.Module, gm: fx.GraphModule, call: CallSpec, examples: list[Tensor]
) -> list[str]:
    """Notes on a replay of graph and model; raises CaptureError unless they are exactly equal."""
    if any(t.is_meta for t in (*examples, *model.parameters(), *model.buffers())):
        return ["not replayed: tensors on the meta device have no data"]
    sizes = call.sizes_of(examples)
    if not _equal(model, gm, call, examples, sizes, seed=0):
        error = model_error(model, call, examples)
        raise CaptureError(
            f"at the example's sizes {sizes}: {type(model).__name__} cannot be called twice "
            f"itself: {type(error).__name__}: {error}"
        )
    for n, others in enumerate(other_sizes(call, sizes), start=1):
        if _equal(model, gm, call, examples, others, seed=n):
            return []
    return [f"replayed at {sizes} only: no other size that the guards allow could be run"]


def forked_rng(examples: list[Tensor]) -> AbstractContextManager[None]:
    return torch.random.fork_rng([value.device for value in examples if value.is_cuda][:1])


def other_sizes(call: CallSpec, sizes: dict[str, int]) -> Iterator[dict[str, int]]:
    """Sizes other than the example's that the guards allow; first those that change every size."""
    images: list[dict[str, int]] = [{}]
    others = {name: n + 8 for name, n in sizes.items() if name not in (BATCH, "height", "width")}
    if "height" in sizes and "width" in sizes:
        h, w = sizes["height"], sizes["width"]
        images = [
            {"height": h + 8, "width": w + 16},  # not square, so that neither replaces the other
            {"height": 2 * h, "width": 3 * w},
            {"height": h + 8, "width": w + 8},
            {"height": h // 2, "width": w // 2},
            {},
        ]
    if others:
        images = [{**image, **others} for image in images] + images
    batches = [{BATCH: n} for n in (3, 4, 5)] if BATCH in sizes else []
    for change in [{**batch, **image} for image in images for batch in (*batches, {})]:
        tried = {**sizes, **change}
        if tried != sizes and all(guard.allows(tried) for guard in call.guards):
            yield tried


def _equal(
    model: nn.Module,
    gm: fx.GraphModule,
    call: CallSpec,
    examples: list[Tensor],
    sizes: dict[str, int],
    seed: int,
) -> bool:
    """Compare graph and model on random inputs; return False if the model fails at these sizes."""
    want_dict = seed == 0
    held = gm.meta.get(EXAMPLES, ())
    kwargs = random_inputs(call, examples, sizes, seed, want_dict, held)
    reference = structural_clone(model)
    with torch.no_grad(), forked_rng(examples):
        try:
            if seed == 0:  # state that one call leaves must not change the next
                reference(**random_inputs(call, examples, sizes, seed - 1, want_dict, held))
            torch.manual_seed(seed)
            expected = reference(**kwargs)
        except Exception as error:
            log.debug("%s cannot run at %s: %s", type(model).__name__, sizes, error)
            return False
        torch.manual_seed(seed)
        # again: the model may have taken things out of its lists and dicts
        again = random_inputs(call, examples, sizes, seed, want_dict, held)
        bound, _ = call.bind((), again)
        try:
            actual = call.rebuild(gm(*bound), want_dict)
        except InputError as error:  # a held value is another at these sizes
            log.debug("the graph refuses %s: %s", sizes, error)
            return False
        except Exception as error:
            raise CaptureError(
                f"replay at {sizes}: the model runs, its graph raises {type(error).__name__}: "
                f"{str(error).partition(chr(10))[0]}"
            ) from error
    _compare(expected, actual, sizes)
    return True


def random_inputs(
    call: CallSpec,
    examples: list[Tensor],
    sizes: dict[str, int],
    seed: int,
    want_dict: bool,
    held: Collection[str] = (),
) -> dict[str, Any]:
    """Random arguments of forward at `sizes`; the inputs `held` have the example's values."""
    generator = torch.Generator().manual_seed(seed)
    values = []
    for spec, example in zip(call.inputs, examples, strict=True):
        shape = [sizes[s] if isinstance(s, str) else s for s in spec.shape]
        value = _random(example, shape, generator)
        values.append(repeated(example, shape) if spec.name in held else value)
    t = call.timestep_position
    values[t] = _timesteps(examples[t], len(values[t]), seed)
    kwargs = arguments(call, values, sizes.get(BATCH, len(values[t])))
    if call.return_dict is not None:
        kwargs["return_dict"] = want_dict
    return kwargs


def _random(example: Tensor, shape: list[int], generator: torch.Generator) -> Tensor:
    """Noise for a floating example, else elements of the example, which are legal values."""
    if example.dtype.is_floating_point or example.dtype.is_complex:
        dtype = torch.complex64 if example.dtype.is_complex else torch.float32
        return torch.randn(shape, generator=generator, dtype=dtype).to(example)
    picks = torch.randint(max(example.numel(), 1), shape, generator=generator)
    return example.flatten()[picks.to(example.device)]


def _timesteps(example: Tensor, batch: int, seed: int) -> Tensor:
    """Timesteps up to the example's largest (at least 1), different from row to row."""
    top = max(float(example.max()), 1.0)
    steps = torch.arange(batch, dtype=torch.float64) * 0.37 + 0.29 * (seed + 1)
    steps = steps % 1.0 * top
    if not example.dtype.is_floating_point:
        steps = steps.round()
    return steps.to(example)


def _compare(expected: Any, actual: Any, sizes: dict[str, int]) -> None:
    """Raise CaptureError unless two outputs are equal bit for bit."""
    model_form, model_leaves = outline(expected)
    graph_form, graph_leaves = outline(actual)
    if model_form != graph_form:
        raise CaptureError(
            f"replay at {sizes}: the model returns {model_form}, the graph {graph_form}"
        )
    for (path, a), (_, b) in zip(model_leaves, graph_leaves, strict=True):
        if (
            a.shape != b.shape
            or a.dtype != b.dtype
            or not torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all()
        ):
            raise CaptureError(
                f"replay at {sizes}: output {path or 'tensor'} of the graph differs from the "
                f"model's ({tuple(b.shape)} {b.dtype} against {tuple(a.shape)} {a.dtype}). The "
                f"model does something that a trace does not see, such as numpy, a cache kept "
                f"between calls, or a context manager."
            )
