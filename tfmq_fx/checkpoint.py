"""Finished parts of a conversion: what rounding finds for a layer."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .nn import QuantLayer

_ROUNDED = ("codes", "weight_scale", "weight_zero", "bias")


def rounded_state(layer: QuantLayer) -> dict[str, Tensor]:
    """What rounding decides of a layer: its codes, their scales and zero points, and its bias."""
    named = {name: getattr(layer, name) for name in _ROUNDED}
    return {name: value for name, value in named.items() if value is not None}


def with_rounded_state(layer: QuantLayer, state: Mapping[str, Tensor]) -> QuantLayer:
    """A new layer, as `layer` but for what `rounded_state` gave."""
    made = copy.deepcopy(layer)
    for name, value in state.items():
        setattr(made, name, value.detach().clone())
    return made


def seeded_generator(seed: int, part: str) -> torch.Generator:
    """The random numbers of one part, which do not depend on what was drawn for others."""
    digest = hashlib.sha256(f"{seed}:{part}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
