"""Match nodes of a graph for the fusions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, fx, nn

from tfmq_fx.ir.node_info import op_name, size_hint, writers

from .layers import CodesLayer, ConcatLayer, Pads

M = TypeVar("M", bound=nn.Module)
_MOVES = frozenset(
    ["view", "reshape", "permute", "transpose", "flatten", "unflatten", "contiguous"]
)


class Codes(NamedTuple):
    """The arguments of a call of `quantize_input`, all given by position."""

    x: fx.Node
    scale: fx.Node
    zero: int
    levels: int
    dtype: torch.dtype
    pads: Pads | None


def written_nodes(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose memory is written in place, so that their value depends on when it is
    read."""
    return {node for _, bases in writers(gm) for node in bases}


def node_shape(node: fx.Node) -> list[str]:
    """The sizes of a tensor as text, equal where they are equal for every input."""
    return [str(size) for size in node.meta["val"].shape]


def is_tensor(value: Any) -> TypeGuard[fx.Node]:
    """Whether an argument is a node that holds a tensor."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)


def same_kind(node: fx.Node, other: fx.Node) -> bool:
    """Whether two tensors have equal sizes and dtypes."""
    same_dtype: bool = node.meta["val"].dtype == other.meta["val"].dtype
    return same_dtype and node_shape(node) == node_shape(other)


def called(gm: fx.GraphModule, node: Any, *kinds: type[M]) -> M | None:
    """The module that a node calls, if it has exactly one of these types and no hooks; else
    None."""
    module: Any = _without_hooks(gm, node)
    return module if type(module) in kinds else None


def codes_layer(gm: fx.GraphModule, node: Any) -> CodesLayer | None:
    """The layer on codes that a node calls, of any engine; None where it calls none."""
    module = _without_hooks(gm, node)
    return module if isinstance(module, CodesLayer) else None


def layer_on_codes(gm: fx.GraphModule, node: Any) -> CodesLayer | ConcatLayer | None:
    """The layer, or sum of two layers, on codes that a node calls; None where it calls none."""
    module = _without_hooks(gm, node)
    return module if isinstance(module, (CodesLayer, ConcatLayer)) else None


def _without_hooks(gm: fx.GraphModule, node: Any) -> nn.Module | None:
    """The module that a node calls; None for other nodes and for modules with hooks."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = gm.get_submodule(str(node.target))
    return None if module._forward_hooks or module._forward_pre_hooks else module


def only_user(node: fx.Node) -> fx.Node | None:
    """The only node that reads a value; None where there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def moves(node: fx.Node) -> bool:
    """Whether a node only moves the elements of its first argument, as views and copies do."""
    return op_name(node) in _MOVES and is_tensor(node.args[0])


def concatenation(node: Any) -> tuple[list[fx.Node], Any]:
    """The tensors that a node concatenates and the dimension; ([], 0) for other nodes."""
    if not is_tensor(node) or op_name(node) not in ("cat", "concat", "concatenate"):
        return [], 0
    parts: Any = node.args[0] if node.args else node.kwargs["tensors"]
    return list(parts), node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)


def positions_after(chain: Sequence[fx.Node], value: Tensor) -> Tensor:
    """The tensor `value` after a chain of nodes that only move elements (see `moves`).

    value: positions, with the sizes of capture, which the nodes are given too.
    """
    for node in chain:
        arguments: Any = (node.args[1:], node.kwargs)
        rest, kwargs = fx.map_arg(arguments, lambda used: size_hint(used.meta["val"]))
        call: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
        value = call(value, *rest, **kwargs)
    return value


def positions_of(node: fx.Node) -> Tensor:
    """A tensor of the sizes of a node's value at capture that holds the index of each element."""
    sizes = [size_hint(size) for size in node.meta["val"].shape]
    return torch.arange(torch.Size(sizes).numel(), dtype=torch.int32).view(sizes)


def as_tokens(images: Tensor) -> Tensor:
    """Images (B, C, ...) as tokens (B, places, C)."""
    return images.flatten(2).transpose(1, 2)
