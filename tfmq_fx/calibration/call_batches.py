"""Divide the call of a pipeline into calls for some of its samples each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tfmq_fx.core.errors import ConfigError

Call = tuple[tuple[Any, ...], dict[str, Any]]


def call_batches(args: Sequence[Any], kwargs: Mapping[str, Any], size: int) -> list[Call]:
    """The calls, as (args, kwargs), that draw the samples of one call, `size` at a time.

    Samples are the rows of what is named for prompts or class_labels, and of the first positional
    argument: lists, and tensors with dimensions. All else is the same for all samples.
    Raises ConfigError where the numbers of rows differ, and where another list or tensor has as
    many, so that it is not known whose rows these are.
    """
    first: Any = args[0] if args else None
    named = {name: value for name, value in kwargs.items() if _makes_samples(name)}
    each = {name: len(value) for name, value in named.items() if _has_rows(value)}
    if _has_rows(first):
        each[""] = len(first)
    count = max(each.values(), default=1)
    if count <= size:
        return [(tuple(args), dict(kwargs))]
    others = {name: value for name, value in kwargs.items() if name not in each}
    others |= {f"argument {i}": value for i, value in enumerate(args[1:], 1)}
    unclear = [name for name, rows in each.items() if rows != count]
    unclear += [name for name, v in others.items() if _has_rows(v) and len(v) == count]
    if unclear:
        raise ConfigError(
            f"batch_size: it is not known which of the {count} samples the rows of "
            f"{unclear[0] or 'the first argument'} are for; leave batch_size out, or calibrate "
            "with one sample at a time"
        )
    calls: list[Call] = []
    for start in range(0, count, size):
        rows = slice(start, start + size)
        own = {name: value[rows] for name, value in named.items() if name in each}
        head = (first[rows],) if "" in each else tuple(args[:1])
        calls.append(((*head, *args[1:]), {**kwargs, **own}))
    return calls


def _makes_samples(name: str) -> bool:
    return "prompt" in name or name == "class_labels"


def _has_rows(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)
