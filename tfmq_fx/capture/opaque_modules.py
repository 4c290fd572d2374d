"""Trace a model whose code depends on data in part, with some of its modules called as they are.

The model is run once and again with hooks on those modules, which tell what they return; a module
that draws random numbers, writes to its inputs or keeps state cannot be called from a graph.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from tfmq_fx.core.errors import CaptureError
from tfmq_fx.ir.graph import OPAQUE
from tfmq_fx.ir.held_values import checks

from .call_spec import CallSpec
from .data_dependence import Allowances, DataDependent, OpaqueCall, Unfit
from .nested_values import Branch, Const, Structure, outline
from .replay import forked_rng, other_sizes, random_inputs, structural_clone

T = TypeVar("T")
_TRIES = 32  # allowances that are made one after the other
_SIZES = 4  # other sizes at which the model is tried


def trace_in_part(
    model: nn.Module,
    call: CallSpec,
    examples: list[Tensor],
    trace: Callable[[Allowances], T],
) -> tuple[T, Allowances]:
    """What `trace` returns for the fewest allowances with which it succeeds, and these.

    Raises CaptureError where no allowances help.
    """
    if any(t.is_meta for t in (*examples, *model.parameters(), *model.buffers())):
        raise CaptureError("what depends on data cannot be told on the meta device, without data")
    named = dict(zip(call.names, examples, strict=True))
    allowed = Allowances(named, frozenset(call.conditions))
    last: CaptureError | None = None
    for _ in range(_TRIES):
        try:
            allowed = _observed(model, call, examples, allowed)
            return trace(allowed), allowed
        except Unfit as error:
            allowed, last = allowed.without(error.path, error.reason), error
        except DataDependent as error:
            wider, last = allowed.widened(model, error), error
            if wider is None:
                raise
            allowed = wider
    raise CaptureError(f"{last}; so it was after {_TRIES} tries")


def remarks(gm: fx.GraphModule) -> list[str]:
    """What a graph keeps of code that depends on data, in words for a report."""
    alike: dict[str, list[str]] = {}
    for path, why in gm.meta[OPAQUE].items():
        alike.setdefault(why, []).append(path)
    opaque = [
        f"opaque, runs as the model's own code: {', '.join(paths)}, since {why}"
        for why, paths in alike.items()
    ]
    held = [
        f"captured where {node.args[2] or 'its weights'} gives the example's value of what is read "
        f"at {node.args[3]}; another raises InputError"
        for node in checks(gm)
    ]
    return [*opaque, *dict.fromkeys(held)]


def _observed(
    model: nn.Module, call: CallSpec, examples: list[Tensor], allowed: Allowances
) -> Allowances:
    """The allowances with what was observed of calls of the opaque modules."""
    if set(allowed.calls) == set(allowed.opaque):
        return allowed
    sizes = call.sizes_of(examples)
    first = _Observed(model, call, examples, allowed, sizes, seed=0)
    again = _Observed(model, call, examples, allowed, sizes, seed=1)
    for path, calls in first.calls.items():
        if [seen.outputs for seen in calls] != [seen.outputs for seen in again.calls[path]]:
            raise Unfit(path, "the sizes of what it returns depend on data")
    others: _Observed | None = None
    for other in itertools.islice(other_sizes(call, sizes), _SIZES):
        try:
            others = _Observed(model, call, examples, allowed, other, seed=2)
        except Unfit:
            raise
        except Exception:  # the model cannot be called at these sizes: whatever it raises
            continue
        if all(len(others.calls[path]) == len(calls) for path, calls in first.calls.items()):
            break
        others = None
    merged = {}
    for path, calls in first.calls.items():
        there = calls if others is None else others.calls[path]
        merged[path] = tuple(
            _joined(seen, None if others is None else second)
            for seen, second in zip(calls, there, strict=True)
        )
    return dataclasses.replace(allowed, calls=merged)


def _joined(seen: OpaqueCall, second: OpaqueCall | None) -> OpaqueCall:
    if second is None:
        return seen
    return dataclasses.replace(
        seen,
        inputs=(seen.inputs[0], second.inputs[0]),
        outputs=(seen.outputs[0], second.outputs[0]),
    )


class _Observed:
    """The calls of opaque modules in one run of a model, by path.

    Raises Unfit for a module that cannot be called from a graph, and what the model raises.
    """

    def __init__(
        self,
        model: nn.Module,
        call: CallSpec,
        examples: list[Tensor],
        allowed: Allowances,
        sizes: Mapping[str, int],
        seed: int,
    ) -> None:
        clone = structural_clone(model)
        self.calls: dict[str, list[OpaqueCall]] = {path: [] for path in allowed.opaque}
        self._before: list[Any] = []
        for path in allowed.opaque:
            module = clone.get_submodule(path)
            module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
            module.register_forward_hook(self._leave(path), with_kwargs=True)
        kwargs = random_inputs(call, examples, dict(sizes), seed, True, allowed.conditions)
        with torch.no_grad(), forked_rng(examples):
            clone(**kwargs)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._before.append(_state(module, _tensors((args, kwargs))))

    def _leave(self, path: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            inputs = _tensors((args, kwargs))
            for what, before, now in zip(
                ("draws random numbers", "writes to its inputs", "changes its own state"),
                self._before.pop(),
                _state(module, inputs),
                strict=True,
            ):
                if before != now:
                    raise Unfit(path, f"it {what}")
            self.calls[path].append(_call_of(path, inputs, result))

        return leave


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _state(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Any, Any, Any]:
    """What a call of a module may not change: random state, inputs, and what modules hold."""
    random = [torch.random.get_rng_state().tolist()]
    if torch.cuda.is_initialized():
        random += [state.tolist() for state in torch.cuda.get_rng_state_all()]
    held = [
        (path, name, id(value))
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if not name.startswith("_")
    ]
    buffers = [(name, id(value), value._version) for name, value in module.named_buffers()]
    return random, [value._version for value in inputs], (held, buffers)


def _call_of(path: str, inputs: Sequence[Tensor], result: Any) -> OpaqueCall:
    """The record of a call; raises Unfit for results that no graph can hold."""
    structure, leaves = outline(result)
    _check_structure(path, structure)
    values = [value for _, value in leaves]
    same = [next((i for i, x in enumerate(inputs) if x is value), None) for value in values]
    memory = {x.untyped_storage()._cdata for x in inputs}
    for value, known in zip(values, same, strict=True):
        if known is None and value.untyped_storage()._cdata in memory:
            raise Unfit(path, "what it returns shares memory with its inputs")
    return OpaqueCall(
        (tuple(tuple(x.shape) for x in inputs), None),
        (tuple(tuple(x.shape) for x in values), None),
        structure,
        tuple((x.dtype, x.device) for x in values),
        tuple(x.stride() for x in values),
        tuple(same),
    )


def _check_structure(path: str, structure: Structure) -> None:
    if isinstance(structure, Branch):
        if structure.kind not in ("tuple", "list"):
            raise Unfit(path, f"it returns a {structure.kind}, not tensors")
        for child in structure.children:
            _check_structure(path, child)
    elif isinstance(structure, Const) and structure.value is not None:
        raise Unfit(path, f"it returns {structure.value!r:.40}, which is no tensor")
