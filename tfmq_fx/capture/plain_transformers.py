"""torch.nn's transformer layers without their fused kernels, so that their parts can be seen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

_LAYERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


@contextlib.contextmanager
def plain_transformers(model: nn.Module) -> Iterator[list[str]]:
    """Run the transformer layers of torch.nn as their Python code says while active; what to note.

    Without gradients they take one kernel for a whole layer, which rounds otherwise.
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
