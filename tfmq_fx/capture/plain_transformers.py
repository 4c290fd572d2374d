"""Switch off the fused kernels of torch.nn's transformer layers, which hide their parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

_LAYERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


@contextlib.contextmanager
def plain_transformers(model: nn.Module) -> Iterator[list[str]]:
    """Run torch.nn's transformer layers as their Python code says while active; yields notes.

    Without gradients they use one kernel for a whole layer, which rounds otherwise.
    """
    if not any(isinstance(module, _LAYERS) for module in model.modules()):
        yield []
        return
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield [
            "torch.nn's transformer layers have a fused kernel that rounds otherwise than their "
            "code: outputs equal the model's bit for bit under "
            "torch.backends.mha.set_fastpath_enabled(False)"
        ]
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
