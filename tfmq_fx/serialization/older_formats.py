"""Saved models of earlier formats as the current one would have written them.

Formats 1 to 4 called this library's classes by the modules that they lay in, and their recipes may
have fields that are gone. What is damaged is left as it is, for the checks that follow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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
"""Fields of recipes that formats 1 to 4 may have, by the class that had them.

None: the field is gone, and what it said is dropped. A mapping: these values of it are gone, and
read as others: `{AttentionSpec: {"probabilities": {"adaptive": "uniform"}}}`. The graph of a model
is what it was; only `refresh`, which converts anew, goes by what is left of the recipe.
"""


def upgrade(document: dict[str, Any]) -> None:
    """Bring what the JSON of a save of formats 1 to 4 holds up to date, in place."""
    _rename_graph(document.get("graph"))
    document["config"] = without_retired(document.get("config"), Config)
    extra = document.get("extra")
    if type(extra) is dict:
        if "prologue" in extra:
            extra["prologue"] = without_retired(extra["prologue"], PrologueSpec)
        _rename(_values(_entry(extra, "record", "removed")), "class")


def upgrade_origin(data: Any) -> None:
    """Bring what a model was made from, as formats 2 to 4 said it, up to date, in place."""
    if type(data) is not dict:
        return
    if type(overrides := data.get("overrides")) is dict:
        for name, layer in overrides.items():
            overrides[name] = without_retired(layer, LayerConfig)
    if type(text := data.get("graph")) is str and text:
        try:
            graph = parse_json(text, "the captured graph")
        except ArtifactError:
            return  # said where the graph is used
        _rename_graph(graph)
        data["graph"] = json.dumps(graph, separators=(",", ":"))


def without_retired(data: Any, kind: type) -> Any:
    """`data`, which `config_json.to_dict` made of a `kind`, without fields and values that are
    gone."""
    if type(data) is not dict:
        return data
    gone, found = RETIRED.get(kind, {}), dict[str, Any]()
    specs = spec_fields(kind)
    for key, value in data.items():
        if key in gone:
            replaced = gone[key]
            if replaced is None:
                continue
            if not isinstance(value, (dict, list)):
                value = replaced.get(value, value)
        found[key] = without_retired(value, specs[key]) if key in specs else value
    return found


def _rename_graph(graph: Any) -> None:
    _rename(_values(_entry(graph, "modules")), "class")
    nodes = _entry(graph, "nodes")
    every = nodes if type(nodes) is list else []
    _rename([node for node in every if _entry(node, "op") == "call_function"], "target")
    stacks = _entry(graph, "stacks")
    for stack in stacks if type(stacks) is list else []:
        for part in stack if type(stack) is list else []:
            if type(part) is list and len(part) == 3 and type(part[1]) is str:
                part[1] = OLD_NAMES.get(part[1], part[1])


def _rename(entries: Iterable[Any], key: str) -> None:
    for entry in entries:
        if type(name := _entry(entry, key)) is str:
            entry[key] = OLD_NAMES.get(name, name)


def _entry(data: Any, *path: str) -> Any:
    for key in path:
        data = data.get(key) if type(data) is dict else None
    return data


def _values(table: Any) -> Iterable[Any]:
    return table.values() if type(table) is dict else ()
