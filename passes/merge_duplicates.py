"""Merge nodes that compute the same from the same values.

a = embed_0(t);  b = embed_1(t)    ->    a = embed_0(t)   and a for b, where the weights are equal
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.binding_times import RANDOM, WRITTEN, binding_times
from tfmq_fx.ir.graph import OPAQUE, fork
from tfmq_fx.ir.graph_pass import Rewrite, graph_pass


@graph_pass(takes=Stage.CAPTURED, gives=Stage.CAPTURED)
def merge_duplicates(gm: fx.GraphModule) -> Rewrite:
    """The graph without repeated computations; outputs are unchanged (exactly).

    Two nodes are one where they do the same to the same values; layers where they are of one class,
    say the same of themselves (`repr`) and hold equal tensors.  Random operations and whatever is
    written in place stay apart, as do layers with hooks and those on the meta device.
    details["merged"]: the path of each layer that went -> the path of the one that serves for it.
    """
    deps = binding_times(gm).deps
    candidates: dict[Any, list[fx.Node]] = {}
    merged: dict[str, str] = {}
    changed = 0
    for node in list(gm.graph.nodes):
        if node.op in ("placeholder", "output") or deps[node] & {RANDOM, WRITTEN}:
            continue
        if "writes" in node.meta or node.meta.get("val") is None:
            continue
        alike = candidates.setdefault(_key(gm, node), [])
        same = next((other for other in alike if _equal(gm, node, other)), None)
        if same is None:
            alike.append(node)
            continue
        if node.op == "call_module" and node.target != same.target:
            merged[str(node.target)] = str(same.target)
        node.replace_all_uses_with(same, propagate_meta=False)
        gm.graph.erase_node(node)
        changed += 1
    gm = fork(gm)  # without the tensors that nothing reads now
    return Rewrite(gm, changed, details={"merged": merged})


def _key(gm: fx.GraphModule, node: fx.Node) -> Any:
    """A key that is equal for nodes that may be duplicates."""
    target: Any = node.target
    if node.op == "call_module":
        module = gm.get_submodule(str(target))
        target = (type(module), repr(module))
    elif node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(gm)
        target = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else target
    return node.op, target, repr(node.args), repr(node.kwargs)


def _equal(gm: fx.GraphModule, node: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes with the same key are duplicates."""
    if node.target == other.target or node.op not in ("call_module", "get_attr"):
        return True
    if node.op == "get_attr":  # parameters have names that users know them by
        values = [operator.attrgetter(str(n.target))(gm) for n in (node, other)]
        return not any(isinstance(v, nn.Parameter) for v in values) and _same_tensor(*values)
    if not gm.meta.get(OPAQUE, {}).keys().isdisjoint((str(node.target), str(other.target))):
        return False  # their code may differ in what `repr` does not say
    a, b = gm.get_submodule(str(node.target)), gm.get_submodule(str(other.target))
    if any(m._forward_hooks or m._forward_pre_hooks for m in (*a.modules(), *b.modules())):
        return False
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        _same_tensor(first[name], second[name]) for name in first
    )


def _same_tensor(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    if a is b:
        return True
    if a.is_meta or b.is_meta or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b)
