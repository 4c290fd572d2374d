"""Bring inputs into the one form that compiled graphs are called with.

torch.compile makes a graph for each pattern of strides, and for tensors that want gradients or were
made in inference mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from tfmq_fx.ir.node_info import size_hint

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def formats_of(gm: fx.GraphModule) -> list[torch.memory_format]:
    """The memory format of each placeholder of a graph: channels last where it was captured so."""
    formats = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        shape, strides = (tuple(map(size_hint, v)) for v in (value.shape, value.stride()))
        last = _LAST.get(value.dim(), torch.contiguous_format)
        plain = _strides(shape, torch.contiguous_format)
        as_last = strides == _strides(shape, last) and strides != plain
        formats.append(last if as_last else torch.contiguous_format)
    return formats


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """A context that turns off gradients and inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def plain(inputs: Sequence[Tensor], formats: Sequence[torch.memory_format]) -> list[Tensor]:
    """The same values as tensors without gradients or inference mode, each with the strides that
    its sizes and format give; copied where they lie otherwise."""
    with apart():
        return [_plain(value, form) for value, form in zip(inputs, formats, strict=True)]


def _plain(value: Tensor, form: torch.memory_format) -> Tensor:
    value = value.clone() if value.is_inference() else value.detach()
    value = value.resolve_conj().resolve_neg().contiguous(memory_format=form)
    strides = _strides(value.shape, form)  # those of sizes of 1 are free, and looked at too
    return value if value.stride() == strides else value.as_strided(value.shape, strides)


def _strides(shape: Sequence[int], form: torch.memory_format) -> tuple[int, ...]:
    """The strides of a new tensor."""
    dims = list(range(len(shape)))
    if form != torch.contiguous_format:
        dims = [0, *dims[2:], 1]
    strides, step = [1] * len(shape), 1
    for dim in reversed(dims):
        strides[dim] = step
        step *= max(1, shape[dim])
    return tuple(strides)
