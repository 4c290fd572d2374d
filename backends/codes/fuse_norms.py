"""Fuse group norms with the quantization of their results.

q = quantize_input(silu(group_norm(x) * factor + shift), s)    ->    q = norm(x, ..., s)
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tfmq_fx.ir.layer_edits import buffer_before, call_before, layer_input
from tfmq_fx.ir.node_info import op_name

from .layers import quantize_input
from .matching import (
    Codes,
    as_tokens,
    called,
    is_tensor,
    moves,
    node_shape,
    only_user,
    positions_after,
    positions_of,
    written_nodes,
)

_CASTS = frozenset(["to", "type", "float", "half", "bfloat16"])
_GROUP_NORM = inspect.signature(F.group_norm)


MOST_RUNS = 2  # of channels, each with a grid of its own, that the kernels take
NormCodes = Callable[..., Tensor]
"""An engine's kernel that makes the codes of silu(group_norm(x) * factor + shift), as a function
that a graph can call: (x, groups, weight, bias, eps, factor, shift, silu, scales, zeros, sizes,
levels, pads, dtype) -> codes, borders included.

x: (B, C, H, W) or (B, C, N), read without a copy where channels lie last in memory.
weight, bias: (C,), or None.  factor, shift: (B, C, 1, ...), or None.  silu: False leaves it out.
scales, zeros, sizes: for each run of channels its scale, (1,) or (B,) float32, the zero point of
its grid, and its number of channels.  levels: the largest code.  pads: see `Pads`.
dtype: of the result, (B, top + H + bottom, left + W + right, C), with N and 1 for H and W.
"""


@dataclass(slots=True)
class _Norm:
    """A group norm and the operations between its result and the codes.

    path: of the module whose `weight` and `bias` it has; None where these are nodes.
    factor, shift: nodes (B, C, 1, ...).  inside: the nodes to replace, in order.
    """

    x: fx.Node
    groups: int
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    path: str | None
    inside: list[fx.Node]
    factor: fx.Node | None = None
    shift: fx.Node | None = None
    silu: bool = False

    @property
    def value(self) -> fx.Node:
        """The node of the last operation that was matched so far."""
        return self.inside[-1]

    @property
    def reads(self) -> set[fx.Node | None]:
        """The nodes outside the match that it reads."""
        return {self.x, self.weight, self.bias, self.factor, self.shift}


@dataclass(slots=True)
class _Readers:
    """The calls of `quantize_input` that read a norm.

    sizes: channels that each one reads.  views: nodes between the norm and them.
    tokens: whether they read places as tokens.
    """

    nodes: list[fx.Node]
    sizes: list[int]
    views: list[fx.Node] = field(default_factory=list)
    tokens: bool = False


def fuse_norms(gm: fx.GraphModule, *, norm: NormCodes) -> int:
    """Replace group norms by a kernel that makes codes directly, in place; returns how many.

    quantize_input(silu(group_norm(x) * factor + shift), s)    ->    norm(x, ..., s)

    factor and shift, (B, C, 1, ...), and silu may be missing.  Codes are for convolutions, which
    may read slices of the channels, each on a grid of its own, or for linear layers that read
    places as tokens.  Nothing is rounded to 16 bits between the norm and the codes any more.
    Left alone where something else reads a value on the way.
    norm: makes the codes.
    """
    written, changed = written_nodes(gm), 0
    for node in list(gm.graph.nodes):
        candidate = _match_norm(gm, node)
        if candidate is None:
            continue
        _match_modulation(candidate)
        _match_activation(gm, candidate)
        readers = _image_readers(candidate.value) or _token_readers(candidate.value)
        if readers is None or len(readers.nodes) > MOST_RUNS or candidate.reads & written:
            continue
        if _hoist(readers.nodes):
            _replace(gm, candidate, readers, norm)
            changed += 1
    return changed


def _match_norm(gm: fx.GraphModule, node: fx.Node) -> _Norm | None:
    """The match of a node that computes a group norm of images or token rows; None for others."""
    if module := called(gm, node, nn.GroupNorm):
        groups, eps, path = module.num_groups, module.eps, str(node.target)
        norm = _Norm(layer_input(node), groups, None, None, eps, path, [node])
    elif node.target is F.group_norm:
        bound = _GROUP_NORM.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        x, groups, weight, bias, eps = bound.args
        norm = _Norm(x, groups, weight, bias, eps, None, [node])
    else:
        return None
    if norm.x.meta["val"].dim() not in (3, 4):
        return None
    if _is_cast(norm.x) and norm.x.meta["val"].dtype == torch.float32 and only_user(norm.x):
        norm.inside.insert(0, norm.x)  # exact, and what the kernel does by itself
        norm.x = norm.x.all_input_nodes[0]
    _match_casts(norm)
    return norm


def _match_modulation(norm: _Norm) -> None:
    """Extend the match by value * factor and value + shift."""
    shape = node_shape(norm.x)[:2] + ["1"] * (norm.x.meta["val"].dim() - 2)
    for name in ("mul", "add"):
        user = only_user(norm.value)
        if user is None or op_name(user) != name or user.kwargs or len(user.args) != 2:
            continue
        others = [a for a in user.args if a is not norm.value and is_tensor(a)]
        if len(others) == 1 and node_shape(others[0]) == shape:
            if name == "mul":
                norm.factor = others[0]
            else:
                norm.shift = others[0]
            norm.inside.append(user)
            _match_casts(norm)


def _match_activation(gm: fx.GraphModule, norm: _Norm) -> None:
    """Extend the match by silu(value) or value * sigmoid(value)."""
    value, users = norm.value, list(norm.value.users)
    if len(users) == 1 and (called(gm, users[0], nn.SiLU) or op_name(users[0]) == "silu"):
        norm.inside.append(users[0])
        norm.silu = True
    elif {op_name(user) for user in users} == {"mul", "sigmoid"} and len(users) == 2:
        gate, product = sorted(users)
        if only_user(gate) is product and set(product.args) == {value, gate}:
            norm.inside += [gate, product]
            norm.silu = True
    _match_casts(norm)


def _match_casts(norm: _Norm) -> None:
    """Extend the match by casts of the value to another float dtype."""
    while (user := only_user(norm.value)) is not None and _is_cast(user):
        norm.inside.append(user)


def _is_cast(node: fx.Node) -> bool:
    if op_name(node) not in _CASTS or not is_tensor(node.args[0]):
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]
    floats: bool = before.is_floating_point() and after.is_floating_point()
    return floats and before.device == after.device


def _image_readers(value: fx.Node) -> _Readers | None:
    """The readers of a norm for convolutions; None unless they are all that reads the value, or
    slices that together make all its channels."""
    channels = value.meta["val"].shape[1]
    if value.meta["val"].dim() != 4 or not isinstance(channels, int):
        return None
    nodes: list[fx.Node] = []
    sizes: list[int] = []
    slices: list[fx.Node] = []
    for user in sorted(value.users, key=_start):
        reader: fx.Node | None = user
        size: Any = channels
        if op_name(user) == "narrow":
            _, dim, start, size = user.args if len(user.args) == 4 else (None, None, None, None)
            if dim not in (1, -3) or start != sum(sizes) or not isinstance(size, int):
                return None
            slices.append(user)
            reader = only_user(user)
        if reader is None:
            return None
        nodes.append(reader)
        sizes.append(size)
    return _with_one_kernel(_Readers(nodes, sizes, slices)) if sum(sizes) == channels else None


def _token_readers(value: fx.Node) -> _Readers | None:
    """The reader of a norm for linear layers; None unless it alone reads the value, moved to
    (B, places, C)."""
    channels, chain = value.meta["val"].shape[1], []
    end = value
    while (user := only_user(end)) is not None and moves(user):
        chain.append(user)
        end = user
    if not chain or user is None or not isinstance(channels, int):
        return None
    positions = positions_of(value)
    if not torch.equal(positions_after(chain, positions), as_tokens(positions)):
        return None
    return _with_one_kernel(_Readers([user], [channels], chain, tokens=True))


def _start(node: fx.Node) -> int:
    start = node.args[2] if op_name(node) == "narrow" else 0
    return start if isinstance(start, int) else 0


def _with_one_kernel(readers: _Readers) -> _Readers | None:
    """The readers, or None where one kernel cannot make all their codes: dtype, range and borders
    are equal, and scales are not measured from the value."""
    if any(node.target is not quantize_input for node in readers.nodes):
        return None
    calls = [Codes._make(node.args) for node in readers.nodes]
    if any(
        (call.pads is None) != readers.tokens or call.scale.meta["val"].dim() != 1 for call in calls
    ):
        return None
    return readers if len({call[3:] for call in calls}) == 1 else None


def _hoist(nodes: list[fx.Node]) -> bool:
    """Move the scales of all these calls in front of the first call; returns False where it
    cannot."""
    first = min(nodes)
    late = [scale for node in nodes if not (scale := Codes._make(node.args).scale) < first]
    if any(not used < first for scale in late for used in scale.all_input_nodes):
        return False
    for scale in late:
        first.prepend(scale)
    return True


def _replace(gm: fx.GraphModule, norm: _Norm, readers: _Readers, kernel: NormCodes) -> None:
    first, calls = min(readers.nodes), [Codes._make(node.args) for node in readers.nodes]
    weight, bias = norm.weight, norm.bias
    if norm.path is not None:
        module = gm.get_submodule(norm.path)
        weight, bias = (
            None
            if getattr(module, name) is None
            else buffer_before(gm, first, f"{norm.path}.{name}")
            for name in ("weight", "bias")
        )
    settings = (norm.groups, weight, bias, norm.eps, norm.factor, norm.shift, norm.silu)
    codes = call_before(
        first,
        kernel,
        norm.x,
        *settings,
        [call.scale for call in calls],
        [call.zero for call in calls],
        readers.sizes,
        calls[0].levels,
        calls[0].pads or (0, 0, 0, 0),
        calls[0].dtype,
        name=f"{norm.inside[0].name}_codes",
    )
    start = 0
    for node, size in zip(readers.nodes, readers.sizes, strict=True):
        part, end = codes, start + size
        if readers.tokens:
            part = call_before(first, torch.flatten, codes, 1, 2, name=f"{codes.name}_tokens")
        elif len(calls) > 1:
            channels = (Ellipsis, slice(start, end))
            part = call_before(first, operator.getitem, codes, channels, name=f"{codes.name}_part")
        node.replace_all_uses_with(part)
        start = end
    for node in [*readers.nodes, *reversed(readers.views), *reversed(norm.inside)]:
        gm.graph.erase_node(node)
