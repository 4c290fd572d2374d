"""Find which sizes a captured graph leaves free, and which inputs have a row for each sample."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.ir.binding_times import Binding, binding_times
from tfmq_fx.ir.graph import timestep_node
from tfmq_fx.ir.node_info import is_heavy

from .call_spec import CallSpec, Guard
from .input_checks import BATCH, Input
from .nested_values import Expression

Free = dict[str, dict[int, str]]
_TRIED = 8  # sizes beyond twice the example's at which a guard is tried


def held_sizes(call: CallSpec, examples: Sequence[Tensor]) -> dict[str, str]:
    """The free sizes that a guard fixes to the example's, with the guard in words."""
    sizes = call.sizes_of(examples)
    reasons: dict[str, str] = {}
    for guard in call.guards:
        names = _names(guard.expression)
        if len(names) == 1:
            (name,) = names
            if name in sizes and _holds_to(guard, name, sizes[name]):
                reasons.setdefault(name, f"{guard.text} is {guard.holds} ({guard.source})")
    return reasons


def sizes_without(call: CallSpec, names: Collection[str]) -> Free:
    """The free sizes of the inputs, by path and dim, without `names`."""
    return {spec.path: _free(spec, names) for spec in call.inputs}


def less_batch(call: CallSpec) -> Iterator[Free]:
    """The free sizes of the inputs, with the batch fixed for some inputs, in several variants.

    Doubtful are all inputs with the batch but the timestep and the first with most dims. The batch
    is fixed for each of them, for those of one argument, for those of one dim, and for all.
    """
    rows = [spec for spec in call.inputs if spec.shape[:1] == (BATCH,)]
    most = max((len(spec.shape) for spec in rows), default=0)
    sample = next((spec.path for spec in rows if len(spec.shape) == most), None)
    doubtful = [s for s in rows if s.path != sample and s.name != call.timestep]
    doubtful.sort(key=lambda spec: len(spec.shape))
    arguments = dict.fromkeys(spec.path.partition(".")[0] for spec in doubtful)
    groups = [
        *([spec] for spec in doubtful),
        *([s for s in doubtful if s.path.partition(".")[0] == name] for name in arguments),
        [spec for spec in doubtful if len(spec.shape) == 1],
        doubtful,
    ]
    for paths in dict.fromkeys(frozenset(spec.path for spec in group) for group in groups):
        if paths:
            yield {
                spec.path: _free(spec, {BATCH} if spec.path in paths else ())
                for spec in call.inputs
            }


def mixes_batch(gm: fx.GraphModule) -> bool:
    """Whether an output has the batch in a dim that is not its first."""
    batch = timestep_node(gm).meta["val"].shape[0]
    if not isinstance(batch, torch.SymInt):
        return False
    symbols = batch.node.expr.free_symbols
    (output,) = gm.graph.find_nodes(op="output")
    return any(
        isinstance(size, torch.SymInt) and not symbols.isdisjoint(size.node.expr.free_symbols)
        for node in output.all_input_nodes
        for size in node.meta["val"].shape[1:]
    )


def sizes_of_rows(gm: fx.GraphModule, call: CallSpec) -> set[str]:
    """The free sizes by which layers of the timestep alone have several rows for each sample, as
    for the frames of a video: a table needs them as numbers."""
    batch = timestep_node(gm).meta["val"].shape[0]
    if not isinstance(batch, torch.SymInt):
        return set()
    times, found = binding_times(gm), set[Any]()
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if times[node] is Binding.T and is_heavy(gm, node) and isinstance(value, Tensor):
            rows = value.shape[0] if value.dim() else 1
            if isinstance(rows, torch.SymInt):
                found |= (rows.node.expr / batch.node.expr).free_symbols
    pairs = zip(call.inputs, gm.graph.find_nodes(op="placeholder"), strict=True)
    sizes = [
        each for spec, n in pairs for each in zip(spec.shape, n.meta["val"].shape, strict=True)
    ]
    return {
        name
        for name, size in sizes
        if isinstance(name, str) and name != BATCH and isinstance(size, torch.SymInt)
        if size.node.expr in found
    }


def _free(spec: Input, less: Collection[str]) -> dict[int, str]:
    return {i: n for i, n in enumerate(spec.shape) if isinstance(n, str) and n not in less}


def _names(expression: Expression) -> set[str]:
    """The names of the sizes in an expression."""
    if isinstance(expression, str):
        return {expression}
    if not isinstance(expression, tuple):
        return set()
    return set().union(*(_names(operand) for operand in expression[1:]))


def _holds_to(guard: Guard, name: str, size: int) -> bool:
    """Whether a guard on one size allows no other than `size`."""
    others = (n for n in range(1, 2 * size + _TRIED) if n != size)
    return not any(guard.allows({name: n}) for n in others)
