"""Lowerings, one per file; modules are imported when first used."""

if __name__ != "tfmq_fx.backends":
    raise ImportError("import this package as tfmq_fx.backends, not as backends")

import importlib
from types import ModuleType

import torch

from tfmq_fx.errors import BackendError

CPU = torch.device("cpu")
BACKENDS = {
    "eager": "tfmq_fx.backends.eager",
    "float": "tfmq_fx.backends.float",
    "inductor": "tfmq_fx.backends.inductor",
    "openvino": "tfmq_fx.backends.openvino",
}
"""Backends by name -> the module with `unavailable(device)`, `compile_graph()`
and the names of its `OPTIONS`."""


def backend_module(name: str) -> ModuleType:
    """The backend of that name, whether it can run here or not. Raises BackendError if there is
    none."""
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; there are auto, {', '.join(BACKENDS)}")
    return importlib.import_module(BACKENDS[name])


def backend(name: str, device: torch.device = CPU) -> ModuleType:
    """The backend of that name, ready to compile for a device. Raises BackendError with the reason
    if it cannot."""
    found = backend_module(name)
    if reason := found.unavailable(device):
        raise BackendError(f"backend {name!r}: {reason}. Use backend='eager'.")
    return found
