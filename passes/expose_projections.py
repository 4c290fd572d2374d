"""Write attention modules of torch.nn and products with constant matrices as linear products.

y, _ = a(x, x, x), a torch.nn.MultiheadAttention
    ->    q, k, v = linear(x, a.in_proj_weight);  y = linear(attention(q, k, v), a.out_proj.weight)
y = x @ w    ->    y = linear(x, w.t())
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher

from tfmq_fx.core.module_overrides import is_plain
from tfmq_fx.core.stages import REPLACED, Stage
from tfmq_fx.ir.binding_times import binding_times
from tfmq_fx.ir.graph_pass import Declined, Rewrite, graph_pass

_ARGUMENTS = (
    "query key value key_padding_mask need_weights attn_mask average_attn_weights is_causal"
)
_PRODUCTS = (operator.matmul, torch.matmul, torch.ops.aten.matmul.default, torch.mm)


@graph_pass(takes=Stage.CAPTURED, gives=Stage.CAPTURED)
def expose_projections(gm: fx.GraphModule) -> Rewrite:
    """The graph in which `fold_weights` finds the projections of torch.nn.MultiheadAttention, and
    parameters that values are multiplied with by `@`.

    Outputs are equal up to the order of float additions.  Attention whose weights are used, or with
    masks of other forms than one of (L, S) or a padding mask, is declined.
    """
    declined, changed = [], 0
    attention: dict[str, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="call_module"):
        if isinstance(gm.get_submodule(str(node.target)), nn.MultiheadAttention):
            attention.setdefault(str(node.target), []).append(node)
    for path, nodes in attention.items():
        module: Any = gm.get_submodule(path)
        if reason := next(filter(None, (_obstacle(module, node) for node in nodes)), None):
            reason = f"its projections stay in floating point: {reason}"
            declined.append(Declined(path, reason))
            for node in nodes:
                node.meta[REPLACED] = reason
            continue
        for node in nodes:
            _write_out(gm, node, path, module)
        changed += len(nodes)
    deps = binding_times(gm).deps
    for node in list(gm.graph.nodes):
        weight = _matrix(node)
        if weight is None or deps[weight] or not _has_parameter(gm, weight):
            continue
        x = node.args[0]
        if not isinstance(x, fx.Node) or not deps[x] or x.meta["val"].dim() < 2:
            continue
        make = _Builder(gm, node, "")
        new = make(F.linear, x, make(torch.t, weight))
        node.replace_all_uses_with(new)
        changed += 1
    return Rewrite(gm, changed, declined)


def _matrix(node: fx.Node) -> fx.Node | None:
    """The matrix that a product multiplies values with on the right; None for other nodes."""
    called = node.op == "call_method" and node.target in ("matmul", "mm", "__matmul__")
    if not called and not (node.op == "call_function" and node.target in _PRODUCTS):
        return None
    weight = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    if not isinstance(weight, fx.Node) or not isinstance(weight.meta.get("val"), Tensor):
        return None
    return weight if weight.meta["val"].dim() == 2 else None


def _has_parameter(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a constant is computed from a parameter; a fixed matrix is no weight."""
    todo = [node]
    while todo:
        at = todo.pop()
        todo += at.all_input_nodes
        if at.op == "get_attr":
            value = operator.attrgetter(str(at.target))(gm)
            if isinstance(value, nn.Parameter):
                return True
    return False


def _call(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of nn.MultiheadAttention by name."""
    return {**dict(zip(_ARGUMENTS.split(), node.args, strict=False)), **node.kwargs}


def _obstacle(module: nn.MultiheadAttention, node: fx.Node) -> str | None:
    """Why a call of attention cannot be written out, or None where it can."""
    call = _call(node)
    if not is_plain(module) or type(module) is not nn.MultiheadAttention:
        return "it has a forward of its own"
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds keys of its own"
    if any(call[name].meta["val"].dim() != 3 for name in ("query", "key", "value")):
        return "its inputs have no batch"
    if any(u.target is not operator.getitem or (u.args[1] == 1 and u.users) for u in node.users):
        return "its attention weights are used"
    mask, padding = call.get("attn_mask"), call.get("key_padding_mask")
    if mask is not None and padding is not None:
        return "it has two masks"
    if isinstance(mask, fx.Node) and mask.meta["val"].dim() != 2:
        return "it has a mask for each head"
    if isinstance(padding, fx.Node) and padding.meta["val"].dtype != torch.bool:
        return "its padding mask is not boolean"
    return None


class _Builder:
    """Adds calls of functions in front of a node, with their values."""

    def __init__(self, gm: fx.GraphModule, before: fx.Node, path: str) -> None:
        self.gm, self.before, self.path = gm, before, path

    def __call__(self, target: Any, *args: Any, place: str = "", **kwargs: Any) -> fx.Node:
        """A call of `target`, in the module called `place` within that of the node."""
        graph = self.before.graph
        with graph.inserting_before(self.before):
            new = graph.create_node("call_function", target, args, kwargs)
        values, named = fx.map_arg((args, kwargs), lambda used: used.meta["val"])
        with enable_python_dispatcher():
            value = target(*values, **named)
        stack = dict(self.before.meta["nn_module_stack"])
        if place:
            stack[f"{self.path}.{place}"] = (f"{self.path}.{place}", nn.Linear)
        new.meta = {"val": value, "nn_module_stack": stack, "source": self.before.meta["source"]}
        return new

    def tensor(self, like: fx.Node, name: str) -> fx.Node:
        """A read of a tensor of the module."""
        with self.before.graph.inserting_before(self.before):
            new = self.before.graph.get_attr(f"{self.path}.{name}")
        tensor = operator.attrgetter(f"{self.path}.{name}")(self.gm)
        value = like.meta["val"].fake_mode.from_tensor(tensor.detach(), static_shapes=True)
        new.meta = {"val": value, "nn_module_stack": self.before.meta["nn_module_stack"]}
        return new


def _write_out(gm: fx.GraphModule, node: fx.Node, path: str, module: Any) -> None:
    """Replace a call of attention by its projections and the fused operation."""
    call, make = _call(node), _Builder(gm, node, path)
    inputs = [call[name] for name in ("query", "key", "value")]
    heads, first = module.num_heads, 0 if module.batch_first else 1  # first: the batch's dimension

    def by_head(x: fx.Node) -> fx.Node:  # (batch, heads, positions, width)
        split = make(torch.unflatten, x, -1, (heads, -1))
        return make(torch.permute, split, (first, 2, 1 - first, 3))

    query, key, value = (by_head(x) for x in _projected(make, module, inputs))
    mask = _mask(make, call)
    options: dict[str, Any] = {} if mask is None else {"attn_mask": mask}
    mixed = make(F.scaled_dot_product_attention, query, key, value, **options)
    order = (0, 2, 1, 3) if module.batch_first else (2, 0, 1, 3)
    joined = make(torch.flatten, make(torch.permute, mixed, order), 2)
    operands = [make.tensor(joined, "out_proj.weight")]
    if module.out_proj.bias is not None:
        operands.append(make.tensor(joined, "out_proj.bias"))
    result = make(F.linear, joined, *operands, place="out_proj")
    for user in list(node.users):
        user.replace_all_uses_with(result)
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _projected(make: _Builder, module: Any, inputs: list[fx.Node]) -> list[fx.Node]:
    """Query, key and value, (..., embed_dim); of one input by one product."""
    width = module.embed_dim
    bias = None if module.in_proj_bias is None else make.tensor(inputs[0], "in_proj_bias")
    if not module._qkv_same_embed_dim:
        weights = [make.tensor(x, f"{n}_proj_weight") for n, x in zip("qkv", inputs, strict=True)]
        parts = [[0], [1], [2]]
    else:
        packed = make.tensor(inputs[0], "in_proj_weight")
        weights = [make(torch.narrow, packed, 0, i * width, width) for i in range(3)]
        parts = [[0, 1, 2]] if inputs[0] is inputs[1] is inputs[2] else [[0], [1], [2]]
        if len(parts) == 3 and inputs[1] is inputs[2]:
            parts = [[0], [1, 2]]
        if len(parts[0]) == 3:
            weights = [packed]
        elif len(parts) == 2:
            weights = [weights[0], make(torch.narrow, packed, 0, width, 2 * width)]
    projected = []
    for part, weight in zip(parts, weights, strict=True):
        names = "".join("qkv"[i] for i in part)
        operands = [weight]
        if bias is not None:
            start, count = part[0] * width, len(part) * width
            operands.append(make(torch.narrow, bias, 0, start, count) if len(part) < 3 else bias)
        place = "in_proj" if len(part) == 3 else f"{names}_proj"
        y = make(F.linear, inputs[part[0]], *operands, place=place)
        for i in range(len(part)):
            whole = len(part) == 1
            projected.append(y if whole else make(torch.narrow, y, -1, i * width, width))
    return projected


def _mask(make: _Builder, call: dict[str, Any]) -> fx.Node | None:
    """The mask that the fused operation takes; its booleans say which keys count."""
    mask, padding = call.get("attn_mask"), call.get("key_padding_mask")
    if isinstance(padding, fx.Node):
        counted = make(torch.logical_not, padding)
        return make(torch.unsqueeze, make(torch.unsqueeze, counted, 1), 1)
    if not isinstance(mask, fx.Node):
        return None
    return make(torch.logical_not, mask) if mask.meta["val"].dtype == torch.bool else mask
