"""Extract regions of a graph as graphs of their own that share its modules."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, fx

from tfmq_fx.core.errors import GraphError

from .graph import OPAQUE, module_paths, timestep_node
from .node_info import op_name, writers


def extract(
    gm: fx.GraphModule,
    outputs: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    *,
    until: fx.Node | None = None,
) -> fx.GraphModule:
    """A graph module inputs -> tuple of outputs that shares the modules and parameters of `gm`.

    Sizes are read from those inputs that carry the same symbol, wherever `gm` reads them.  Writes
    in place to values inside the region come along, those behind `until` (left out, behind the last
    of `outputs`) excepted.  Raises GraphError if `outputs` need another input.
    """
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in inputs:
        env[node] = graph.placeholder(str(node.target) if node.op == "placeholder" else node.name)
        env[node].meta = dict(node.meta)
    for node in extract_nodes(gm, outputs, inputs, until=until):
        source = size_source(node, inputs)
        if source is None:
            env[node] = graph.node_copy(node, env.__getitem__)
        else:
            size = graph.call_function(torch.ops.aten.sym_size.int, (env[source[0]], source[1]))
            size.meta, env[node] = dict(node.meta), size
    graph.output(tuple(env[node] for node in outputs))
    part = fx.GraphModule(gm, graph, type(gm).__name__)
    part.meta = {key: gm.meta[key] for key in ("stage", "timestep", OPAQUE) if key in gm.meta}
    return part.train(gm.training)


def at_timesteps(graph: fx.GraphModule, timesteps: Tensor) -> tuple[Tensor, ...]:
    """The outputs (K, ...) of an extracted `graph` (t (B,) -> tuple) at `timesteps` (K,), in one
    call, or in several where it was captured at one batch size."""
    size, count = fixed_batch(graph), len(timesteps)
    if size is None:
        outputs: tuple[Tensor, ...] = graph(timesteps)
        return outputs
    padded = timesteps[torch.arange(-(-count // size) * size).clamp(max=count - 1)]
    parts = [graph(part) for part in padded.split(size)]
    return tuple(torch.cat(values)[:count] for values in zip(*parts, strict=True))


def fixed_batch(graph: fx.GraphModule) -> int | None:
    """The batch size that an extracted `graph` (t (B,) -> tuple) was captured for; None where it
    takes any."""
    (t,) = graph.graph.find_nodes(op="placeholder")
    size = t.meta["val"].shape[0]
    return size if type(size) is int else None


def as_input(graph: fx.GraphModule, timesteps: Tensor) -> Tensor:
    """Timesteps (K,) in the dtype and on the device in which the graph takes them."""
    value = timestep_node(graph).meta["val"]
    return timesteps.to(device=value.device, dtype=value.dtype)


def compute_rows(graph: fx.GraphModule, timesteps: Tensor) -> tuple[Tensor, ...]:
    """The outputs (K, ...) of an extracted `graph` (t (B,) -> tuple) at `timesteps` (K,), computed
    one timestep at a time as tables are; at the batch size that the graph was captured for, if it
    takes no other, of which the first sample counts."""
    steps, size = as_input(graph, timesteps), fixed_batch(graph) or 1
    with torch.no_grad():
        rows = [graph(step.expand(size).contiguous()) for step in steps.split(1)]
    return tuple(
        torch.cat([part[: len(part) // size] for part in parts])
        for parts in zip(*rows, strict=True)
    )


def extract_nodes(
    gm: fx.GraphModule,
    outputs: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    *,
    until: fx.Node | None = None,
) -> dict[fx.Node, None]:
    """The nodes, in graph order, that compute `outputs` from `inputs`, which are not among them."""
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    last = max((position[node] for node in ([until] if until else outputs)), default=-1)
    writes = [(node, bases) for node, bases in writers(gm) if position[node] < last]
    needed, todo = set[fx.Node](), list(outputs)
    while todo:
        node = todo.pop()
        if node in needed or node in inputs:
            continue
        if node.op == "placeholder":
            names = ", ".join(n.name for n in outputs)
            raise GraphError(f"{names}: cannot be computed without input {node.target!r}")
        needed.add(node)
        if size_source(node, inputs) is None:
            todo += node.all_input_nodes
        todo += [writer for writer, bases in writes if node in bases]
    return {node: None for node in gm.graph.nodes if node in needed}


def size_source(node: fx.Node, inputs: Sequence[fx.Node]) -> tuple[fx.Node, int] | None:
    """The input and its dimension whose size `node` holds; None if it holds no such size."""
    value = node.meta.get("val")
    if not isinstance(value, torch.SymInt):
        return None
    for source in inputs:
        tensor = source.meta.get("val")
        if isinstance(tensor, Tensor):
            for i, size in enumerate(tensor.shape):
                if isinstance(size, torch.SymInt) and size.node.expr == value.node.expr:
                    return source, i
    return None


def missing_inputs(
    gm: fx.GraphModule, nodes: Collection[fx.Node], inputs: Sequence[fx.Node]
) -> dict[fx.Node, frozenset[str]]:
    """The names of values and sizes that each of `nodes` needs beside `inputs` and their sizes."""
    missing: dict[fx.Node, frozenset[str]] = {}
    for node in gm.graph.nodes:
        if node not in nodes:
            continue
        value = node.meta.get("val")
        if node in inputs or size_source(node, inputs) is not None:
            missing[node] = frozenset()
        elif op_name(node) == "sym_size" and isinstance(value, torch.SymInt):
            missing[node] = frozenset([f"the size {value}"])
        elif node.op == "placeholder":
            missing[node] = frozenset([node.name])
        else:
            names = (missing.get(u, frozenset([u.name])) for u in node.all_input_nodes)
            missing[node] = frozenset().union(*names)
    return missing


def region(gm: fx.GraphModule, path: str) -> list[fx.Node]:
    """The nodes recorded inside the module at `path` ("" is the whole model), in graph order."""
    inner = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    return [node for node in inner if not path or path in module_paths(node)]


def region_inputs(nodes: Collection[fx.Node]) -> list[fx.Node]:
    """The values that `nodes` read from outside, in order of first use, without buffers and without
    sizes that an input tensor has."""
    inside = set(nodes)
    used = dict.fromkeys(used for node in nodes for used in node.all_input_nodes)
    outer = [node for node in used if node not in inside and node.op != "get_attr"]
    return [node for node in outer if size_source(node, outer) is None]


def region_outputs(nodes: Collection[fx.Node]) -> list[fx.Node]:
    """The tensors (and tuples) of `nodes` that are used outside, in graph order, without sizes."""
    inside = set(nodes)
    return [
        node
        for node in nodes
        if node.op != "get_attr"
        and isinstance(node.meta.get("val"), (Tensor, tuple, list))
        and any(user not in inside and reads_tensor(user) for user in node.users)
    ]


def reads_tensor(node: fx.Node) -> bool:
    """Whether a node reads its inputs' elements, not only a size."""
    return op_name(node) != "sym_size"
