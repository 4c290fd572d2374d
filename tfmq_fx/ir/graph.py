"""Find, copy and add the nodes, modules and buffers of a graph."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher

from tfmq_fx.core.errors import GraphError
from tfmq_fx.core.inference import ordinary
from tfmq_fx.quant.timestep_lookup import timestep_row

OPAQUE = "opaque"  # key of a graph's meta: path of each opaque module -> why it is one
KEYS = "temporal_keys"  # buffer of the timesteps that tables have rows for


def fork(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module that shares modules and parameters with `gm` and owns its graph.

    Of opaque modules it has copies that share all tensors, whose parts can be replaced.
    """
    # The constructor copies only what the graph refers to, as a tree of fresh containers:
    # replacing a submodule in the fork leaves the original alone.
    forked = fx.GraphModule(gm, copy.deepcopy(gm.graph), type(gm).__name__)
    forked.meta = dict(gm.meta)
    memo: dict[int, Any] = {}
    for path, module in opaque_modules(forked).items():
        memo |= {id(value): value for _, value in held_tensors(module)}
        forked.set_submodule(path, copy.deepcopy(module, memo))
    forked.train(gm.training)
    return forked


def opaque_modules(gm: fx.GraphModule) -> dict[str, nn.Module]:
    """The opaque modules that a graph calls, by path."""
    called = {str(node.target) for node in gm.graph.find_nodes(op="call_module")}
    return {path: gm.get_submodule(path) for path in gm.meta.get(OPAQUE, {}) if path in called}


def same_memory(module: nn.Module) -> dict[int, Any]:
    """A memo for copy.deepcopy that makes copies of `module` share its memory.

    Copies share buffers, and get Parameters of their own with the module's requires_grad. Tensors
    made in inference mode are copied.
    """
    memo: dict[int, Any] = {id(b): ordinary(b) if b.is_inference() else b for b in module.buffers()}
    for part in module.modules():  # a weight that a hook computes cannot be copied with its history
        computed = (v for v in vars(part).values() if isinstance(v, torch.Tensor) and not v.is_leaf)
        memo |= {id(value): value.detach() for value in computed}
    return memo | {id(p): nn.Parameter(ordinary(p), p.requires_grad) for p in module.parameters()}


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers of a module, under all of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def held_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors that the modules of a model hold, by name: parameters, buffers and others."""
    for path, module in model.named_modules(remove_duplicate=False):
        for held in (module._parameters, module._buffers, vars(module)):
            for leaf, value in held.items():
                if isinstance(value, torch.Tensor):
                    yield f"{path}.{leaf}".removeprefix("."), value


def own_modules(gm: fx.GraphModule) -> None:
    """Give a graph modules and Parameters of its own that share the memory of the old ones."""
    memo = same_memory(gm)
    for name, child in list(gm.named_children()):
        gm.add_module(name, copy.deepcopy(child, memo))
    for name, parameter in list(gm.named_parameters(recurse=False)):
        gm.register_parameter(name, memo[id(parameter)])


def module_path(node: fx.Node) -> str:
    """The path of the module whose forward recorded `node`; "" for the model itself."""
    return next(reversed(module_paths(node)), "")


def module_paths(node: fx.Node) -> list[str]:
    """The paths of the modules inside whose forward `node` was recorded, outermost first."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def device_of(gm: fx.GraphModule) -> torch.device:
    """The device of a graph's tensors, or of its timestep where it has none."""
    tensors = itertools.chain(gm.buffers(), gm.parameters())
    device: torch.device = next(tensors, timestep_node(gm).meta["val"]).device
    return device


def set_buffer(gm: fx.GraphModule, name: str, value: torch.Tensor) -> str:
    """Register `value` as a buffer `name`, or `name_1`, ... if taken; returns the name used."""
    names = itertools.chain([name], (f"{name}_{n}" for n in itertools.count(1)))
    free = next(each for each in names if not hasattr(gm, each))
    gm.register_buffer(free, value)
    return free


def timestep_node(gm: fx.GraphModule) -> fx.Node:
    """The placeholder of the timestep, whose value is (B,)."""
    name = gm.meta.get("timestep")
    placeholders: list[fx.Node] = list(gm.graph.find_nodes(op="placeholder"))
    for node in placeholders:
        if node.target == name:
            return node
    raise GraphError(f"the graph has no input {name!r}, the timestep its metadata names")


def batched_inputs(gm: fx.GraphModule) -> list[bool]:
    """Whether the first dimension of each placeholder is the batch, as that of the timestep is."""
    batch = str(timestep_node(gm).meta["val"].shape[:1])
    shapes = [node.meta["val"].shape for node in gm.graph.find_nodes(op="placeholder")]
    return [len(shape) > 0 and str(shape[:1]) == batch for shape in shapes]


def timestep_position(gm: fx.GraphModule) -> int:
    """The index of the timestep among the placeholders of a graph."""
    return list(gm.graph.find_nodes(op="placeholder")).index(timestep_node(gm))


def insert_timestep_row(
    gm: fx.GraphModule, name: str, table: torch.Tensor, timesteps: torch.Tensor
) -> fx.Node:
    """Insert a look-up of `table` (K, F) by timestep behind the placeholders; its value is (B, F).

    timesteps: (K,) sorted keys, stored once for all look-ups over the same set.
    """
    t = timestep_node(gm)
    last = list(gm.graph.find_nodes(op="placeholder"))[-1]
    table_name = set_buffer(gm, name, table)
    keys_name = next(
        (n for n, b in gm.named_buffers() if n.startswith(KEYS) and torch.equal(b, timesteps)), None
    ) or set_buffer(gm, KEYS, timesteps.clone())
    with gm.graph.inserting_before(last.next):
        keys = gm.graph.get_attr(keys_name)
        rows = gm.graph.get_attr(table_name)
        row = gm.graph.call_function(timestep_row, (rows, keys, t))
    batch = t.meta["val"]
    with batch.fake_mode:
        value = torch.empty(
            (batch.shape[0], table.shape[1]), dtype=table.dtype, device=batch.device
        )
    row.meta = {"val": value, "nn_module_stack": {"": ("", type(gm))}}
    return row


def feature_slice(graph: fx.Graph, row: fx.Node, start: int, width: int, name: str) -> fx.Node:
    """A new node row[:, start : start + width], with its value, at the graph's insertion point."""
    columns = (slice(None), slice(start, start + width))
    node = graph.create_node("call_function", operator.getitem, (row, columns), name=name)
    with enable_python_dispatcher():
        node.meta["val"] = row.meta["val"][columns]
    return node


def call_method(node: fx.Node, method: str, *args: int) -> fx.Node:
    """A new node that calls a method of `node`, with its value, at the graph's insertion point."""
    new = node.graph.create_node("call_method", method, (node, *args), name=f"{node.name}_{method}")
    with enable_python_dispatcher():
        new.meta = {**node.meta, "val": getattr(node.meta["val"], method)(*args)}
    return new
