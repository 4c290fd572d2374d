"""Compile and run converted models: each backend is a module that satisfies `Backend`.

To add one, write a module with the three members of `Backend` and name it in `BACKENDS`; to have
backend="auto" try it, name it in `auto.CANDIDATES` as well.
"""

if __name__ != "tfmq_fx.backends":
    raise ImportError("import this package as tfmq_fx.backends, not as backends")

import importlib
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import fx

from tfmq_fx.core.errors import BackendError
from tfmq_fx.ir.graph_pass import Rewrite

from .support import CPU


class Backend(Protocol):
    """The members that a module must define to be a backend."""

    @property
    def OPTIONS(self) -> tuple[str, ...]:
        """The names of the options of `compile_graph` that users may pass; backend="auto" passes an
        option only to backends that name it here."""

    def unavailable(self, device: torch.device = ...) -> str | None:
        """Why this machine cannot compile for `device` (for example, which package is missing and
        how to install it), or None where it can. It is called first and must not raise."""

    def compile_graph(
        self, gm: fx.GraphModule, **options: Any
    ) -> tuple[Callable[..., Any], Rewrite]:
        """Compile the quantized graph `gm`; returns a callable and how the graph was lowered.

        The callable takes the values of the graph's placeholders, in order, in any strides, with or
        without gradients, in the sizes that the graph was captured with or any other that it
        allows, and returns what the graph does. `gm` stays as it is.

        The `Rewrite` holds the lowered graph; `declined` names every quantized layer that computes
        in floating point, with the reason, and `details["integer"]` counts the others. Before the
        callable is used, its outputs are compared with those of `gm` (see `self_check`): where all
        values are rounded to bfloat16, `meta["precision"]` of the lowered graph must be "bf16".

        Raises ConfigError for an unknown option or value, and BackendError for a graph that the
        backend cannot run, whose text suggests backend="eager".
        """
        ...


BACKENDS = ("eager", "float", "inductor", "openvino")
"""The names of the backends; each is a module of this package, imported when first used."""


def backend_module(name: str) -> Backend:
    """The module of a backend, whether it can run here or not. Raises BackendError for an unknown
    name."""
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; there are auto, {', '.join(BACKENDS)}")
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


def backend(name: str, device: torch.device = CPU) -> Backend:
    """The module of a backend that can compile for `device`. Raises BackendError with the reason
    where it cannot."""
    module = backend_module(name)
    if reason := module.unavailable(device):
        raise BackendError(f"backend {name!r}: {reason}. Use backend='eager'.")
    return module
