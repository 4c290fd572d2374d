"""Write an fx.GraphModule, without the contents of its tensors, as JSON, and rebuild it.

Nothing in a saved graph is evaluated, unpickled or imported by name unless `allowlist` allows it.
"""

from __future__ import annotations

import keyword
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.core.stages import REPLACED, Stage, stage_of
from tfmq_fx.ir.verifier import check
from tfmq_fx.quant.timestep_table import FEATURE

from .allowlist import check_node, function_name, function_named
from .json_values import decode, dtype_name, dtype_named, encode, fields, naming, words
from .module_json import (
    install_computed,
    install_modules,
    install_tensors,
    modules_json,
    owner_of,
    tensors_json,
    tensors_of,
)
from .saved_names import class_name
from .symbolic_sizes import SymbolReader, SymbolWriter

log = logging.getLogger(__name__)

_NODE_META = ("source", FEATURE, "writes", REPLACED)  # kept beside "val" and "nn_module_stack"
_GRAPH: dict[str, Any] = {
    "name": str,
    **dict.fromkeys(("nodes", "stacks"), list),
    **dict.fromkeys(("modules", "tensors", "meta"), dict),
    "symbols": object,
}


def to_json(gm: fx.GraphModule) -> dict[str, Any]:
    """Return `gm` without the contents of its tensors, as JSON-ready data for `from_json`.

    Saved: nodes, modules, the names, shapes and sharing of tensors, the nodes' "val",
    "nn_module_stack", "source", "feature", "writes" and "replaced", and the graph's metadata that
    is plain data, the stage or a small tensor. Other metadata, type annotations and tensors that
    no node uses are left out. Raises ArtifactError, naming the node, on a call or value that is
    not allowed.
    """
    if type(gm.graph._codegen) is not CodeGen:
        raise ArtifactError(
            f"the graph's code generator is a {type(gm.graph._codegen).__name__}; "
            "only graphs of plain positional inputs can be saved"
        )
    symbols, stacks = SymbolWriter(), _Stacks()
    return {
        "name": type(gm).__name__,
        "nodes": [_node_json(node, symbols, stacks) for node in gm.graph.nodes],
        "stacks": stacks.table,
        "modules": modules_json(gm),
        "tensors": tensors_json(gm),
        "symbols": symbols.table,
        "meta": _meta_json(gm.meta),
    }


def from_json(data: dict[str, Any], tensors: Mapping[str, Tensor] | None = None) -> fx.GraphModule:
    """Rebuild the graph that `to_json` saved.

    tensors: by name; left out, parameters and buffers are empty, on the meta device: fill them with
    `load_state_dict(strict=True, assign=True)`.
    Values are FakeTensors of a fresh ShapeEnv whose symbols are shared as they were. The module is
    in eval mode and has passed `verifier.check`. Raises ArtifactError on anything that `to_json`
    would not have written.
    """
    with naming("the saved graph"):
        return _from_json(data, tensors)


def _from_json(data: dict[str, Any], tensors: Mapping[str, Tensor] | None) -> fx.GraphModule:
    fields(data, "graph", **_GRAPH)
    symbols, graph, nodes = SymbolReader(data["symbols"]), fx.Graph(), dict[str, fx.Node]()
    stacks = [_stack(entry, f"graph.stacks[{i}]") for i, entry in enumerate(data["stacks"])]
    for i, entry in enumerate(data["nodes"]):
        with naming(f"graph.nodes[{i}]"):
            _add_node(graph, entry, nodes, symbols, stacks)
    outputs = [i for i, node in enumerate(nodes.values()) if node.op == "output"]
    if outputs != [len(nodes) - 1]:
        raise ArtifactError(f"graph.nodes: outputs at {outputs}, but only the last node may be one")
    root = nn.Module()
    install_modules(root, data["modules"], "graph.modules")
    install_tensors(root, data["tensors"], "graph.tensors", tensors)
    install_computed(root)
    name = data["name"]
    gm = fx.GraphModule(root, graph, name if _is_class_name(name) else "GraphModule")
    used, listed = set(tensors_of(gm)), set(data["tensors"])
    if used != listed:
        raise ArtifactError(
            f"the saved graph lists tensors it does not use ({sorted(listed - used)}) "
            f"or uses tensors it does not list ({sorted(used - listed)})"
        )
    for tensor, entry in data["tensors"].items():
        if not entry.get("persistent", True):  # fx forgets it
            owner, leaf = owner_of(gm, tensor)
            owner._non_persistent_buffers_set.add(leaf)
    gm.meta.update(_meta(data["meta"]))
    _check_meta(gm)
    gm.eval()
    check(gm, stage_of(gm))
    return gm


class _Stacks:
    """Table of module stacks: each is written once, and the nodes that share it have its index."""

    def __init__(self) -> None:
        self.table: list[list[list[str]]] = []
        self._position: dict[str, int] = {}

    def index(self, stack: Mapping[str, Any]) -> int:
        """Return the index of a "nn_module_stack" in the table."""
        entry = [
            [path, kind if isinstance(kind, str) else class_name(kind), key]
            for key, (path, kind) in stack.items()
        ]
        position = self._position.setdefault(repr(entry), len(self.table))
        if position == len(self.table):
            self.table.append(entry)
        return position


def _node_json(node: fx.Node, symbols: SymbolWriter, stacks: _Stacks) -> dict[str, Any]:
    def reference(value: Any) -> Any:
        return {"node": value.name} if isinstance(value, fx.Node) else NotImplemented

    check_node(node)
    where = f"{node.name}: argument"
    function = node.op == "call_function"
    saved: dict[str, Any] = {
        "name": node.name,
        "op": node.op,
        "target": function_name(node.target, node.name) if function else node.target,
        "args": [encode(v, f"{where} {i}", reference) for i, v in enumerate(node.args)],
        "kwargs": {k: encode(v, f"{where} {k}", reference) for k, v in node.kwargs.items()},
    }
    if "val" in node.meta:
        saved["val"] = symbols.encode(node.meta["val"], f"{node.name}: meta['val']")
    elif node.op not in ("output", "get_attr"):
        raise ArtifactError(f"{node.name}: no meta['val'] to save")
    if "nn_module_stack" in node.meta:
        saved["nn_module_stack"] = stacks.index(node.meta["nn_module_stack"] or {})
    for key in _NODE_META:
        if key in node.meta:
            saved[key] = encode(node.meta[key], f"{node.name}: meta[{key!r}]")
    return saved


def _add_node(
    graph: fx.Graph,
    entry: dict[str, Any],
    nodes: dict[str, fx.Node],
    symbols: SymbolReader,
    stacks: list[dict[str, tuple[str, str]]],
) -> None:
    optional = " ".join(("val", "nn_module_stack", *_NODE_META))
    fields(entry, "node", optional, name=str, op=str, target=str, args=list, kwargs=dict)
    name, op = entry["name"], entry["op"]

    def reference(other: Any) -> fx.Node:
        if type(other) is not str or other not in nodes:
            raise ArtifactError(f"{name}: uses {other!r}, which does not come before it")
        return nodes[other]

    if name in nodes:
        raise ArtifactError(f"{name}: two nodes of this name")
    where = f"{name}: argument"
    args = tuple(decode(v, where, {"node": reference}) for v in entry["args"])
    kwargs = {k: decode(v, where, {"node": reference}) for k, v in entry["kwargs"].items()}
    target = entry["target"]
    if op == "call_function":
        target = function_named(target, name)
    node = nodes[name] = graph.create_node(op, target, args, kwargs, name=name)
    check_node(node)
    if "val" in entry:
        node.meta["val"] = symbols.decode(entry["val"], f"{name}: meta['val']")
    if "nn_module_stack" in entry:
        index = entry["nn_module_stack"]
        if type(index) is not int or not 0 <= index < len(stacks):
            raise ArtifactError(f"{name}: there is no module stack {index!r:.80}")
        node.meta["nn_module_stack"] = dict(stacks[index])
    for key in _NODE_META:
        if key in entry:
            node.meta[key] = decode(entry[key], f"{name}: meta[{key!r}]")


def _stack(entry: Any, where: str) -> dict[str, tuple[str, str]]:
    with naming(f"{where}: {entry!r:.80} is no list of path, class and key"):
        return {key: (path, kind) for path, kind, key in (words(part, where) for part in entry)}


def _is_class_name(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name) and len(name) < 200


def _check_meta(gm: fx.GraphModule) -> None:
    """Raise ArtifactError unless the metadata that the library reads has the right types."""
    inputs = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    conditions = gm.meta.get("conditions", ())
    for key, is_right, kind in (
        ("stage", isinstance(gm.meta.get("stage", Stage.CAPTURED), Stage), "is no stage"),
        ("timesteps", _are_keys(gm.meta.get("timesteps")), "is no ascending set of timesteps"),
        ("timestep", gm.meta.get("timestep") in (None, *inputs), "is no input"),
        (
            "conditions",
            type(conditions) in (tuple, list) and all(name in inputs for name in conditions),
            "are no inputs",
        ),
    ):
        if not is_right:
            raise ArtifactError(f"graph.meta.{key}: {gm.meta[key]!r:.80} {kind}")


def _are_keys(timesteps: Any) -> bool:
    """Whether `timesteps` is None or a (K,) tensor of ascending keys."""
    if timesteps is None:
        return True
    if not isinstance(timesteps, Tensor) or timesteps.dtype not in (torch.int64, torch.float64):
        return False
    if timesteps.dim() != 1 or not len(timesteps):
        return False
    return bool((timesteps[1:] > timesteps[:-1]).all())


def _meta_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    def special(value: Any) -> Any:
        if isinstance(value, Stage):
            return {"stage": value.value}
        if isinstance(value, Tensor):
            return {"values": [dtype_name(value.dtype), encode(value.tolist(), "gm.meta")]}
        return NotImplemented

    saved: dict[str, Any] = {}
    for key, value in meta.items():
        try:
            saved[key] = encode(value, f"gm.meta[{key!r}]", special)
        except ArtifactError as error:
            log.debug("not saved with the graph: %s", error)
    return saved


def _meta(saved: dict[str, Any]) -> dict[str, Any]:
    def values(body: Any) -> Tensor:
        dtype, numbers = body
        return torch.tensor(decode(numbers, "graph.meta"), dtype=dtype_named(dtype, "graph.meta"))

    meta: dict[str, Any] = {}
    for key, value in saved.items():
        with naming(f"graph.meta.{key}"):
            meta[key] = decode(value, "value", {"stage": Stage, "values": values})
    return meta
