"""Write plain values as JSON, read them back, and check JSON against expected keys and types."""

from __future__ import annotations

import contextlib
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list

from tfmq_fx.core.errors import ArtifactError, TfmqError

_TORCH_VALUES = {
    "dtype": torch.dtype,
    "memory_format": torch.memory_format,
    "layout": torch.layout,
}
_FLOAT = "$float"
_SEQUENCES: dict[type, str] = {
    list: "",
    immutable_list: "",
    tuple: "tuple",
    torch.Size: "size",
}  # type -> tag


def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype, layout or memory format, without "torch."."""
    return str(dtype).removeprefix("torch.")


# Read from what torch holds by now: asking a module for any other name may import things.
_NAMED: dict[str, dict[Any, Any]] = {
    tag: {dtype_name(v): v for v in vars(torch).values() if isinstance(v, kind)}
    for tag, kind in _TORCH_VALUES.items()
} | {"float": {name: float(name) for name in ("inf", "-inf", "nan")}, "ellipsis": {True: ...}}
_NONE: Mapping[str, Callable[[Any], Any]] = MappingProxyType({})


def encode(value: Any, where: str, special: Callable[[Any], Any] = lambda _: NotImplemented) -> Any:
    """Return `value` as JSON-ready data, from which `decode` makes an equal value of the same type.

    special: encodes what is not plain data, or returns NotImplemented.
    Raises ArtifactError, naming `where`, on a value of any other kind.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if (data := special(value)) is not NotImplemented:
        return data
    if kind in _SEQUENCES:
        parts = [encode(v, f"{where}[{i}]", special) for i, v in enumerate(value)]
        return {_SEQUENCES[kind]: parts} if _SEQUENCES[kind] else parts
    if kind in (dict, immutable_dict):
        items = value.items()
        return {
            "dict": [[encode(k, where), encode(v, f"{where}[{k!r}]", special)] for k, v in items]
        }
    if kind is slice:
        return {"slice": [encode(v, where, special) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if kind is torch.device:
        return {"device": str(value)}
    for tag, torch_type in _TORCH_VALUES.items():
        if kind is torch_type:
            return {tag: dtype_name(value)}
    raise ArtifactError(f"{where}: a saved model cannot hold a {kind.__module__}.{kind.__name__}")


def decode(data: Any, where: str, special: Mapping[str, Callable[[Any], Any]] = _NONE) -> Any:
    """Return the value that `encode` saved. Raises ArtifactError, naming `where`.

    special: decoders of further tags.
    """
    if data is None or type(data) in (bool, int, float, str):
        return data
    if type(data) is list:
        return [decode(v, where, special) for v in data]
    tag, body = next(iter(data.items())) if type(data) is dict and len(data) == 1 else ("", None)
    if tag in special:
        return special[tag](body)
    if tag == "device":
        return device_named(body, where)
    if tag == "slice" and type(body) is list and len(body) == 3:
        return slice(*decode(body, where, special))
    if tag == "dict" and type(body) is list:
        return _decode_dict(body, where, special)
    if tag == "tuple" and type(body) is list:
        return tuple(decode(body, where, special))
    if tag == "size" and type(body) is list:
        sizes = decode(body, where, special)
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            if all(type(n) is not int or abs(n) < 1 << 63 for n in sizes):  # not checked by torch
                return torch.Size(sizes)
    if type(body) in (str, bool) and body in _NAMED.get(tag, ()):
        return _NAMED[tag][body]
    raise ArtifactError(f"{where}: damaged value {data!r:.80}")


def _decode_dict(
    pairs: list[Any], where: str, special: Mapping[str, Callable[[Any], Any]]
) -> dict[Any, Any]:
    if not all(type(pair) is list and len(pair) == 2 for pair in pairs):
        raise ArtifactError(f"{where}: damaged value {pairs!r:.80}")
    items = [(decode(key, where), decode(value, where, special)) for key, value in pairs]
    try:
        decoded = dict(items)
    except TypeError as error:
        raise ArtifactError(f"{where}: a key cannot be hashed: {pairs!r:.80}") from error
    if len(decoded) != len(items):
        raise ArtifactError(f"{where}: a key is given twice: {list(decoded)!r:.80}")
    return decoded


def device_named(name: Any, where: str) -> torch.device:
    """Return the device called `name`. Raises ArtifactError if there can be none."""
    try:
        if type(name) is str and len(name) < 40:
            return torch.device(name)
    except RuntimeError:
        pass
    raise ArtifactError(f"{where}: {name!r:.80} is no device")


def dtype_named(name: Any, where: str) -> torch.dtype:
    """Return the dtype called `name`. Raises ArtifactError if there is none."""
    dtype = decode({"dtype": name}, where)
    assert isinstance(dtype, torch.dtype)
    return dtype


@contextlib.contextmanager
def naming(where: str | Path) -> Iterator[None]:
    """Turn every error of the body into an ArtifactError that names the place in the saved data.

    Damaged data may raise anything in torch or fx; a file must not choose the error.
    """
    try:
        yield
    except TfmqError as error:
        if isinstance(error, ArtifactError) and str(error).startswith(str(where)):
            raise
        raise ArtifactError(f"{where}: {error}") from error
    except Exception as error:
        raise ArtifactError(f"{where}: damaged: {type(error).__name__}: {error}") from error


def keys(data: Any, where: str, required: str, optional: str | None = "") -> dict[str, Any]:
    """Return `data`, a dict with these keys (lists of words). Raises ArtifactError otherwise.

    optional: None allows any further keys.
    """
    if type(data) is not dict:
        raise ArtifactError(f"{where}: expected an object, found {data!r:.80}")
    if missing := sorted(set(required.split()) - set(data)):
        raise ArtifactError(f"{where}: missing keys {missing}")
    known = set(data) if optional is None else {*required.split(), *optional.split()}
    if unknown := sorted(set(data) - known):
        raise ArtifactError(f"{where}: unknown keys {unknown}")
    return data


def typed(data: Mapping[str, Any], where: str, **kinds: Any) -> None:
    """Raise ArtifactError unless the values of these keys have these types, which are JSON's own:
    int excludes bool, float includes int, and object includes all."""
    for key, kind in kinds.items():
        value, allowed = data[key], typing.get_args(kind) or (kind,)
        if kind is object or type(value) in allowed or (type(value) is int and float in allowed):
            continue
        words = " or ".join("null" if each is type(None) else each.__name__ for each in allowed)
        raise ArtifactError(f"{where}.{key}: expected {words}, found {value!r:.80}")


def fields(data: Any, where: str, optional: str = "", **kinds: Any) -> dict[str, Any]:
    """Return `data`, a dict of values of these types. Raises ArtifactError otherwise.

    optional: keys, as a list of words, that it may have besides.
    """
    keys(data, where, " ".join(kinds), optional)
    typed(data, where, **kinds)
    return data  # type: ignore[no-any-return]


def words(data: Any, where: str) -> tuple[str, ...]:
    """Return a list of strings as a tuple. Raises ArtifactError for anything else."""
    if type(data) is not list or not all(type(word) is str for word in data):
        raise ArtifactError(f"{where}: {data!r:.80} is no list of names")
    return tuple(data)


def to_plain_json(value: Any, where: str) -> Any:
    """Return `value` in JSON's own types, with a tag for the floats that JSON lacks.

    Tuples become lists. Raises ArtifactError, naming `where`, on a value of any other kind.
    """
    if type(value) is int and abs(value) >= 1 << 64:
        raise ArtifactError(f"{where}: {value!r:.40} does not fit into 64 bits")
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {_FLOAT: repr(value)}
    if isinstance(value, list | tuple):
        return [to_plain_json(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: a {type(value).__name__} cannot be written as JSON")
    if set(value) == {_FLOAT}:
        raise ArtifactError(f"{where}: the key {_FLOAT!r} stands for numbers that JSON lacks")
    for key in value:
        if type(key) is not str:
            raise ArtifactError(f"{where}: key {key!r} is not a string")
    return {k: to_plain_json(v, f"{where}[{k!r}]") for k, v in value.items()}


def from_plain_json(value: Any, where: str) -> Any:
    """Return what `to_plain_json` wrote, its tagged floats as floats. Raises ArtifactError."""
    if isinstance(value, list):
        return [from_plain_json(v, where) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {_FLOAT}:
        if value[_FLOAT] not in ("inf", "-inf", "nan"):
            raise ArtifactError(f"{where}: {value!r:.80} is no number")
        return float(value[_FLOAT])
    return {k: from_plain_json(v, where) for k, v in value.items()}


def without_infinities(value: Any) -> Any:
    """Return a value as strict JSON takes it: inf and nan become strings, which float() reads."""
    if isinstance(value, Mapping):
        return {name: without_infinities(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(each) for each in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
