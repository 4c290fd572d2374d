"""Proxies that stand for tensors and sizes while a model is traced."""

from __future__ import annotations

import math
import operator
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.fx.proxy import Proxy

from tfmq_fx.core.errors import CaptureError
from tfmq_fx.ir.functionalize import PURE_FORMS, setitem_

_EMPTY = torch.empty  # the original: while tracing, torch.empty records
_SKIPPED = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep, "<")


def source_line() -> str:
    """The file.py:line of the innermost frame outside torch and this folder."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if not frame.f_code.co_filename.startswith(_SKIPPED):
            break
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


class Sizes(tuple[Any, ...]):
    """The shape of a TensorProxy, whose free sizes are proxies."""

    def numel(self) -> Any:
        return math.prod(self)


class Recorder(Protocol):
    """The interface of the tracer that proxies call."""

    def size_of(self, proxy: TensorProxy, dim: int) -> Any: ...
    def decide(self, value: Any) -> bool: ...
    def fix(self, value: Any, convert: Callable[[Any], Any]) -> Any: ...
    def whereabouts(self) -> str: ...
    def read(self, proxy: TensorProxy, what: str) -> Tensor: ...
    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any: ...


class ValueProxy(Proxy):
    """A proxy that knows the value of its node."""

    tracer: Recorder  # type: ignore[assignment]
    _is_param = False  # nn.Module.__setattr__ reads it

    @property
    def value(self) -> Any:
        return self.node.meta["val"]

    def __hash__(self) -> int:
        return id(self)


class TensorProxy(ValueProxy, Tensor):  # type: ignore[misc]
    """A stand-in for a tensor; reading its data raises CaptureError with the module and line.

    It is a tensor on the meta device, so that isinstance holds and compiled code finds no data
    instead of foreign memory.  Attributes and methods are answered from the value of its node.
    """

    def __new__(cls, node: fx.Node, tracer: Any) -> TensorProxy:
        value = node.meta["val"]
        with torch._C.DisableTorchFunction():
            bare = _EMPTY([0] * value.dim(), dtype=value.dtype, device="meta")
            return Tensor._make_subclass(cls, bare)

    def __init__(self, node: fx.Node, tracer: Any) -> None:
        ValueProxy.__init__(self, node, tracer)

    def __getattribute__(self, name: str) -> Any:
        if name in _OF_TENSORS:
            return self._attribute(name)
        return super().__getattribute__(name)

    @property
    def shape(self) -> Sizes:  # type: ignore[override]
        return Sizes(self.tracer.size_of(self, i) for i in range(self.value.dim()))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> Any:
        return math.prod(self.shape)

    nelement = numel

    def __len__(self) -> int:
        if not self.value.dim():
            raise TypeError("len() of a 0-d tensor")
        return operator.index(self.shape[0])

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0))

    # The next five use only another tensor's shape, dtype or device: no data edge to it.
    def type_as(self, other: Any) -> Any:
        return self.to(other)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor):
            kwargs = {"device": args[0].device, "dtype": args[0].dtype, **kwargs}
            args = args[1:]
        return self._method("to", *args, **kwargs)

    def expand_as(self, other: Any) -> Any:
        return self.expand(other.shape)

    def view_as(self, other: Any) -> Any:
        return self.view(other.shape)

    def reshape_as(self, other: Any) -> Any:
        return self.reshape(other.shape)

    def type(self, dtype: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        if dtype is None:
            return self.value.type()
        if isinstance(dtype, torch.dtype):
            return self.to(dtype, **kwargs)
        return self._method("type", dtype, **kwargs)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", setitem_, (self, key, value), {})

    def _method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", name, (self, *args), kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            raise CaptureError(
                f"{self.tracer.whereabouts()}: forward puts other data into a tensor "
                f"({self.node.name}.data = ...). Use the new tensor in its place, or copy_()."
            )
        super().__setattr__(name, value)

    def _attribute(self, name: str) -> Any:
        """An attribute or method of torch.Tensor."""
        if name == "data":  # the same memory, and gradients are off here
            return self
        attribute = getattr(self.value, name)
        if callable(attribute) and name not in _KNOWN:
            return lambda *args, **kwargs: self._method(name, *args, **kwargs)
        if isinstance(attribute, Tensor):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return attribute

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"'Tensor' object has no attribute {name!r}")


def _reader(name: str, what: str) -> Callable[..., Any]:
    """A method that asks the tracer for a tensor's data, on which its result depends."""

    def read(self: TensorProxy, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.tracer.read(self, what), name)(*args, **kwargs)

    return read


for _name, _what in {
    "__bool__": "bool()",
    "__int__": "int()",
    "__index__": "an index",
    "__float__": "float()",
    "__contains__": "'in'",
    "__array__": "numpy()",
    "item": ".item()",
    "tolist": ".tolist()",
    "numpy": ".numpy()",
}.items():
    setattr(TensorProxy, _name, _reader(_name, _what))


def _recorded(target: Callable[..., Any]) -> Callable[..., Any]:
    """A method that records a call of `target`."""

    def record(self: ValueProxy, *others: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, *others), {})

    return record


for _target in filter(callable, PURE_FORMS):
    setattr(TensorProxy, f"__{_target.__name__}__", _recorded(_target))

# Methods that only need the metadata of a node's value.
_KNOWN = {"dim", "ndimension", "is_contiguous", "is_floating_point", "is_complex"}
_KNOWN |= {"element_size", "get_device"}

# The public attributes of torch.Tensor that TensorProxy does not define itself.
_OF_TENSORS = frozenset(
    name
    for name in dir(Tensor)
    if not name.startswith("_") and not any(name in vars(k) for k in TensorProxy.__mro__[:3])
)


class SizeProxy(ValueProxy):
    """A stand-in for a size, or for a number or condition computed from sizes."""

    @property  # as a torch.SymInt, torch's argument parser takes it for a size without reading it
    def __class__(self) -> type:
        return type(self.value)

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("the class of a traced size is fixed")

    def __bool__(self) -> bool:
        return self.tracer.decide(self.value)

    def __int__(self) -> int:
        return int(self.tracer.fix(self.value, int))

    __index__ = __int__

    def __float__(self) -> float:
        return float(self.tracer.fix(self.value, float))

    __ceil__ = _recorded(math.ceil)
    __floor__ = _recorded(math.floor)
    __trunc__ = _recorded(math.trunc)

    def is_integer(self) -> bool:
        return bool(self.value.is_integer())

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)
