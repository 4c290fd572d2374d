"""Run the graph as it is: the reference that every other backend is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tfmq_fx.backends.support import CPU
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.ir.graph_pass import Declined, Rewrite
from tfmq_fx.quant.quant_layer import QuantLayer

OPTIONS: tuple[str, ...] = ()


def unavailable(device: torch.device = CPU) -> str | None:
    """None: it runs everywhere."""
    return None


def compile_graph(gm: fx.GraphModule, **options: Any) -> tuple[fx.GraphModule, Rewrite]:
    """The graph itself; every quantized layer is declined: eager computes in floating point."""
    declined = [
        Declined(name, "eager computes in floating point")
        for name, module in gm.named_modules()
        if isinstance(module, QuantLayer)
    ]
    if options:
        raise ConfigError(f"backend 'eager' takes no options, got {', '.join(options)}")
    return torch.no_grad()(gm), Rewrite(gm, 0, declined, name="eager")
