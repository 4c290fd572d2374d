"""Store finished parts of a conversion on disk, so that an interrupted conversion can resume.

A checkpoint is a directory: `checkpoint.json` says what was being converted, and every part is a
safetensors file of its own, complete when it gets its name.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tfmq_fx.core.distributed import from_first, rank
from tfmq_fx.core.errors import ArtifactError, ConfigError
from tfmq_fx.core.files import write_whole
from tfmq_fx.core.reading import open_regular, parse_json, read_json
from tfmq_fx.quant.quant_layer import QuantLayer

from .fingerprints import bits
from .json_values import fields, typed, words

FORMAT_VERSION = 1
_FILE = "checkpoint.json"
_ROUNDED = ("codes", "weight_scale", "weight_zero", "bias")


@dataclass(frozen=True, slots=True)
class Part:
    """The result of rounding for one layer, or for several that were learnt together.

    states: `rounded_state` of each layer by module path, none where they stay as they were.
    errors: measured values, by name.  note: why layers stay, or are not as requested.
    """

    states: dict[str, dict[str, Tensor]]
    errors: dict[str, float]
    note: str = ""


def rounded_state(layer: QuantLayer) -> dict[str, Tensor]:
    """Return the tensors that rounding sets: codes, their scales and zero points, and bias."""
    named = {name: getattr(layer, name) for name in _ROUNDED}
    return {name: value for name, value in named.items() if value is not None}


def with_rounded_state(layer: QuantLayer, state: Mapping[str, Tensor]) -> QuantLayer:
    """Return a copy of `layer` with the tensors of `rounded_state`."""
    rounded = copy.deepcopy(layer)
    for name, value in state.items():
        held = getattr(layer, name)
        if held is not None and name in ("codes", "bias") and held.shape != value.shape:
            raise ConfigError(
                f"a part of the checkpoint is of another layer: {name} has the shape "
                f"{tuple(value.shape)}, not {tuple(held.shape)}; delete the checkpoint"
            )
        setattr(rounded, name, value.detach().to(layer.codes.device, copy=True))
    return rounded


def seeded_generator(seed: int, part: str) -> torch.Generator:
    """Return the random generator of one part, independent of those of other parts."""
    digest = hashlib.sha256(f"{seed}:{part}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Checkpoint:
    """Store of the finished parts of one conversion, in `directory`.

    subject: JSON-ready description of the conversion; its parts are read by an equal one only.
    Raises ConfigError where the directory belongs to another one, saying what differs.
    taken: names of parts that were read.  damaged: those of unreadable parts, made again.
    Of several processes the first reads and writes, and sends the result to the others; all call.
    """

    def __init__(self, directory: str | Path, subject: Mapping[str, Any]) -> None:
        self.directory, self._group = Path(directory).resolve(), ""
        self.taken, self.damaged = list[str](), list[str]()
        if rank() == 0:
            self._open(json.loads(json.dumps({"format_version": FORMAT_VERSION, **subject})))

    def _open(self, expected: Mapping[str, Any]) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            path = self.directory / _FILE
            if not path.exists() and any(self.directory.glob("[!.]*")):
                raise ConfigError(f"{self.directory} is not empty and holds no checkpoint")
            if not path.exists():
                write_whole(path, json.dumps(expected, indent=1).encode())
            recorded = read_json(path, nan=True)
        except OSError as error:
            raise ConfigError(f"no checkpoint can be kept in {self.directory}: {error}") from error
        except ArtifactError as error:
            raise ConfigError(
                f"{self.directory / _FILE} is damaged ({error}); delete the directory to start anew"
            ) from error
        if different := _differences(recorded, expected):
            shown = "; ".join(different[:5]) + ("; ..." if len(different) > 5 else "")
            raise ConfigError(
                f"{self.directory} is the checkpoint of another conversion ({shown}). Convert with "
                "what it was made for, or give another directory, or delete this one."
            )

    def within(self, group: str) -> Checkpoint:
        """Return the store of one pass, whose parts may have the names of other passes' parts."""
        store = copy.copy(self)
        store._group, store.taken, store.damaged = f"{self._group}{group}/", [], []
        return store

    def load(self, name: str) -> Part | None:
        """Return the part of that name if it is finished and undamaged."""
        part, damaged = from_first(self._read(name) if rank() == 0 else (None, False), "checkpoint")
        if part is not None:
            self.taken.append(name)
        if damaged:
            self.damaged.append(name)
        return part

    def _read(self, name: str) -> tuple[Part | None, bool]:
        """Return the part, and whether its file is damaged."""
        path = self._path(name)
        if not path.exists():
            return None, False
        try:
            open_regular(path).close()
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            facts = _facts(parse_json(metadata["facts"], str(path), nan=True))
            if metadata["sha256"] != digest([self._group + name, facts, tensors]):
                return None, True
            states = {layer: dict[str, Tensor]() for layer in facts["layers"]}
            for key, value in tensors.items():
                layer, _, buffer = key.partition("/")
                states[layer][buffer] = value
        except (ArtifactError, OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None, True
        if not all(set(state) <= set(_ROUNDED) for state in states.values()):
            return None, True
        return Part(states, facts["errors"], facts["note"]), False

    def save(self, name: str, part: Part) -> None:
        """Write a finished part atomically."""
        if rank():
            return
        tensors = {
            f"{layer}/{buffer}": value.detach().cpu().contiguous().clone()
            for layer, state in part.states.items()
            for buffer, value in state.items()
        }
        facts = {"layers": list(part.states), "errors": part.errors, "note": part.note}
        check = digest([self._group + name, json.loads(json.dumps(facts)), tensors])
        metadata = {"facts": json.dumps(facts), "sha256": check}
        try:
            write_whole(self._path(name), safetensors.torch.save(tensors, metadata))
        except OSError as error:
            raise ConfigError(f"no checkpoint can be kept in {self.directory}: {error}") from error

    def _path(self, name: str) -> Path:
        full = self._group + name
        short = hashlib.sha256(full.encode()).hexdigest()[:12]  # names differ where quotes are cut
        return self.directory / f"{quote(full, safe=' ')[:180]}-{short}.safetensors"


def _facts(data: Any) -> dict[str, Any]:
    """Check the JSON that `save` writes beside the tensors of a part. Raises ArtifactError."""
    fields(data, "facts", layers=list, errors=dict, note=str)
    words(data["layers"], "facts.layers")
    typed(data["errors"], "facts.errors", **dict.fromkeys(data["errors"], float))
    return data  # type: ignore[no-any-return]


def finished(
    checkpoint: Checkpoint | None, name: str, make: Callable[[], Part], *, shared: bool = False
) -> Part:
    """Return the part `name` of the checkpoint, or make and store it where there is none.

    The first of several processes makes it, or all of them if `shared`; all return the first one's.
    """
    part = None if checkpoint is None else checkpoint.load(name)
    if part is None:
        part = from_first(make() if shared or rank() == 0 else Part({}, {}), name)
        if checkpoint is not None:
            checkpoint.save(name, part)
    return part


def record(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Report which parts a pass read from its checkpoint; {} where there is none."""
    if checkpoint is None:
        return {}
    return {"checkpoint": {"taken": checkpoint.taken, "made again": checkpoint.damaged}}


def digest(value: Any) -> str:
    """Compute the SHA-256 of a value made of tensors, mappings, sequences, numbers and strings."""
    state = hashlib.sha256()
    _feed(value, state.update)
    return state.hexdigest()


def _feed(value: Any, update: Callable[[Any], None]) -> None:
    if isinstance(value, Tensor):
        update(f"{value.dtype}{tuple(value.shape)}".encode())
        update(bits(value).cpu().contiguous().numpy().data)
    elif isinstance(value, Mapping):
        update(f"mapping {len(value)}".encode())
        for key in sorted(value, key=repr):
            _feed([key, value[key]], update)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        update(f"sequence {len(value)}".encode())
        for item in value:
            _feed(item, update)
    else:
        update(f"{type(value).__name__} {value!r};".encode())


def _differences(there: Any, here: Any, where: str = "") -> list[str]:
    """Describe where two JSON values differ, with the values where those are short."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            line
            for key in {**here, **there}
            for line in _differences(
                there.get(key), here.get(key), f"{where}.{key}" if where else key
            )
        ]
    if there == here:
        return []
    is_short = max(len(json.dumps(there)), len(json.dumps(here))) <= 40
    return [f"{where}: {there!r} there, {here!r} here" if is_short else f"another {where}"]
