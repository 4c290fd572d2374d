"""Split a graph into a prologue, computed once for a request, and the step that is repeated.

step(x, t, c):  h = linear(silu(embed(t) + label(c)));  y = f(x, h)
    ->    prologue(t, c): h;    step(x, t, h): y = f(x, h)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from tfmq_fx.core.stages import stage_of
from tfmq_fx.ir.graph import timestep_node
from tfmq_fx.ir.graph_pass import Declined
from tfmq_fx.ir.min_cut import stored_bytes
from tfmq_fx.ir.node_info import is_heavy, is_view
from tfmq_fx.ir.request_cut import find_request, left_nodes, tensors_of
from tfmq_fx.ir.subgraphs import extract
from tfmq_fx.ir.verifier import check


@dataclass(frozen=True, slots=True)
class Part:
    """The values of one set of conditions, as a graph (t (B,), *conditions) -> tuple of values.

    conditions: placeholders.  stepped: whether the values depend on the timestep.  names: of the
    step's inputs that hold them.  batched: which have the batch as dimension 0.  returned: which
    may share memory with an output.  step_bytes: of one sample's values (for each step, where
    stepped).
    """

    conditions: tuple[str, ...]
    stepped: bool
    names: tuple[str, ...]
    batched: tuple[bool, ...]
    returned: tuple[bool, ...]
    step_bytes: int
    graph: fx.GraphModule


@dataclass(frozen=True, slots=True)
class Split:
    """The prologue and the step of a graph; all parts share its modules and parameters.

    step: what is computed at every step; its inputs are `kept`, those of the whole graph that it
    still reads, and then the values of the parts, part by part.  freed: parameters and buffers that
    no step reads, by name.  declined: what stays in the step, and why.
    """

    step: fx.GraphModule
    kept: tuple[str, ...]
    parts: tuple[Part, ...]
    freed: dict[str, Tensor]
    declined: tuple[Declined, ...]


def split_prologue(
    gm: fx.GraphModule,
    conditions: Sequence[str],
    *,
    steps: int,
) -> Split:
    """Split `gm` into prologue and step; the timestep stays an input of the step.

    conditions: placeholders that are fixed for a request.  steps: timesteps of a request, about,
    which decide what is worth storing.
    At the batch size of a request the parts compute what `gm` computes, operation by operation.
    Raises ConfigError for a condition that is no input.
    """
    groups, declined = find_request(gm, conditions, steps=steps)
    t = timestep_node(gm)
    inputs = {str(node.target): node for node in gm.graph.find_nodes(op="placeholder")}
    batch = str(t.meta["val"].shape[:1])
    shown = _shared_with_outputs(gm)
    parts, cut = [], list[fx.Node]()
    for group in groups:
        values = list(group.values)
        part = extract(gm, values, [t, *(inputs[name] for name in group.conditions)])
        part.meta |= {key: gm.meta[key] for key in ("timesteps",) if key in gm.meta}
        parts.append(
            Part(
                group.conditions,
                group.stepped,
                tuple(node.name for node in values),
                tuple(str(node.meta["val"].shape[:1]) == batch for node in values),
                tuple(node in shown for node in values),
                sum(map(stored_bytes, values)),
                part,
            )
        )
        cut += values
    (output,) = gm.graph.find_nodes(op="output")
    step = extract(gm, list(output.args[0]), [*inputs.values(), *cut], until=output)
    still_read = []
    for node in list(step.graph.find_nodes(op="placeholder")):
        if node.target not in inputs:
            continue
        if node.users or node.target == t.target:
            still_read.append(str(node.target))
        else:
            step.graph.erase_node(node)
    step.recompile()
    step.meta |= {key: value for key, value in gm.meta.items() if key not in step.meta}
    check(step, stage_of(gm))
    needed = tensors_of(gm, left_nodes(gm, cut))
    names = {id(tensor): name for name, tensor in (*gm.named_parameters(), *gm.named_buffers())}
    used = {
        key: tensor
        for part in parts
        for key, tensor in tensors_of(part.graph, part.graph.graph.nodes).items()
    }
    freed = {names[key]: value for key, value in used.items() if key not in needed}
    return Split(step, tuple(still_read), tuple(parts), freed, tuple(declined))


def _shared_with_outputs(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes that outputs may share memory with."""
    (output,) = gm.graph.find_nodes(op="output")
    todo, shared = list(output.all_input_nodes), set[fx.Node]()
    while todo:
        node = todo.pop()
        if node not in shared:
            shared.add(node)
            plain = node.op == "call_module" and not is_heavy(gm, node)  # Identity, Flatten, ...
            todo += node.all_input_nodes if plain or is_view(node) else ()
    return shared
