"""Convert the JSON of saved models of formats 3 and 4 to that of the current format.

They called this library's classes by the modules that they lay in, and their recipes may
have fields that no longer exist. Damaged parts are left unchanged for the checks that follow.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from tfmq_fx.core.config import AttentionSpec, Config, PrologueSpec, RewriteSpec
from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.core.layer_config import LayerConfig
from tfmq_fx.core.reading import parse_json
from tfmq_fx.core.spec_checks import spec_fields

from .saved_names import OLD_NAMES

RETIRED: dict[type, dict[str, Mapping[Any, Any] | None]] = {
    AttentionSpec: {"probabilities": {"adaptive": "uniform"}},
    PrologueSpec: {"mode": None, "precision": None},
    RewriteSpec: {"first_token": None},
}
"""Fields of recipes that formats 3 and 4 may have, by the class that had them.

None: the field no longer exists, and is dropped. A mapping: these values of it no longer exist,
and are replaced: `{AttentionSpec: {"probabilities": {"adaptive": "uniform"}}}`. The graph of a
model does not change; only `refresh`, which converts anew, reads the recipe.
"""


def upgrade(document: dict[str, Any]) -> None:
    """Convert the content of `tfmq_fx.json` to the current format, in place."""
    document["config"] = without_retired(document["config"], Config)
    extra = document["extra"] = _with_current_names(document["extra"])
    document["graph"] = _with_current_names(document["graph"])
    if type(extra) is dict and "prologue" in extra:
        extra["prologue"] = without_retired(extra["prologue"], PrologueSpec)


def upgrade_origin(data: Any) -> None:
    """Convert the content of `origin.json` to the current format, in place."""
    if type(data) is not dict:
        return
    if type(overrides := data.get("overrides")) is dict:
        for name, layer in overrides.items():
            overrides[name] = without_retired(layer, LayerConfig)
    if type(text := data.get("graph")) is str and text:
        with contextlib.suppress(ArtifactError):  # raised again where the graph is used
            graph = _with_current_names(parse_json(text, "the captured graph"))
            data["graph"] = json.dumps(graph, separators=(",", ":"))


def without_retired(data: Any, kind: type) -> Any:
    """Return `data`, the saved fields of a `kind`, without those that no longer exist."""
    if type(data) is not dict:
        return data
    retired, current = RETIRED.get(kind, {}), dict[str, Any]()
    specs = spec_fields(kind)
    for key, value in data.items():
        replacements = retired.get(key, {})
        if replacements is None:
            continue
        if not isinstance(value, (dict, list)):
            value = replacements.get(value, value)
        current[key] = without_retired(value, specs[key]) if key in specs else value
    return current


def _with_current_names(data: Any) -> Any:
    """Return JSON data with the current names of this library's classes and functions."""
    if type(data) is dict:
        return {key: _with_current_names(value) for key, value in data.items()}
    if type(data) is list:
        return [_with_current_names(value) for value in data]
    return OLD_NAMES.get(data, data) if type(data) is str else data
