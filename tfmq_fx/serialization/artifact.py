"""Write a converted model as a directory of files, and read it back.

A saved model is a directory. `tfmq_fx.json` holds the graph, what the caller wants kept, the size
and SHA-256 of each other file, and at its end the SHA-256 of all that is before it;
`model.safetensors` holds the tensors. `origin.json` and `origin.safetensors`, which running the
model does not need, hold its `Provenance`. Other files in the directory are not read.

What is read is data: nothing in it can run code (see `allowlist`), and what it claims is compared
with the sizes of the files before anything is made of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, fx

from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.core.reading import JSON_BYTES, check_depth, open_regular, parse_json, read_json
from tfmq_fx.core.temporary_files import folder_beside

from .artifact_tensors import read_tensors, tensors_to_store
from .atomic_directory import make_parents, present, recover, swap, sync
from .graph_json import from_json, to_json
from .json_values import fields, from_plain_json, keys, naming, to_plain_json
from .module_json import tensors_of
from .older_formats import upgrade, upgrade_origin

# 3: no SHA-256 of the JSON; 4: our classes by the modules that they lay in (see `older_formats`)
OLDEST_VERSION, FORMAT_VERSION = 3, 5
GRAPH_FILE = "tfmq_fx.json"
TENSORS_FILE = "model.safetensors"
ORIGIN_FILE = "origin.json"
ORIGIN_TENSORS = "origin.safetensors"
_FILES = {GRAPH_FILE, TENSORS_FILE, ORIGIN_FILE, ORIGIN_TENSORS}
# The names that diffusers looks for; config.json is for it alone, and not read here.
DIFFUSERS_CONFIG, DIFFUSERS_TENSORS = "config.json", "diffusion_pytorch_model.safetensors"
_SAVED_VALUES = ("call", "config", "extra")
_KEYS = "format format_version torch tensors graph call config extra"
_SEAL = ',"sha256":"{}"}}'  # ends the JSON; the digest of what is before
_SEAL_BYTES = 77


@dataclass(frozen=True, slots=True)
class Loaded:
    """The content of a saved model: its graph with tensors, and the values beside it.

    origin: JSON data and tensors of its `Provenance`, where they were saved.
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
    diffusers_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a model into `directory`, which is made, or replaced if it is an earlier save.

    call, config, extra: JSON-ready; tuples come back as lists. origin: likewise, and real tensors.
    diffusers_config: the content of a config.json, which is written beside, and then the tensors
    have the name that diffusers looks for.
    The new files are complete on disk before an earlier save goes. Raises ArtifactError where the
    graph or a value cannot be saved, where `directory` holds anything else, and where it cannot be
    written.
    """
    target = Path(directory).resolve()
    graph = to_json(gm)
    tensors = tensors_to_store(tensors_of(gm), graph["tensors"])
    document = {
        "format": "tfmq_fx",
        "format_version": FORMAT_VERSION,
        "torch": torch.__version__,
        "graph": graph,
    }
    for name, value in zip(_SAVED_VALUES, (call, config, extra), strict=True):
        document[name] = to_plain_json(value, name)
    with _writing(target):
        recover(target, GRAPH_FILE)
        _check_replaceable(target)
        make_parents(target.parent)
    with _writing(target), folder_beside(target, "new") as new:
        weights = TENSORS_FILE if diffusers_config is None else DIFFUSERS_TENSORS
        document["tensors"] = _write_tensors(new / weights, tensors)
        if diffusers_config is not None:
            (new / DIFFUSERS_CONFIG).write_text(json.dumps(diffusers_config, indent=2) + "\n")
        if origin is not None:
            data, beside = origin
            stored = tensors_to_store(beside, {name: {} for name in beside})
            document["origin"] = {
                ORIGIN_FILE: _write_json(new / ORIGIN_FILE, to_plain_json(data, "origin")),
                ORIGIN_TENSORS: _write_tensors(new / ORIGIN_TENSORS, stored),
            }
        _write_json(new / GRAPH_FILE, document, seal=True)
        for path in (*new.iterdir(), new):
            sync(path)
        swap(new, target)
        sync(target.parent)


def load(directory: str | Path, device: torch.device | None = None) -> Loaded:
    """Read the model saved in `directory`: in eval mode, its tensors on `device` or the CPU.

    Raises ArtifactError if the directory or a file is missing, was not written by tfmq_fx, is of
    a newer or too old format, is truncated or altered, or names what a graph may not hold.
    """
    place = _place(directory)
    path, weights = place / GRAPH_FILE, place / _tensors_file(place)
    document = _read_document(place)
    with naming(path):
        _check_listed(place, document)
    with _checked(weights, document["tensors"]):
        tensors = read_tensors(weights, device)
    with naming(path):
        gm = from_json(document["graph"], tensors)
        parts = {name: from_plain_json(document[name], name) for name in _SAVED_VALUES}
    return Loaded(gm, **parts, origin=_read_origin(place, document))


def _place(directory: str | Path) -> Path:
    try:
        place = present(Path(directory).resolve(), GRAPH_FILE)
        if place.is_dir():
            return place
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL, too long a name
        raise ArtifactError(f"{str(directory)!r:.200} is no directory: {error}") from error
    raise ArtifactError(f"{place}: there is no such directory")


def _tensors_file(place: Path) -> str:
    """Return the name of the file of tensors, of two that it may have."""
    named = (place / TENSORS_FILE).exists() or not (place / DIFFUSERS_TENSORS).exists()
    return TENSORS_FILE if named else DIFFUSERS_TENSORS


def _read_origin(
    place: Path, document: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    files = document.get("origin")
    if files is None or document["format_version"] < 4:  # format 3 lacks the modules' settings
        return None
    keys(files, f"{place / GRAPH_FILE}: origin", f"{ORIGIN_FILE} {ORIGIN_TENSORS}")
    with _checked(place / ORIGIN_FILE, files[ORIGIN_FILE]):
        data = from_plain_json(read_json(place / ORIGIN_FILE), str(place / ORIGIN_FILE))
    with _checked(place / ORIGIN_TENSORS, files[ORIGIN_TENSORS]):
        tensors = read_tensors(place / ORIGIN_TENSORS)
    if document["format_version"] < 5:
        upgrade_origin(data)
    return data, tensors


def _check_listed(place: Path, document: dict[str, Any]) -> None:
    """Raise ArtifactError where the directory has an origin file that the JSON does not list."""
    unlisted = [name for name in (ORIGIN_FILE, ORIGIN_TENSORS) if (place / name).exists()]
    if unlisted and "origin" not in document:
        raise ArtifactError(f"{place} holds {unlisted}, of which {GRAPH_FILE} says nothing")


def saved_bytes(directory: str | Path) -> int:
    """Return the bytes that the model in `directory` takes on disk, without its origin.

    Raises ArtifactError if there is none.
    """
    place = present(Path(directory).resolve(), GRAPH_FILE)
    try:
        files = (GRAPH_FILE, _tensors_file(place))
        return sum((place / name).stat().st_size for name in files)
    except OSError as error:
        raise ArtifactError(f"{place} holds no saved model: {error}") from error


def _read_document(place: Path) -> dict[str, Any]:
    path = place / GRAPH_FILE
    try:
        with open_regular(path, JSON_BYTES) as file:
            content = file.read()
    except FileNotFoundError as error:
        raise ArtifactError(f"{place} is not a model saved by tfmq_fx: no {GRAPH_FILE}") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    document = parse_json(content, str(path))
    if not _is_ours(document):
        raise ArtifactError(f"{path} was not written by tfmq_fx")
    version = document["format_version"]
    if type(version) is not int or version < 1:
        raise ArtifactError(f"{path}: format_version {version!r} is not a version number")
    if version < OLDEST_VERSION:
        raise ArtifactError(
            f"{path} has format_version {version}, and this tfmq_fx reads {OLDEST_VERSION} to "
            f"{FORMAT_VERSION}; convert the model anew and save it"
        )
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format_version {version}, and this tfmq_fx reads up to {FORMAT_VERSION}; "
            "install a newer tfmq_fx"
        )
    if version > 3:
        _check_seal(path, content)
    keys(document, str(path), _KEYS + (" sha256" if version > 3 else ""), "origin")
    if version < 5:
        upgrade(document)
    return document  # type: ignore[no-any-return]


def _check_seal(path: Path, content: bytes) -> None:
    """Raise ArtifactError unless the JSON is, byte for byte, what was written."""
    seal, actual = content[-_SEAL_BYTES:], hashlib.sha256(content[:-_SEAL_BYTES]).hexdigest()
    if seal.decode("utf-8", "replace") != _SEAL.format(actual):
        raise ArtifactError(
            f"{path} is truncated or was altered: its sha256 is {actual}, but it ends with "
            f"{seal.decode('utf-8', 'replace')!r}; save the model again"
        )


def _is_ours(document: Any) -> bool:
    return (
        isinstance(document, dict)
        and document.get("format") == "tfmq_fx"
        and "format_version" in document
    )


def _write_json(path: Path, document: dict[str, Any], *, seal: bool = False) -> dict[str, Any]:
    """Write a JSON file and return its size and SHA-256.

    seal: end the file with the SHA-256 of all bytes before.
    """
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    check_depth(text.encode(), str(path.name))
    if seal:
        text = text.removesuffix("}")
        text += _SEAL.format(hashlib.sha256(text.encode()).hexdigest())
    path.write_text(text)
    return _fingerprint(path)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file and return its size and SHA-256."""
    safetensors.torch.save_file(tensors, path)
    os.chmod(path, os.stat(path.parent).st_mode & 0o666)  # safetensors writes 0600
    return _fingerprint(path)


def _fingerprint(path: Path, size: int | None = None) -> dict[str, Any]:
    """Return the size and SHA-256 of a file; it is not read where its size differs from `size`."""
    with open_regular(path) as file:
        length = os.fstat(file.fileno()).st_size
        if size is not None and length != size:
            return {"bytes": length, "sha256": ""}
        return {"bytes": length, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@contextlib.contextmanager
def _checked(path: Path, expected: Any) -> Iterator[None]:
    """Check the size and SHA-256 of a file before the body reads it. Raises ArtifactError."""
    where = f"{path.parent / GRAPH_FILE}: {path.name}"
    fields(expected, where, bytes=int, sha256=str)
    try:
        actual = _fingerprint(path, expected["bytes"])
        for key in ("bytes", "sha256"):
            if actual[key] != expected[key]:
                raise ArtifactError(
                    f"{path} is truncated or was altered: its {key} is {actual[key]}, "
                    f"but {GRAPH_FILE} says {expected[key]}"
                )
        yield
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot save to {target}: {error}") from error


def _check_replaceable(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{target} exists and is not a directory")
    names = {path.name for path in target.iterdir()} if target.exists() else None
    if not names:
        return
    try:
        ours = _is_ours(read_json(target / GRAPH_FILE))
    except (ArtifactError, OSError):
        ours = False
    if not ours:
        raise ArtifactError(f"{target} is not empty and not a model saved by tfmq_fx; left alone")
    own = _FILES if TENSORS_FILE in names else {*_FILES, DIFFUSERS_CONFIG, DIFFUSERS_TENSORS}
    if foreign := sorted(names - own):
        raise ArtifactError(
            f"{target} holds files that saving it again would delete: {foreign}; "
            "move them or save elsewhere"
        )
