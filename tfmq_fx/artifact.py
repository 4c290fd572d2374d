"""Saving and loading of converted models.

A saved model is a directory. `tfmq_fx.json` holds the graph, what the caller wants kept, and the
size and SHA-256 of each other file; `model.safetensors` holds the tensors. `origin.json` and
`origin.safetensors`, which running the model does not take, hold what it was made from. Nothing in
them can run code when it is read (see `allowlist`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx, nn

from .directories import make_parents, present, recover, sibling, swap, sync
from .errors import ArtifactError
from .graph_json import from_json, to_json
from .module_json import owner_of, tensors_of
from .plain_json import keys

FORMAT_VERSION = 3  # 1: without origin; 2: weights of 3, 5, 6 and 7 bits took a byte each
GRAPH_FILE = "tfmq_fx.json"
TENSORS_FILE = "model.safetensors"
ORIGIN_FILE = "origin.json"
ORIGIN_TENSORS = "origin.safetensors"
_FILES = {GRAPH_FILE, TENSORS_FILE, ORIGIN_FILE, ORIGIN_TENSORS}
_KEYS = "format format_version torch tensors graph call config extra"
_DTYPES = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a saved model holds: its graph with tensors on the CPU, and what was saved beside it.

    origin: JSON data and tensors of what it was made from, where they were saved.
    """

    gm: fx.GraphModule
    call: dict[str, Any]
    config: dict[str, Any]
    extra: dict[str, Any]
    origin: tuple[dict[str, Any], dict[str, Tensor]] | None = None


def save(
    directory: str | Path,
    *,
    gm: fx.GraphModule,
    call: dict[str, Any],
    config: dict[str, Any],
    extra: dict[str, Any],
    origin: tuple[dict[str, Any], dict[str, Tensor]] | None = None,
) -> None:
    """Write a model into `directory`, which is made, or replaced if it is an earlier save.

    call, config, extra: JSON-ready; tuples come back as lists. origin: likewise, and real tensors.
    The new files are complete on disk before an earlier save goes. Raises ArtifactError where the
    graph or a value cannot be saved, where `directory` holds anything else, and where it cannot be
    written.
    """
    target = Path(directory).resolve()
    graph = to_json(gm)
    tensors = _to_store(tensors_of(gm), graph["tensors"])
    document = {
        "format": "tfmq_fx",
        "format_version": FORMAT_VERSION,
        "torch": torch.__version__,
        "graph": graph,
    }
    for name, value in (("call", call), ("config", config), ("extra", extra)):
        document[name] = _plain(value, name)
    with _writing(target):
        recover(target, GRAPH_FILE)
        _check_replaceable(target)
        make_parents(target.parent)
    with sibling(target, "new") as new, _writing(target):
        os.mkdir(new)
        document["tensors"] = _write_tensors(new / TENSORS_FILE, tensors)
        if origin is not None:
            data, beside = origin
            document["origin"] = {
                ORIGIN_FILE: _write_json(new / ORIGIN_FILE, _plain(data, "origin")),
                ORIGIN_TENSORS: _write_tensors(
                    new / ORIGIN_TENSORS, _to_store(beside, {name: {} for name in beside})
                ),
            }
        _write_json(new / GRAPH_FILE, document)
        for path in (*new.iterdir(), new):
            sync(path)
        swap(new, target)
        sync(target.parent)


def load(directory: str | Path) -> Loaded:
    """The model saved in `directory`, in eval mode, its tensors on the CPU.

    Raises ArtifactError, saying which, if the directory or a file is missing, is not one of ours,
    comes from a newer version, is truncated or altered, or names something a graph may not hold.
    """
    place = present(Path(directory).resolve(), GRAPH_FILE)
    if not place.is_dir():
        raise ArtifactError(f"{place}: there is no such directory")
    document = _read_document(place)
    weights = place / TENSORS_FILE
    with _checked(weights, document["tensors"]):
        tensors = _read_tensors(weights)
    gm = from_json(document["graph"])
    _fill(gm, tensors, document["graph"]["tensors"], weights)
    call, config, extra = (_restored(document[name]) for name in ("call", "config", "extra"))
    origin = None
    if (files := document.get("origin")) is not None:
        keys(files, f"{place / GRAPH_FILE}: origin", f"{ORIGIN_FILE} {ORIGIN_TENSORS}")
        with _checked(place / ORIGIN_FILE, files[ORIGIN_FILE]):
            data = _restored(json.loads((place / ORIGIN_FILE).read_text()))
        with _checked(place / ORIGIN_TENSORS, files[ORIGIN_TENSORS]):
            origin = (data, _read_tensors(place / ORIGIN_TENSORS))
    return Loaded(gm, call, config, extra, origin)


def saved_bytes(directory: str | Path) -> int:
    """Bytes on disk of the model saved in `directory`, less those that only `refresh` reads.

    Raises ArtifactError if there is none.
    """
    place = present(Path(directory).resolve(), GRAPH_FILE)
    try:
        return sum((place / name).stat().st_size for name in (GRAPH_FILE, TENSORS_FILE))
    except OSError as error:
        raise ArtifactError(f"{place} holds no saved model: {error}") from error


# ---------------------------------------------------------------- JSON


def _plain(value: Any, where: str) -> Any:
    """`value` in JSON's own types, with a tag for the floats that JSON lacks."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if type(key) is not str:
                raise ArtifactError(f"{where}: key {key!r} is not a string")
        return {k: _plain(v, f"{where}[{k!r}]") for k, v in value.items()}
    raise ArtifactError(f"{where}: a {type(value).__name__} cannot be written as JSON")


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(v) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"$float"}:
        return float(value["$float"])
    return {k: _restored(v) for k, v in value.items()}


def _read_document(place: Path) -> dict[str, Any]:
    path = place / GRAPH_FILE
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ArtifactError(f"{place} is not a model saved by tfmq_fx: no {GRAPH_FILE}") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is truncated or not JSON: {error}") from error
    if not _is_ours(document):
        raise ArtifactError(f"{path} was not written by tfmq_fx")
    version = document["format_version"]
    if type(version) is not int or version < 1:
        raise ArtifactError(f"{path}: format_version {version!r} is not a version number")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format_version {version}, and this tfmq_fx reads up to {FORMAT_VERSION}; "
            "install a newer tfmq_fx"
        )
    return keys(document, str(path), _KEYS, "origin" if version > 1 else "")


def _is_ours(document: Any) -> bool:
    return (
        isinstance(document, dict)
        and document.get("format") == "tfmq_fx"
        and "format_version" in document
    )


# ---------------------------------------------------------------- tensors


def _write_json(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """The file's fingerprint."""
    path.write_text(json.dumps(document, separators=(",", ":"), allow_nan=False))
    return _fingerprint(path)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The file's fingerprint."""
    safetensors.torch.save_file(tensors, path)
    os.chmod(path, os.stat(path.parent).st_mode & 0o666)  # safetensors writes 0600
    return _fingerprint(path)


def _to_store(tensors: dict[str, Tensor], table: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the file: contiguous, on the CPU, sharing no memory, each once."""
    stored: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, entry in table.items():
        if "same_as" in entry:
            continue
        value = tensors[name].detach()
        if value.dtype not in _DTYPES:
            raise ArtifactError(f"{name}: tensors of {value.dtype} cannot be saved")
        if value.is_meta:
            raise ArtifactError(f"{name}: the tensor is on the meta device and has no content")
        value = value.resolve_conj().resolve_neg().cpu()
        if value.is_complex():  # which safetensors does not know
            value = torch.view_as_real(value)
        value = value.contiguous()
        if value.untyped_storage().data_ptr() in used:  # part of another one: safetensors refuses
            value = value.clone()
        used.add(value.untyped_storage().data_ptr())
        stored[name] = value
    return stored


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in memory of their own.

    In the file they start at any byte, where torch aligns to 64. Kernels choose their path by
    alignment (5e-7 on a small UNet), and a loaded model is to be bit-identical to the saved one.
    """
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def _fill(
    gm: fx.GraphModule, tensors: dict[str, Tensor], table: dict[str, Any], path: Path
) -> None:
    """Put the tensors of the file into the graph's empty ones."""
    wanted = {name for name, entry in table.items() if "same_as" not in entry}
    if wanted != set(tensors):
        raise ArtifactError(
            f"{path} does not fit the graph: missing {sorted(wanted - set(tensors))}, "
            f"not used {sorted(set(tensors) - wanted)}"
        )
    filled: dict[str, Tensor] = {}
    for name, empty in tensors_of(gm).items():
        value = tensors[table[name].get("same_as", name)]
        if empty.is_complex() and value.shape[-1:] == (2,):
            value = torch.view_as_complex(value)
        if value.shape != empty.shape or value.dtype != empty.dtype:
            raise ArtifactError(
                f"{path}: {name} is {value.dtype} {tuple(value.shape)}, "
                f"but the graph takes {empty.dtype} {tuple(empty.shape)}"
            )
        filled[name] = value
    persistent = gm.state_dict().keys()
    gm.load_state_dict({k: v for k, v in filled.items() if k in persistent}, assign=True)
    for name, value in filled.items():
        owner, leaf = owner_of(gm, name)
        if leaf not in owner._parameters:
            owner._buffers[leaf] = value  # also those that a state dict leaves out
    for name, entry in table.items():
        if "same_as" in entry:
            (owner, leaf), (other, first) = owner_of(gm, name), owner_of(gm, entry["same_as"])
            if isinstance(other._parameters.get(first), nn.Parameter):
                owner._parameters[leaf] = other._parameters[first]
            else:
                owner._buffers[leaf] = other._buffers[first]


# ---------------------------------------------------------------- files


def _fingerprint(path: Path, size: int | None = None) -> dict[str, Any]:
    """Size and SHA-256; the file is not read where its size already differs from `size`."""
    found = path.stat().st_size
    if size is not None and found != size:
        return {"bytes": found, "sha256": ""}
    with path.open("rb") as file:
        return {"bytes": found, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@contextlib.contextmanager
def _checked(path: Path, expected: Any) -> Iterator[None]:
    """Read a file inside that is what was written. Raises ArtifactError, saying what is wrong."""
    expected = keys(expected, f"{path.parent / GRAPH_FILE}: {path.name}", "bytes sha256")
    try:
        found = _fingerprint(path, expected["bytes"])
        if found != expected:
            what = "bytes" if found["bytes"] != expected["bytes"] else "sha256"
            raise ArtifactError(
                f"{path} is truncated or was altered: its {what} is {found[what]}, "
                f"but {GRAPH_FILE} says {expected[what]}"
            )
        yield
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing") from error
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot save to {target}: {error}") from error


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(f"{target} exists and is not a directory")
    found = {path.name for path in target.iterdir()}
    if not found:
        return
    try:
        ours = _is_ours(json.loads((target / GRAPH_FILE).read_text()))
    except (OSError, ValueError, RecursionError):
        ours = False
    if not ours:
        raise ArtifactError(f"{target} is not empty and not a model saved by tfmq_fx; left alone")
    if foreign := sorted(found - _FILES):
        raise ArtifactError(
            f"{target} holds files that saving it again would delete: {foreign}; "
            "move them or save elsewhere"
        )
