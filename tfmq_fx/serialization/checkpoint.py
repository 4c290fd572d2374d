"""Finished parts of a conversion on disk, so that one that was interrupted goes on where it was.

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

from .json_values import keys, typed

FORMAT_VERSION = 1
_FILE = "checkpoint.json"
_ROUNDED = ("codes", "weight_scale", "weight_zero", "bias")


@dataclass(frozen=True, slots=True)
class Part:
    """What rounding found for a layer, or for some that were learnt together.

    states: `rounded_state` of each layer by module path, none where they stay as they were.
    errors: what was measured, by name.  note: why they stay, or are not what was wanted.
    """

    states: dict[str, dict[str, Tensor]]
    errors: dict[str, float]
    note: str = ""


def rounded_state(layer: QuantLayer) -> dict[str, Tensor]:
    """What rounding decides of a layer: its codes, their scales and zero points, and its bias."""
    named = {name: getattr(layer, name) for name in _ROUNDED}
    return {name: value for name, value in named.items() if value is not None}


def with_rounded_state(layer: QuantLayer, state: Mapping[str, Tensor]) -> QuantLayer:
    """A new layer, as `layer` but for what `rounded_state` gave."""
    made = copy.deepcopy(layer)
    for name, value in state.items():
        held = getattr(layer, name)
        if held is not None and name in ("codes", "bias") and held.shape != value.shape:
            raise ConfigError(
                f"a part of the checkpoint is of another layer: {name} has the shape "
                f"{tuple(value.shape)}, not {tuple(held.shape)}; delete the checkpoint"
            )
        setattr(made, name, value.detach().to(layer.codes.device, copy=True))
    return made


def seeded_generator(seed: int, part: str) -> torch.Generator:
    """The random numbers of one part, which do not depend on what was drawn for others."""
    digest = hashlib.sha256(f"{seed}:{part}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Checkpoint:
    """The finished parts in `directory`, which is made if need be.

    subject: JSON-ready, what is being converted; parts are only taken where it was the same.
    Raises ConfigError where the directory belongs to anything else, saying what differs.
    taken: parts found finished.  damaged: parts found unreadable, which are made again.
    Of many processes the first reads and writes, and tells the others; all call alike.
    """

    def __init__(self, directory: str | Path, subject: Mapping[str, Any]) -> None:
        self.directory, self._group = Path(directory).resolve(), ""
        self.taken, self.damaged = list[str](), list[str]()
        if rank() == 0:
            self._open(json.loads(json.dumps({"format_version": FORMAT_VERSION, **subject})))

    def _open(self, wanted: Mapping[str, Any]) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            path = self.directory / _FILE
            if not path.exists() and any(self.directory.glob("[!.]*")):
                raise ConfigError(f"{self.directory} is not empty and holds no checkpoint")
            if not path.exists():
                write_whole(path, json.dumps(wanted, indent=1).encode())
            found = read_json(path, nan=True)
        except OSError as error:
            raise ConfigError(f"no checkpoint can be kept in {self.directory}: {error}") from error
        except ArtifactError as error:
            raise ConfigError(
                f"{self.directory / _FILE} is damaged ({error}); delete the directory to start anew"
            ) from error
        if different := _differences(found, wanted):
            shown = "; ".join(different[:5]) + ("; ..." if len(different) > 5 else "")
            raise ConfigError(
                f"{self.directory} is the checkpoint of another conversion ({shown}). Convert with "
                "what it was made for, or give another directory, or delete this one."
            )

    def within(self, group: str) -> Checkpoint:
        """The parts of one pass, whose names may be those of other passes' parts."""
        made = copy.copy(self)
        made._group, made.taken, made.damaged = f"{self._group}{group}/", [], []
        return made

    def load(self, name: str) -> Part | None:
        """The part of that name if it is finished and whole."""
        part, damaged = from_first(self._read(name) if rank() == 0 else (None, False), "checkpoint")
        if part is not None:
            self.taken.append(name)
        if damaged:
            self.damaged.append(name)
        return part

    def _read(self, name: str) -> tuple[Part | None, bool]:
        """The part, and whether there is one that cannot be read."""
        path = self._path(name)
        if not path.exists():
            return None, False
        try:
            open_regular(path).close()
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                facts = _facts(parse_json(file.metadata()["facts"], str(path), nan=True))
                sound = file.metadata()["sha256"] == digest([self._group + name, facts, tensors])
                states = {layer: dict[str, Tensor]() for layer in facts["layers"]}
                for key, value in tensors.items():
                    layer, _, buffer = key.partition("/")
                    states[layer][buffer] = value
                sound = sound and all(set(state) <= set(_ROUNDED) for state in states.values())
        except (ArtifactError, OSError, SafetensorError, ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            return None, True
        return Part(states, facts["errors"], facts["note"]), False

    def save(self, name: str, part: Part) -> None:
        """Write a finished part; it is there whole or not at all."""
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
    """What `save` writes beside the tensors of a part. Raises ArtifactError."""
    keys(data, "facts", "layers errors note")
    typed(data, "facts", layers=list, errors=dict, note=str)
    if not all(type(name) is str for name in data["layers"]):
        raise ArtifactError("facts.layers: not all are names")
    if not all(type(error) in (int, float) for error in data["errors"].values()):
        raise ArtifactError("facts.errors: not all are numbers")
    return data  # type: ignore[no-any-return]


def finished(
    checkpoint: Checkpoint | None, name: str, make: Callable[[], Part], *, shared: bool = False
) -> Part:
    """The part `name` of the checkpoint, or else what `make` gives, which goes there.

    Of many processes the first one makes it, or with `shared` all take part in that; what the first
    one gives is the part for all of them.
    """
    part = None if checkpoint is None else checkpoint.load(name)
    if part is None:
        part = from_first(make() if shared or rank() == 0 else Part({}, {}), name)
        if checkpoint is not None:
            checkpoint.save(name, part)
    return part


def record(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What a pass took from its checkpoint, for the report; nothing where there is none."""
    if checkpoint is None:
        return {}
    return {"checkpoint": {"taken": checkpoint.taken, "made again": checkpoint.damaged}}


def digest(value: Any) -> str:
    """SHA-256 of a value: tensors by their bytes, mappings, sequences, and what has a faithful repr
    (numbers, strings)."""
    state = hashlib.sha256()
    _feed(value, state.update)
    return state.hexdigest()


def _feed(value: Any, update: Callable[[Any], None]) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        plain = torch.view_as_real(plain) if plain.is_complex() else plain
        update(plain.flatten().view(torch.uint8).numpy().data)
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


def _differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    """Where two JSON values differ, with the values where those are short."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for key in dict.fromkeys([*wanted, *found])
            for line in _differences(
                found.get(key), wanted.get(key), f"{where}.{key}" if where else key
            )
        ]
    if found == wanted:
        return []
    shown = max(len(json.dumps(found)), len(json.dumps(wanted))) <= 40
    return [f"{where}: {found!r} there, {wanted!r} here" if shown else f"another {where}"]
