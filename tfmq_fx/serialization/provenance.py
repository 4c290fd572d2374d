"""Record how a converted model was made, so that it can be made again from other weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from tfmq_fx.calibration.sampling_pass import SamplingPass
from tfmq_fx.capture.call_spec import CallSpec
from tfmq_fx.capture.model_checks import check_model
from tfmq_fx.capture.outside_tensors import BAKED, OUTSIDE, outside_parameters
from tfmq_fx.core.config_json import from_dict, to_dict
from tfmq_fx.core.errors import ArtifactError, ConfigError
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.reading import parse_json

from .call_json import call_from_json
from .fingerprints import Fingerprint, is_readable
from .graph_json import from_json, to_json
from .json_values import fields, naming, words
from .module_json import tensors_of
from .module_settings import Behaviour, differences, explained, portable, restored
from .saved_names import is_own
from .source_tensors import (
    UnfusedAdapter,
    changed_tensors,
    check_same_model,
    fill,
    shown,
    tensor_at,
    ties,
)

Rows = Mapping[float, list[tuple[Tensor, ...]]]
Seen = Mapping[str, Mapping[float, tuple[float, float]]]
_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("graph", "obstacle"), str),
    **dict.fromkeys(("overrides", "fingerprints", "merged"), dict),
    **dict.fromkeys(("visits", "parameters", "ties", "complex"), list),
    "timesteps": list | None,
    "calibrated": bool,
    **dict.fromkeys(("call", "behaviour"), object),  # checked by their own readers
}
_PLAIN = ("graph", "obstacle", "merged", "calibrated", "parameters", "ties", "steps")
_CONSTANT, _SCALES, _RANGE, _SAMPLE = "constant/", "scales/", "range/", "sample/"


@dataclass(frozen=True, slots=True)
class Calibration:
    """The part of calibration that a conversion read.

    seen: site -> timestep -> lowest and highest input.  rows: the samples of each timestep, on the
    CPU.  sampling: the calibration itself, where the recipe runs it again; it cannot be saved.
    """

    seen: Seen
    rows: Rows
    sampling: SamplingPass | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """The captured model without its weights, and everything else that a conversion depends on.

    graph: the captured graph as JSON, or "" where `obstacle` says why it cannot be written.
    timesteps: (K,) keys of the conversion if it had any, on the CPU.  visits: of each, by
    calibration.
    fingerprints: of each tensor of the graph that is the source's.  parameters: names of all of the
    source's.  ties: those that were one.  constants: tensors made while the model was captured.
    merged: layers that capture found equal to others.  calibrated: whether the conversion read its
    calibration; that may be gone all the same, with a save that left it out.
    scales: buffers of the graph over `timesteps`, where the model is over other ones by now.
    behaviour: of the source's modules when they were captured.
    steps: names of the steps of the conversion, in order; () for the standard ones, as they were
    before steps had names.
    """

    graph: str
    obstacle: str
    call: CallSpec
    overrides: Mapping[str, LayerConfig]
    timesteps: Tensor | None
    visits: Mapping[float, int]
    fingerprints: Mapping[str, Fingerprint]
    parameters: tuple[str, ...]
    ties: tuple[tuple[str, ...], ...]
    merged: Mapping[str, str]
    constants: Mapping[str, Tensor]
    calibrated: bool
    calibration: Calibration | None
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    behaviour: Behaviour = field(default_factory=dict)
    steps: tuple[str, ...] = ()

    def captured(self, source: nn.Module) -> fx.GraphModule:
        """Return the captured graph with the weights of `source`, whose memory it shares.

        Raises ConfigError, naming what differs, where `source` is another model, behaves otherwise
        than when it was captured, or has adapters that are not fused into its weights.
        """
        if not isinstance(source, nn.Module):
            raise ConfigError(f"the source must be a torch.nn.Module, got {type(source).__name__}")
        check_model(source)
        if self.obstacle:
            raise ConfigError(
                f"the graph of this model cannot be kept ({self.obstacle}): prepare and convert "
                "the source anew"
            )
        gm = from_json(parse_json(self.graph, "the captured graph"))
        if any(is_own(type(module)) for module in gm.modules()):
            raise ArtifactError("the captured graph is damaged: it holds layers of tfmq_fx")
        fill(gm, source, self.constants)
        check_same_model(source, known=self.parameters, tied=self.ties)
        if different := differences(self.behaviour, source):
            raise ConfigError(
                f"this {type(source).__name__} behaves otherwise than the one that was captured: "
                f"{explained(different)}. Prepare and convert it anew, or set it back."
            )
        return gm

    def changed(self, source: nn.Module) -> list[str]:
        """Return the names of the tensors and attributes of `source` that are gone or differ from
        those that the model was made from."""
        return [*changed_tensors(source, self.fingerprints), *differences(self.behaviour, source)]

    def portable(self) -> Provenance:
        """Return a copy without the parts that are valid in this process only."""
        calibration = self.calibration and dataclasses.replace(self.calibration, sampling=None)
        return dataclasses.replace(
            self, calibration=calibration, behaviour=portable(self.behaviour)
        )

    def to_parts(self, *, calibration: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return JSON-ready data and tensors for `from_parts`.

        calibration: whether to include the ranges and samples of calibration.
        """
        data: dict[str, Any] = {
            **{name: getattr(self, name) for name in _PLAIN},
            "call": self.call.to_dict(),
            "overrides": {name: to_dict(layer) for name, layer in self.overrides.items()},
            "timesteps": None if self.timesteps is None else self.timesteps.tolist(),
            "visits": [[step, count] for step, count in self.visits.items()],
            "fingerprints": {name: f.to_dict() for name, f in self.fingerprints.items()},
            "behaviour": portable(self.behaviour),
        }
        tensors = {_CONSTANT + name: value for name, value in self.constants.items()}
        tensors |= {_SCALES + name: value for name, value in self.scales.items()}
        if calibration and self.calibration is not None:
            for site, seen in self.calibration.seen.items():
                rows = [[step, low, high] for step, (low, high) in seen.items()]
                tensors[_RANGE + site] = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
            samples = [(step, row) for step, rows in self.calibration.rows.items() for row in rows]
            data["samples"] = [[step, len(row)] for step, row in samples]
            for i, (_, row) in enumerate(samples):
                tensors |= {f"{_SAMPLE}{i}/{j}": value for j, value in enumerate(row)}
        data["complex"] = [name for name, value in tensors.items() if value.is_complex()]
        for name in data["complex"]:
            tensors[name] = torch.view_as_real(tensors[name].resolve_conj())
        return data, tensors

    @classmethod
    def from_parts(
        cls, data: Any, tensors: Mapping[str, Tensor], outputs: Collection[type] = ()
    ) -> Self:
        """Restore what `to_parts` returned. Raises ArtifactError where it is damaged.

        outputs: see `call_json.call_from_json`.
        """
        fields(data, "origin", "samples steps", **_FIELDS)
        words([*data["merged"].values()], "origin.merged")
        ties = [words(names, f"origin.ties[{i}]") for i, names in enumerate(data["ties"])]
        with naming("origin"):
            pairs = {name: torch.view_as_complex(tensors[name]) for name in data["complex"]}
            tensors = {**tensors, **pairs}
            prints = {n: Fingerprint.from_dict(v, n) for n, v in data["fingerprints"].items()}
            return cls(
                graph=data["graph"],
                obstacle=data["obstacle"],
                call=call_from_json(data["call"], "origin.call", outputs),
                overrides={n: from_dict(v, LayerConfig) for n, v in data["overrides"].items()},
                timesteps=_timesteps(data["timesteps"]),
                visits={step: int(count) for step, count in data["visits"]},
                fingerprints=prints,
                parameters=words(data["parameters"], "origin.parameters"),
                ties=tuple(ties),
                merged=data["merged"],
                constants=_under(tensors, _CONSTANT),
                calibrated=data["calibrated"],
                calibration=_calibration(data["samples"], tensors) if "samples" in data else None,
                scales=_under(tensors, _SCALES),
                behaviour=restored(data["behaviour"], "origin.behaviour"),
                steps=words(data.get("steps", []), "origin.steps"),
            )


def describe(captured: fx.GraphModule, source: nn.Module) -> dict[str, Any]:
    """Return the fields of a `Provenance` that follow from a captured graph and its source model.

    Every weight is read once, for its fingerprint, and none is stored.
    """
    graph, obstacle, tensors = "", "", dict[str, Tensor]()
    try:
        tensors = tensors_of(captured)
        graph = json.dumps(to_json(captured), separators=(",", ":"))
    except ArtifactError as error:
        obstacle = str(error)
    if names := outside_parameters(captured.meta.get(OUTSIDE, {})):
        obstacle = f"{shown(names)}: its code reads weights of modules that are no parts of it"
    baked = {name: tensor_at(source, name) for name in captured.meta.get(BAKED, ())}
    if baked:
        obstacle = f"{shown([*baked])}: its code computes constants of them that no graph follows"
    tensors |= {name: value for name, value in baked.items() if value is not None}
    constants = [name for name in tensors if _is_constant(source, name)]
    return {
        "graph": graph,
        "obstacle": obstacle,
        "fingerprints": {
            name: Fingerprint.of(value)
            for name, value in tensors.items()
            if name not in constants and is_readable(value)
        },
        "parameters": tuple(dict(source.named_parameters(remove_duplicate=False))),
        "ties": ties(source, set(tensors)),
        "constants": {name: tensors[name].detach().cpu().clone() for name in constants},
    }


def _is_constant(source: nn.Module, name: str) -> bool:
    """Whether a tensor of the graph is not the model's, but was made during capture."""
    try:
        return tensor_at(source, name) is None
    except UnfusedAdapter:
        return False


def _timesteps(values: list[Any] | None) -> Tensor | None:
    if values is None:
        return None
    if not values or not all(type(value) in (int, float) for value in values):
        raise ArtifactError(f"origin.timesteps: {values!r:.80} are no timesteps")
    floating = any(isinstance(value, float) for value in values)
    return torch.tensor(values, dtype=torch.float64 if floating else torch.int64)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _calibration(samples: list[Any], tensors: Mapping[str, Tensor]) -> Calibration:
    seen = {
        site: {step: (low, high) for step, low, high in rows.tolist()}
        for site, rows in _under(tensors, _RANGE).items()
    }
    rows: dict[float, list[tuple[Tensor, ...]]] = {}
    for i, (step, count) in enumerate(samples):
        row = tuple(tensors[f"{_SAMPLE}{i}/{j}"] for j in range(count))
        rows.setdefault(step, []).append(row)
    return Calibration(seen, rows)
