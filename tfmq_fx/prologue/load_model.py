"""Load a saved model from its files and check them against each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import fx

from tfmq_fx.conversion.diffusers_form import DiffusersForm
from tfmq_fx.conversion.graph_model import ModelConfig
from tfmq_fx.conversion.models import Converted
from tfmq_fx.conversion.source_outline import SourceOutline
from tfmq_fx.core.arguments import check_many, path_of
from tfmq_fx.core.config import Config, PrologueSpec
from tfmq_fx.core.config_json import from_dict
from tfmq_fx.core.errors import ArtifactError, ConfigError
from tfmq_fx.core.inference import outside_inference_mode
from tfmq_fx.ir.node_info import writes_in_place
from tfmq_fx.quant.bit_plan import BitPlan
from tfmq_fx.serialization import artifact
from tfmq_fx.serialization.call_json import call_from_json, check_fits
from tfmq_fx.serialization.json_values import keys, naming, typed
from tfmq_fx.serialization.provenance import Provenance

from .bound_model import Bound

# What `convert` records and `report` reads.
_RECORD = {
    **dict.fromkeys(("capture", "block", "temporal", "removed"), dict),
    **dict.fromkeys(("declined", "passes"), list),
    "bits": dict | None,
    "float_bytes": int,
}


@outside_inference_mode
def load(
    path: str | Path,
    *,
    outputs: Collection[type] = (),
    device: str | torch.device | None = None,
) -> Converted:
    """The model that `save` or `save_pretrained` wrote; its outputs are bit-identical.

    device: where to put it; each tensor is moved as it is read, so that memory holds one of them.
    None: the CPU.
    outputs: your own dataclasses and named tuples that the model returns or takes; those of
    diffusers and transformers are found automatically. No other class is looked up or imported, so
    that a file from somewhere else runs no code.
    Files in the directory that `save` did not write are ignored.
    Raises ArtifactError for a directory that is missing, foreign, truncated, altered or of a newer
    format. The SHA-256 in it shows damage; who wrote it, it does not show.
    """
    path = path_of(path, "path", ArtifactError)
    check_many(outputs, "outputs", "classes")
    for each in outputs:
        if not isinstance(each, type):
            raise ConfigError(f"load(outputs=) takes classes, not {each!r:.80}")
    try:
        place = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"load(device={device!r:.80}): there is no such device") from error
    loaded = artifact.load(path, place)
    with naming(path / artifact.GRAPH_FILE):
        extra = keys(loaded.extra, "extra", "record model_config", "prologue source")
        typed(extra, "extra", record=dict, model_config=dict | None)
        call = call_from_json(loaded.call, "call", outputs)
        check_fits(call, loaded.gm, "call")
        call = dataclasses.replace(call, copied=writes_in_place(loaded.gm))
        config, prologue = extra["model_config"], extra.get("prologue")
        source = extra.get("source")
        model = Converted(
            loaded.gm,
            call,
            recipe=_configuration(loaded.config, "config", Config),
            record=_checked_record(extra["record"], loaded.gm, "extra.record"),
            model_config=None if config is None else ModelConfig(config),
            outline=None if source is None else SourceOutline.from_json(source, "extra.source"),
        )
        if prologue is not None:
            model = Bound(model, _configuration(prologue, "extra.prologue", PrologueSpec))
    if loaded.origin is not None:
        with naming(path / artifact.ORIGIN_FILE):
            model.origin = Provenance.from_parts(*loaded.origin, outputs)
    return model if place is None else model.to(place)


DiffusersForm.reader = staticmethod(load)


def _configuration(data: Any, where: str, kind: type) -> Any:
    try:
        return from_dict(data, kind)
    except (ConfigError, ArithmeticError, TypeError) as error:
        raise ArtifactError(f"{where}: {error}") from error


def _checked_record(record: dict[str, Any], gm: fx.GraphModule, where: str) -> dict[str, Any]:
    """`record`, after a check of the entries that are read later. Raises ArtifactError."""
    known = {key: kind for key, kind in _RECORD.items() if key in record}
    typed(record, where, **known)
    modules = dict(gm.named_modules())
    for path in record.get("removed", {}):
        if path in modules:
            raise ArtifactError(f"{where}.removed.{path}: the graph still has this layer")
    if record.get("bits") is not None:
        try:
            BitPlan.from_dict(record["bits"])
        except ConfigError as error:
            raise ArtifactError(f"{where}.bits: {error}") from error
    return record
