"""Plain values as JSON and back, equal and of the same type."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list

from tfmq_fx.core.errors import ArtifactError

_TORCH_VALUES = {
    "dtype": torch.dtype,
    "memory_format": torch.memory_format,
    "layout": torch.layout,
}
# Read from what torch holds by now: asking a module for any other name may import things.
_NAMED = {
    tag: {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, kind)}
    for tag, kind in _TORCH_VALUES.items()
}
_NONE: Mapping[str, Callable[[Any], Any]] = MappingProxyType({})


def encode(value: Any, where: str, special: Callable[[Any], Any] = lambda _: NotImplemented) -> Any:
    """`value` as JSON-ready data that `decode` turns back into an equal value of the same type.

    special: encodes what is not plain data, or returns NotImplemented.
    Raises ArtifactError, naming `where`, on a value of any other kind.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if (found := special(value)) is not NotImplemented:
        return found
    if kind in (list, immutable_list):
        return [encode(v, f"{where}[{i}]", special) for i, v in enumerate(value)]
    if kind in (tuple, torch.Size):
        tag = "tuple" if kind is tuple else "size"
        return {tag: [encode(v, f"{where}[{i}]", special) for i, v in enumerate(value)]}
    if kind in (dict, immutable_dict):
        items = value.items()
        return {
            "dict": [[encode(k, where), encode(v, f"{where}[{k!r}]", special)] for k, v in items]
        }
    if kind is slice:
        parts = (value.start, value.stop, value.step)
        return {"slice": [encode(v, where, special) for v in parts]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if kind is torch.device:
        return {"device": str(value)}
    for tag, torch_type in _TORCH_VALUES.items():
        if kind is torch_type:
            return {tag: str(value).removeprefix("torch.")}
    raise ArtifactError(f"{where}: a saved model cannot hold a {kind.__module__}.{kind.__name__}")


def decode(data: Any, where: str, special: Mapping[str, Callable[[Any], Any]] = _NONE) -> Any:
    """The value that `encode` saved; `special` decodes further tags. Raises ArtifactError."""
    if data is None or type(data) in (bool, int, float, str):
        return data
    if type(data) is list:
        return [decode(v, where, special) for v in data]
    tag, body = next(iter(data.items())) if type(data) is dict and len(data) == 1 else ("", None)
    if tag in special:
        return special[tag](body)
    if tag in ("tuple", "size") and type(body) is list:
        values = tuple([decode(v, where, special) for v in body])
        if tag == "size":
            return _size(values, where)
        return values
    if tag == "dict" and type(body) is list:
        return _decoded_dict(body, where, special)
    if tag == "slice" and type(body) is list and len(body) == 3:
        return slice(*(decode(v, where, special) for v in body))
    if tag == "ellipsis" and body is True:
        return ...
    if tag == "float" and type(body) is str and body in ("inf", "-inf", "nan"):
        return float(body)
    if tag == "device":
        return device_named(body, where)
    if tag in _NAMED and type(body) is str and body in _NAMED[tag]:
        return _NAMED[tag][body]
    raise ArtifactError(f"{where}: damaged value {data!r:.80}")


def _size(values: tuple[Any, ...], where: str) -> torch.Size:
    try:
        if any(type(n) is int and not -(1 << 63) <= n < 1 << 63 for n in values):
            raise ValueError("out of range")
        return torch.Size(values)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: damaged value {values!r:.80}") from error


def _decoded_dict(
    pairs: list[Any], where: str, special: Mapping[str, Callable[[Any], Any]]
) -> dict[Any, Any]:
    if not all(type(pair) is list and len(pair) == 2 for pair in pairs):
        raise ArtifactError(f"{where}: damaged value {pairs!r:.80}")
    names = [decode(key, where) for key, _ in pairs]
    try:
        if len(set(names)) != len(names):
            raise ArtifactError(f"{where}: a key is given twice: {names!r:.80}")
    except TypeError as error:
        raise ArtifactError(f"{where}: a key cannot be hashed: {names!r:.80}") from error
    return {n: decode(v, where, special) for n, (_, v) in zip(names, pairs, strict=True)}


def device_named(name: Any, where: str) -> torch.device:
    """The device called `name`. Raises ArtifactError if there can be none."""
    try:
        if type(name) is str and len(name) < 40:
            return torch.device(name)
    except RuntimeError:
        pass
    raise ArtifactError(f"{where}: {name!r:.80} is no device")


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, without "torch."."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: Any, where: str) -> torch.dtype:
    """The dtype called `name`. Raises ArtifactError if there is none."""
    dtype = decode({"dtype": name}, where)
    assert isinstance(dtype, torch.dtype)
    return dtype


def keys(data: Any, where: str, required: str, optional: str = "") -> dict[str, Any]:
    """`data`, a dict with these keys (two lists of words). Raises ArtifactError otherwise."""
    if type(data) is not dict:
        raise ArtifactError(f"{where}: expected an object, found {data!r:.80}")
    if missing := sorted(set(required.split()) - set(data)):
        raise ArtifactError(f"{where}: missing keys {missing}")
    if unknown := sorted(set(data) - set(required.split()) - set(optional.split())):
        raise ArtifactError(f"{where}: unknown keys {unknown}")
    return data


def typed(data: Mapping[str, Any], where: str, **kinds: Any) -> None:
    """Raise ArtifactError unless the values of these keys are of these types, JSON's own: int is no
    bool, and float takes an int as well."""
    for key, kind in kinds.items():
        value, allowed = data[key], typing.get_args(kind) or (kind,)
        if type(value) in allowed or (type(value) is int and float in allowed):
            continue
        words = " or ".join("null" if each is type(None) else each.__name__ for each in allowed)
        raise ArtifactError(f"{where}.{key}: expected {words}, found {value!r:.80}")


def without_infinities(value: Any) -> Any:
    """A value as strict JSON takes it: inf and nan become strings, which float() reads."""
    if isinstance(value, Mapping):
        return {name: without_infinities(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(each) for each in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
