"""Settings for every test: property tests draw the same examples each time.

HYPOTHESIS_PROFILE=explore draws new ones. Processes that run side by side share the cores.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture
def any_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's kernels: those of the processor, or in plain C++ where it lacks instructions."""
    from tfmq_fx.backends.cpu import kernels

    if kernels.unavailable() is None:
        kernels.load()
        return
    _stand_in()
    monkeypatch.setattr(kernels, "unavailable", lambda: None)
    monkeypatch.setattr(kernels, "load", lambda: None)


@functools.cache
def _stand_in() -> None:
    """Have the plain kernels run the operators."""
    from tfmq_fx.backends.cpu import kernels

    kernels.load_plain()
    for name in kernels._SCHEMAS:
        keys = "CompositeExplicitAutograd" if name == "cpu_nan_count" else "CPU"
        kernels._LIBRARY.impl(name, getattr(torch.ops.tfmq_fx_plain, name).default, keys)


@pytest.fixture
def dynamo() -> Iterator[Any]:
    """torch._dynamo with nothing compiled or counted, before and after."""
    import torch._dynamo.testing

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo
    torch._dynamo.reset()
