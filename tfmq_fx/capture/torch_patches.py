"""Patch torch and einops while a model is traced, and restore them."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._device
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tfmq_fx.ir.node_info import words

from .proxies import TensorProxy

Make = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

# Factories of tensors without tensor arguments. They are recorded, so that no device or dtype
# becomes part of a constant and random numbers are drawn at each call.
FACTORIES = {
    name: getattr(torch, name)
    for name in words(
        """arange as_tensor empty eye full linspace logspace ones rand randint randn randperm
        scalar_tensor tensor tril_indices triu_indices zeros"""
    )
}
RECORDED = frozenset(FACTORIES.values())


@contextlib.contextmanager
def patched(make: Make) -> Iterator[None]:
    """While active, route tensor factories through make(func, args, kwargs), and let einops take
    proxies; in this thread also factories that were imported by name."""
    with _Record(make), _factories(make), _einops():
        yield


class _Record(TorchFunctionMode):
    """A mode of the tracing thread that hands torch functions to `make`."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.make(func, tuple(args), kwargs or {})


@contextlib.contextmanager
def _factories(make: Make) -> Iterator[None]:
    """Replace torch.zeros and other factories by functions that call `make`.

    torch 2.13's argument parser takes no proxy in torch.zeros(batch, 3).
    """

    def replacement(func: Any) -> Any:
        @functools.wraps(func)
        def record(*args: Any, **kwargs: Any) -> Any:
            return make(func, args, kwargs)

        return record

    # torch caches sets of its own functions at first use: they must hold the originals.
    torch.utils._device._device_constructors()
    torch.overrides.get_ignored_functions()
    torch.overrides.get_overridable_functions()
    torch.overrides.is_tensor_method_or_property(Tensor.add)
    try:
        for name, func in FACTORIES.items():
            setattr(torch, name, replacement(func))
        yield
    finally:
        for name, func in FACTORIES.items():
            setattr(torch, name, func)


@contextlib.contextmanager
def _einops() -> Iterator[None]:
    """Make einops take proxies for tensors, where it is loaded."""
    backends = getattr(sys.modules.get("einops._backends"), "_type2backend", None)
    if backends is None:
        yield
        return
    backends[TensorProxy] = sys.modules["einops._backends"].TorchBackend()
    try:
        yield
    finally:
        del backends[TensorProxy]


@contextlib.contextmanager
def plain_transformers(model: nn.Module) -> Iterator[list[str]]:
    """Run torch.nn's transformer layers as their Python code says while active; yields notes.

    Without gradients they use one kernel for a whole layer, which rounds otherwise.
    """
    layers = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
    if not any(isinstance(module, layers) for module in model.modules()):
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
