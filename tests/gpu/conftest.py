"""Everything here needs a CUDA device: make test-gpu, or python -m pytest -m gpu tests/gpu.

Skipped where there is none; without Triton, the tests of what compiles or launches kernels are.
TFMQ_FX_TEST_DEVICE=cpu tries the tests themselves where there is none; what only a GPU can show is
skipped then.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.bench.cuda_timing import full_precision
from tests.gpu.models import DEVICE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = DEVICE == "cuda" and not torch.cuda.is_available()
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture
def kernels() -> None:
    """Skips what launches kernels of this package where they cannot run."""
    if DEVICE != "cuda":
        pytest.skip("kernels run on CUDA")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets")


@pytest.fixture(autouse=True)
def _plain_arithmetic(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Products of float32 in float32, no gradients, and a cache of kernel choices of its own."""
    monkeypatch.setenv("TFMQ_FX_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))
    with full_precision():
        yield
