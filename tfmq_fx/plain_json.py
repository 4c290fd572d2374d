"""Plain values as JSON and back, equal and of the same type."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list

from .errors import ArtifactError

_TORCH_VALUES = {
    "dtype": torch.dtype,
    "memory_format": torch.memory_format,
    "layout": torch.layout,
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
        values = tuple(decode(v, where, special) for v in body)
        return values if tag == "tuple" else torch.Size(values)
    if tag == "dict" and type(body) is list:
        return {decode(k, where): decode(v, where, special) for k, v in body}
    if tag == "slice" and type(body) is list:
        return slice(*(decode(v, where, special) for v in body))
    if tag == "ellipsis":
        return ...
    if tag == "float" and body in ("inf", "-inf", "nan"):
        return float(body)
    if tag == "device":
        return torch.device(str(body))
    if tag in _TORCH_VALUES:
        value = getattr(torch, str(body), None)
        if isinstance(value, _TORCH_VALUES[tag]):
            return value
    raise ArtifactError(f"{where}: damaged value {data!r:.80}")


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
