"""Lowerings, one per file; modules are imported when first used."""

if __name__ != "tfmq_fx.backends":
    raise ImportError("import this package as tfmq_fx.backends, not as backends")

import importlib
from types import ModuleType

from tfmq_fx.errors import BackendError

BACKENDS = {
    "eager": "tfmq_fx.backends.eager",
    "inductor": "tfmq_fx.backends.inductor",
}
"""Backends that users choose by name -> the module with `unavailable()` and `compile_graph()`."""


def backend(name: str) -> ModuleType:
    """The backend of that name, ready to compile. Raises BackendError with the reason if not."""
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; there are auto, {', '.join(BACKENDS)}")
    found = importlib.import_module(BACKENDS[name])
    if reason := found.unavailable():
        raise BackendError(f"backend {name!r}: {reason}. Use backend='eager'.")
    return found
