"""Copy a module tree without its weights, as modules of the same classes that refuse changes."""

from __future__ import annotations

import copy
import enum
import functools
import logging
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tfmq_fx.core.errors import FrozenError

_OWN, _NESTED = 1 << 16, 1 << 12  # elements of a tensor kept with its values: of the root, of parts
_PLAIN: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), type, enum.Enum)
_PLAIN += (torch.dtype, torch.device, torch.layout, torch.memory_format, slice, range)
_PLAIN += (logging.Filterer,)  # loggers, which belong to the process
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_INTERNAL = frozenset(vars(nn.Module()))
# What libraries put on an instance to move weights, whose references lead back to the source.
_LEFT_OUT = frozenset({"forward", "to", "cuda", "_hf_hook", "_old_forward", "_diffusers_hook"})
_DEEPEST = 40  # levels of values in values; what has more, such as a linked list, is left out
_DROP = object()

_REMEDY = (
    "this is a graph captured from the model, which a change of the model no longer reaches. Do it "
    "on the source, before prepare(), fold_timesteps() or bind_request(), and capture it (again)"
)


def frozen_copy(
    module: nn.Module, move: Callable[[Tensor], Tensor] = Tensor.clone
) -> FrozenModule | Any:
    """Return a copy of `module` and its parts that holds settings, but neither weights nor hooks.

    Tensors are on the meta device, except small ones of the module itself and small buffers, of
    which it holds copies made by `move`.  Nothing of the original is kept alive.  The classes are
    subclasses of the originals; writing an attribute raises FrozenError unless it has that value.
    """
    return _Copier(move).module(module, _OWN)


def grafted(part: Any, held: nn.Module) -> Any:
    """Return a frozen `part` with the layers and tensors that a graph holds in its place.

    held: the container of them in the graph.
    """
    new = object.__new__(type(part))
    tables = {k: dict(getattr(part, k)) for k in ("_modules", "_parameters", "_buffers")}
    for name, layer in held._modules.items():
        inner = part._modules.get(name)
        whole = isinstance(inner, FrozenModule) and type(layer) is nn.Module
        tables["_modules"][name] = grafted(inner, layer) if whole and layer else layer
    tables["_parameters"].update(held._parameters)
    tables["_buffers"].update(held._buffers)
    frozen = {name: FrozenDict(table) for name, table in tables.items()}
    new.__dict__.update(vars(part) | frozen)
    return new


def is_same(old: Any, new: Any) -> bool:
    """Whether writing `new` over `old` changes nothing."""
    if isinstance(old, (*_PLAIN, list, tuple, dict)) and type(new) in (type(old), *_bases(old)):
        return bool(old == new)
    return old is new


def _bases(value: Any) -> tuple[type, ...]:
    return type(value).__mro__[1:-1] if isinstance(value, (FrozenList, FrozenDict)) else ()


def _refuse(what: str) -> NoReturn:
    raise FrozenError(f"{what}: {_REMEDY}.")


class FrozenObject:
    """Base of the classes of copies: writes are refused."""

    def __setattr__(self, name: str, value: Any) -> None:
        held = self.__dict__.get(name, getattr(type(self), name, _DROP))
        if isinstance(self, nn.Module) and name in self._modules:
            held = self._modules[name]
        if not is_same(held, value):
            _refuse(f"{type(self).__name__}.{name} cannot be set")

    def __delattr__(self, name: str) -> None:
        _refuse(f"{type(self).__name__}.{name} cannot be deleted")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class FrozenModule(FrozenObject, nn.Module):
    """Base of the classes of copied modules, which can be called only where they need no weights.

    Their tables of parts, tensors and hooks are `FrozenDict`s, so that no method can add any.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(t.is_meta for t in (*self.parameters(), *self.buffers())):
            raise FrozenError(
                f"this {type(self).__name__} belongs to the outline of a captured model, which has "
                "no weights. Call the whole model, or that part of the source."
            )
        return super().__call__(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        return _refuse(f"{type(self).__name__}.train()") if mode else self

    def _frozen(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(f"this {type(self).__name__} cannot be changed")

    _apply = requires_grad_ = load_state_dict = compile = _frozen  # type: ignore[assignment]


def _refusing(kind: type, names: str) -> dict[str, Any]:
    """Methods of a container that refuse, and those that copy it as what it is a copy of."""

    def refused(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("a list or dict of the model cannot be changed")

    def thawed(self: Any, *_: Any) -> Any:
        return kind(self)

    copies = ("__copy__", "__deepcopy__", "copy")
    return dict.fromkeys(names.split(), refused) | dict.fromkeys(copies, thawed)


_OF_LISTS = """append extend insert remove pop clear sort reverse __setitem__ __delitem__ __iadd__
__imul__"""
_OF_DICTS = """__setitem__ __delitem__ pop popitem clear update setdefault __ior__"""


class FrozenList(list[Any]):
    """A list that refuses changes."""

    locals().update(_refusing(list, _OF_LISTS))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return list, (tuple(self),)


class FrozenDict(dict[Any, Any]):
    """A dict that refuses changes."""

    locals().update(_refusing(dict, _OF_DICTS))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (tuple(self.items()),)


@functools.cache
def _frozen_class(kind: type) -> Any:
    """Return the subclass of `kind`, of the same name, whose instances refuse writes."""
    if issubclass(kind, FrozenObject):
        return kind
    base = FrozenModule if issubclass(kind, nn.Module) else FrozenObject
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return types.new_class(kind.__name__, (base, kind), exec_body=lambda body: body.update(names))


def original_class(frozen: Any) -> Any:
    """Return the class that a copy's class was made from."""
    return type(frozen).__bases__[1]


def _is_free(value: Any) -> bool:
    """Whether `value` is a function that refers to nothing but its module."""
    owner = getattr(value, "__self__", None)
    return (
        isinstance(value, _FUNCTIONS)
        and not getattr(value, "__closure__", None)
        and (owner is None or isinstance(owner, types.ModuleType))
    )


class _Copier:
    """Copies values, each object once; leaves out what cannot be copied without its original."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        self._move = move
        self._depth = 0
        self._done: dict[int, Any] = {}
        self._originals: list[Any] = []  # whose ids are in use while this copies

    def module(self, module: nn.Module, limit: int = _NESTED) -> Any:
        def fill(new: Any) -> None:
            state = vars(module)
            for name in _INTERNAL:
                value = state.get(name)
                new[name] = OrderedDict() if isinstance(value, dict) else value
            parameters = {k: self._parameter(p, limit) for k, p in module._parameters.items()}
            buffers = {k: self.value(b, limit) for k, b in module._buffers.items()}
            parts = {k: self.value(p) for k, p in module._modules.items()}
            parts = {k: p for k, p in parts.items() if p is not _DROP}
            new["_parameters"] = FrozenDict(parameters)
            new["_buffers"] = FrozenDict(buffers)
            new["_modules"] = FrozenDict(parts)
            for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
                new[name] = FrozenDict()
            self._fill(new, {k: v for k, v in state.items() if k not in _INTERNAL}, limit)

        if isinstance(module, torch.jit.ScriptModule):  # whose classes cannot be derived from
            return _DROP
        return self._instance(module, fill)

    def value(self, value: Any, limit: int = _NESTED) -> Any:
        """Return a copy of `value`, or _DROP."""
        if self._depth > _DEEPEST:
            return _DROP
        self._depth += 1
        try:
            return self._copied(value, limit)
        finally:
            self._depth -= 1

    def _copied(self, value: Any, limit: int) -> Any:
        if isinstance(value, _PLAIN) or _is_free(value):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, limit)
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, (list, tuple, set, frozenset, Mapping)):
            return self._container(value)
        if isinstance(value, (types.MethodType, types.ModuleType)) or not hasattr(
            value, "__dict__"
        ):
            return _DROP
        return self._instance(value, lambda new: self._fill(new, vars(value), _NESTED))

    def _fill(self, new: dict[str, Any], state: Mapping[str, Any], limit: int) -> None:
        for name, value in state.items():
            if name not in _LEFT_OUT and (copied := self.value(value, limit)) is not _DROP:
                new[name] = copied

    def _instance(self, original: Any, fill: Callable[[dict[str, Any]], None]) -> Any:
        if id(original) in self._done:
            return self._done[id(original)]
        kind: Any = type(original)
        try:
            new = object.__new__(_frozen_class(kind))
        except TypeError:  # a class that cannot be derived from, or lies in C
            return _DROP
        self._done[id(original)] = new
        self._originals.append(original)
        fill(new.__dict__)
        return new

    def _container(self, value: Any) -> Any:
        if id(value) in self._done:
            return self._done[id(value)]
        self._done[id(value)] = _DROP  # for a container that holds itself
        self._originals.append(value)
        if isinstance(value, Mapping):
            pairs = [
                (k, self.value(v)) for k, v in value.items() if isinstance(k, (*_PLAIN, tuple))
            ]
            copied = {k: v for k, v in pairs if v is not _DROP}
            new: Any = FrozenDict(copied)
            if type(value) is not dict and not isinstance(value, FrozenDict):
                new = self._of_class(value, copied)
        else:
            parts = [part for part in map(self.value, value) if part is not _DROP]
            if len(parts) < len(value):
                return _DROP
            if isinstance(value, tuple):
                new = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
                new = torch.Size(parts) if isinstance(value, torch.Size) else new
            else:
                new = FrozenList(parts) if isinstance(value, list) else frozenset(parts)
        self._done[id(value)] = new
        return new

    @staticmethod
    def _of_class(value: Any, copied: dict[Any, Any]) -> Any:
        """Return `copied` as a mapping of the class of `value`, such as diffusers' FrozenDict."""
        new = copy.copy(value) if len(copied) == len(value) else FrozenDict(copied)
        return new if dict(new) == copied else FrozenDict(copied)

    def _parameter(self, value: Any, limit: int) -> Any:
        if value is None or id(value) in self._done:
            return value if value is None else self._done[id(value)]
        data = value.data if type(value) is nn.Parameter else value
        kept = self._tensor(data, limit if limit == _OWN else -1)
        new = nn.Parameter(kept, requires_grad=value.requires_grad)
        self._done[id(value)] = new
        self._originals.append(value)
        return new

    def _tensor(self, value: Tensor, limit: int) -> Tensor:
        plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
        if plain and not value.is_meta and value.numel() <= limit:
            return self._move(value.detach())
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
