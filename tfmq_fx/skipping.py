"""A denoiser that only looks like one: by it a pipeline passes over a batch that another process
draws, and uses up the random numbers of that batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .graph import timestep_node


class Skipped(nn.Module):
    """Called and asked like `denoiser`, a model with a graph, and answers zeros.

    Their shapes are those that the graph gives: it runs once for inputs of other shapes, with one
    sample of them.
    """

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self._denoiser = (denoiser,)  # in a tuple it is no submodule
        self._shapes: dict[Any, list[tuple[torch.Size, torch.dtype]]] = {}

    def __getattr__(self, name: str) -> Any:
        (denoiser,) = self.__dict__["_denoiser"]
        return getattr(denoiser, name)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros in the type of the denoiser's output. Raises InputError as the denoiser does."""
        (denoiser,) = self._denoiser
        inputs, return_dict = denoiser.call.bind(args, kwargs)
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self._shapes:
            pairs = zip(inputs, denoiser.batched(), strict=True)
            found = denoiser.gm(*[x[:1] if batched else x for x, batched in pairs])
            self._shapes[key] = [(y.shape, y.dtype) for y in found]
        count = len(inputs[denoiser.call.names.index(denoiser.call.timestep)])
        answers = [
            torch.zeros((count, *shape[1:]) if shape[:1] == (1,) else shape, dtype=dtype)
            for shape, dtype in self._shapes[key]
        ]
        return denoiser.call.rebuild([y.to(inputs[0].device) for y in answers], return_dict)


def can_skip(denoiser: Any) -> bool:
    """Whether the graph of `denoiser` takes one sample of a batch."""
    return isinstance(timestep_node(denoiser.gm).meta["val"].shape[0], torch.SymInt)
