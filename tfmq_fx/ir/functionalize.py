"""Functionalize in-place writes where that is unobservable; protect the others from deletion."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.core.errors import StateError

from .graph import module_path
from .node_info import words

# In-place operators and methods -> what computes the same into new memory.
PURE_FORMS: dict[Any, Any] = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
} | {
    f"{name}_": name
    for name in words(
        """abs add addcdiv addcmul clamp clamp_max clamp_min cos div exp log masked_fill mul neg pow
        reciprocal relu rsqrt sigmoid sin sqrt square sub tanh"""
    )
}


@fx.node.has_side_effect
def setitem_(x: Tensor, key: Any, value: Any) -> None:
    """Assign x[key] = value.

    It is our own function, so that marking it as a side effect (else dead code elimination would
    drop it) changes nothing for other users of torch.fx.
    """
    x[key] = value


@fx.node.has_side_effect
def inplace_(x: Tensor, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call x.method(*args, **kwargs), where the method writes to x."""
    return getattr(x, method)(*args, **kwargs)


def functionalize(
    graph: fx.Graph, root: nn.Module, writes: dict[fx.Node, tuple[fx.Node, ...]]
) -> None:
    """Replace in-place writes of `graph` by pure operations; `writes`: node -> values it writes to.

    h = iadd(x, y)  ->  h = add(x, y)   where no other value that shares x's memory is read later;
    otherwise the write stays, as a node that dead code elimination keeps, with meta["writes"] set.
    Modules and functions with inplace=True likewise.  Raises StateError for a write to the model's
    parameters or buffers.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node, bases in writes.items():
        _read_result(node, bases, order)
    memory = {node: _storage(node) for node in graph.nodes}
    pure = {node: _is_private(node, bases, order, memory) for node, bases in writes.items()}
    shared = {node.target for node, private in pure.items() if not private}
    for node, private in pure.items():
        if private and not (node.op == "call_module" and node.target in shared):
            private = _make_pure(node, root)
        if not private:
            _keep(node)


def _read_result(node: fx.Node, bases: tuple[fx.Node, ...], order: dict[fx.Node, int]) -> None:
    """Where y = f(x) writes to x and returns it, let later readers of x read y instead."""
    result = node.meta.get("val")
    if len(bases) != 1 or not isinstance(result, Tensor):
        return
    value = bases[0].meta["val"]
    if (
        _storage(node) == _storage(bases[0])
        and result.shape == value.shape
        and result.stride() == value.stride()
        and result.storage_offset() == value.storage_offset()
    ):
        later = {user for user in bases[0].users if order[user] > order[node]}
        bases[0].replace_all_uses_with(node, lambda user: user in later, propagate_meta=False)


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _is_private(
    node: fx.Node,
    bases: tuple[fx.Node, ...],
    order: dict[fx.Node, int],
    memory: dict[fx.Node, int | None],
) -> bool:
    """Whether only the node's own result is read from the memory after the write."""
    written = {memory[base] for base in bases}
    aliases = [other for other in order if memory[other] in written]
    for other in aliases:
        if other.op == "get_attr":
            raise StateError(
                f"{module_path(node) or 'the model'} ({node.meta.get('source')}): forward writes "
                f"to {other.target}, so one call changes the next; a graph holds no such state"
            )
    before = [other for other in aliases if order[other] < order[node]]
    return all(order[user] <= order[node] for other in before for user in other.users)


def _make_pure(node: fx.Node, root: nn.Module) -> bool:
    """Make a node compute into new memory; whether that was possible."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if getattr(module, "inplace", False) is not True:
            return False
        module.inplace = False  # type: ignore[assignment]
        return True
    if node.kwargs.get("inplace") is True:
        node.update_kwarg("inplace", False)
        return True
    values = [argument.meta["val"] for argument in node.all_input_nodes]
    dtypes = {value.dtype for value in values if isinstance(value, Tensor)}
    pure = PURE_FORMS.get(node.target) or _pure_overload(node.target)
    if pure is None or len(dtypes) != 1:  # promotion would change the dtype
        return False
    node.target = pure
    return True


def _pure_overload(target: Any) -> Any:
    """The overload without the write, aten.add.Tensor for aten.add_.Tensor, or None."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name = target._opname.removesuffix("_")
    if name not in PURE_FORMS.values():
        return None
    return getattr(getattr(torch.ops.aten, name), target._overloadname, None)


def _keep(node: fx.Node) -> None:
    """Mark a node as a write, and make it a function that dead code elimination keeps."""
    node.meta["writes"] = True
    method = node.target if node.op == "call_method" else None
    if node.op == "call_function" and node.target in PURE_FORMS:
        method = f"__{node.target.__name__}__"  # type: ignore[union-attr]
    if method is not None:
        node.op, node.target = "call_function", inplace_
        node.args = (node.args[0], str(method), *node.args[1:])
