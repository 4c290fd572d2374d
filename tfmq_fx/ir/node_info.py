"""Classify the nodes of a graph: what they read and write, which are views, random or heavy."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.core.stages import Stage, introduced_by


def op_name(node: fx.Node) -> str:
    """The bare name of a called function or method; "" for other nodes, module calls among them.

    It is "add" for operator.add, torch.add, aten.add.Tensor and x.add(...).
    """
    if node.op not in ("call_function", "call_method"):
        return ""
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def size_hint(size: Any) -> int:
    """The number that a size was at capture; 1 where that is not known."""
    return int(size.node.hint or 1) if isinstance(size, torch.SymInt) else int(size)


def words(text: str) -> dict[str, None]:
    """The names in a text as an ordered set."""
    return dict.fromkeys(text.split())


_SHAPE_READS = words(
    """sym_size sym_numel sym_stride size numel nelement stride dim ndim shape dtype device layout
    is_floating_point is_complex is_contiguous _assert_tensor_metadata"""
)
_SHAPE_OF_FIRST = words(
    """zeros_like ones_like empty_like full_like rand_like randn_like randint_like
    new_zeros new_ones new_empty new_full new_tensor"""
)
_SHAPE_OF_SECOND = words("to type_as view_as expand_as reshape_as")
_RANDOM = words(
    """rand randn randint randperm normal bernoulli multinomial poisson
    rand_like randn_like randint_like"""
)
_WRITES = words("setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor imatmul")
_VIEWS = words(
    """view reshape view_as reshape_as expand expand_as transpose permute movedim swapaxes t mT
    unsqueeze squeeze flatten unflatten ravel narrow select chunk split unbind tensor_split getitem
    getattr contiguous to type type_as float half bfloat16 double detach alias dropout real imag
    view_as_real view_as_complex diagonal as_strided unfold checked_sizes"""
)
_HEAVY = words(
    """linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    convolution embedding embedding_bag matmul mm bmm mv addmm addmv baddbmm addbmm einsum tensordot
    scaled_dot_product_attention multi_head_attention_forward"""
)


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose elements `node` reads, not only their shape, dtype or device."""
    name = op_name(node)
    if name in _SHAPE_READS or (name == "getattr" and node.args[1] in _SHAPE_READS):
        return []
    ignored = 0 if name in _SHAPE_OF_FIRST else 1 if name in _SHAPE_OF_SECOND else None
    args = tuple(argument for i, argument in enumerate(node.args) if i != ignored)
    inputs: list[fx.Node] = []
    fx.map_arg((args, node.kwargs), inputs.append)
    return inputs


def is_view(node: fx.Node) -> bool:
    """Whether the result of `node` may share memory with its first argument, judged by name."""
    return op_name(node) in _VIEWS


def is_random(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` draws random numbers; dropout only does in training mode."""
    if node.op == "call_module":
        return any(
            isinstance(part, (nn.modules.dropout._DropoutNd, nn.RReLU)) and part.training
            for part in gm.get_submodule(str(node.target)).modules()
        )
    name = op_name(node)
    if "dropout" in name or name == "rrelu":
        return _argument(node, "training", "dropout" in name) is not False
    if name == "scaled_dot_product_attention":
        rate = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return bool(rate != 0)
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in node.target.tags
    return name in _RANDOM


def writers(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, set[fx.Node]]]:
    """Each node that writes in place, with all nodes that may share the memory that it writes."""
    targets = {node: _written_nodes(gm, node) for node in gm.graph.nodes}
    if not any(targets.values()):
        return
    memory = {node: _storages(node.meta.get("val")) for node in gm.graph.nodes}
    for node, todo in targets.items():
        written: set[fx.Node] = set()
        while todo:
            base = todo.pop()
            if base in written:
                continue
            written.add(base)
            # Recorded values share storage; where none are recorded, views are known by name.
            if is_view(base):
                todo += base.all_input_nodes[:1]
            for other, storages in memory.items():
                same = other.op == base.op == "get_attr" and other.target == base.target
                if same or storages & memory[base]:
                    todo.append(other)
        if written:
            yield node, written


def writes_in_place(gm: fx.GraphModule) -> bool:
    """Whether any node may write to memory that it did not allocate.

    Norms may write to running statistics, embeddings with `max_norm` to the weight.
    """
    silent = ("batch_norm", "instance_norm", "embedding")
    return writes_to_values(gm) or any(op_name(node) in silent for node in gm.graph.nodes)


def writes_to_values(gm: fx.GraphModule) -> bool:
    """Whether any node writes to the value of another node."""
    return any(_written_nodes(gm, node) for node in gm.graph.nodes)


def _written(gm: fx.GraphModule, node: fx.Node) -> list[Any]:
    """The arguments that a node writes to."""
    name, first = op_name(node), list(node.args[:1])
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        idle = isinstance(module, nn.modules.dropout._DropoutNd) and not module.training
        return first if getattr(module, "inplace", False) is True and not idle else []
    if isinstance(node.target, torch._ops.OpOverload):
        values = zip_longest(node.target._schema.arguments, node.args)
        return [
            node.kwargs.get(a.name) if value is None else value
            for a, value in values
            if a.alias_info is not None and a.alias_info.is_write
        ]
    if name in _WRITES or (name.endswith("_") and not name.endswith("__")):
        return first
    if name and _argument(node, "inplace", False) is True:
        return first or [node.kwargs.get("input")]
    out = node.kwargs.get("out")
    return list(out) if isinstance(out, (tuple, list)) else [out]


def _written_nodes(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    return [
        value
        for value in _written(gm, node)
        if isinstance(value, fx.Node) and not isinstance(value.meta.get("val"), _SCALARS)
    ]


_SCALARS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def _storages(value: Any) -> frozenset[int]:
    if isinstance(value, Tensor) and value.layout is torch.strided:
        return frozenset([value.untyped_storage()._cdata])
    if isinstance(value, (tuple, list)):
        return frozenset().union(*map(_storages, value))
    return frozenset()


def is_heavy(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` multiplies matrices, looks up an embedding or calls a module with weights."""
    if node.op == "call_module":
        return has_weights(gm.get_submodule(str(node.target)))
    return op_name(node) in _HEAVY


def has_weights(module: nn.Module) -> bool:
    """Whether a module holds parameters, as floats or quantized."""
    stages = map(introduced_by, module.modules())
    quantized = any(stage in (Stage.QUANTIZED, Stage.LOWERED) for stage in stages)
    return quantized or any(True for _ in module.parameters())


_signature = functools.lru_cache(inspect.signature)


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    """The argument `name` of a Python function, or the function's default; else `default`."""
    if name in node.kwargs:
        return node.kwargs[name]
    if not isinstance(node.target, types.FunctionType):
        return default
    try:
        bound = _signature(node.target).bind_partial(*node.args, **node.kwargs)
    except TypeError:
        return default
    bound.apply_defaults()
    return bound.arguments.get(name, default)
