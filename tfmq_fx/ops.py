"""Operators: the look-up by timestep, which this library adds to torch, with the rules of its keys;
and what we know about torch's own (what they read, what they write, which are heavy).

`torch.ops.tfmq_fx.timestep_row` is one node in an fx graph and in an exported one, and plain aten
operators under AOTAutograd, so that Inductor can fuse it.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .dialect import Stage, introduced_by
from .errors import ConfigError, InputError

_LIBRARY = torch.library.Library("tfmq_fx", "FRAGMENT")
_LIBRARY.define(
    "timestep_row(Tensor table, Tensor keys, Tensor t) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_SHOWN = 8  # values listed in an error message


def timestep_index(keys: Tensor, t: Tensor) -> Tensor:
    """Row of each timestep: (B,) int64, -1 where `t` is not one of `keys`.

    keys: (K,), ascending and unique, K >= 1.  t: (B,) or (), then B = 1.
    Values are compared exactly: as int64 if both are integers, else as float64.  NaN is no key.
    """
    wide = _wide(keys.dtype, t.dtype)
    known, wanted = keys.to(wide), t.reshape(-1).to(wide).contiguous()
    # searchsorted alone would hand an unknown timestep the row of its neighbour
    row = torch.searchsorted(known, wanted).clamp(max=known.shape[0] - 1)
    return torch.where(known[row] == wanted, row, -1)


def _timestep_row(table: Tensor, keys: Tensor, t: Tensor) -> Tensor:
    if not (table.is_floating_point() or table.is_complex()):
        raise TypeError(f"timestep_row: table must hold floating-point rows, not {table.dtype}")
    index = timestep_index(keys, t)
    if _in_eager_on_cpu(index):
        if bool((index < 0).any()):
            raise InputError(_unknown_message(keys, t))
        return table.index_select(0, index)
    rows = table.index_select(0, index.clamp(min=0))
    hit = (index >= 0).view(-1, *[1] * (table.dim() - 1))
    return torch.where(hit, rows, float("nan"))


_LIBRARY.impl("timestep_row", _timestep_row, "CompositeImplicitAutograd")
timestep_row = torch.ops.tfmq_fx.timestep_row.default
"""timestep_row(table, keys, t) -> (B, F): the row of `table` for each timestep.

table: (K, F), floating point or complex.  keys: (K,), ascending, unique.
t: (B,) or (), then B = 1.
A timestep that is no key raises InputError in eager on the CPU.  In a compiled graph, and on other
devices, where nothing may wait for the result, its row is NaN: it never passes silently.
"""
timestep_row.stage = Stage.FOLDED  # type: ignore[attr-defined]


def find_unknown(keys: Tensor, t: Tensor) -> list[int | float]:
    """The values in `t` that are no key, ascending and each once; waits for the device."""
    flat = t.detach().reshape(-1)
    missing = timestep_index(keys, flat) < 0
    if not bool(missing.any()):  # the usual case waits once, and for little
        return []
    values: list[int | float] = flat[missing].unique().tolist()
    return values


def check_timesteps(values: Tensor | Sequence[int | float], dtype: torch.dtype) -> Tensor:
    """The keys for a model that receives its timestep as `dtype`: (K,) ascending int64 or float64.

    values: the finite set, one-dimensional, in any order.  They are rounded to `dtype` first, since
    keys are the values that the model receives.  Raises ConfigError if the set is empty, holds NaN
    or Inf, holds a value twice (after rounding), or holds one that an integer `dtype` cannot.
    """
    # as numpy reads it: torch would round Python's floats to the default dtype
    given = torch.as_tensor(values if isinstance(values, Tensor) else np.asarray(values)).detach()
    if given.dim() != 1:
        raise ConfigError(f"timesteps must be one-dimensional, got shape {tuple(given.shape)}")
    if len(given) == 0:
        raise ConfigError("timesteps are empty: a table needs at least one row")
    if given.is_complex() or given.dtype == torch.bool:
        raise ConfigError(f"timesteps must be integers or floats, got {given.dtype}")
    if given.is_floating_point() and not bool(torch.isfinite(given).all()):
        raise ConfigError("timesteps hold NaN or Inf")
    received = given.to(dtype)
    if not dtype.is_floating_point:
        if lost := given[received.to(given.dtype) != given].tolist():
            raise ConfigError(f"the model takes {dtype} timesteps, which cannot hold {_show(lost)}")
    elif not bool(torch.isfinite(received).all()):
        raise ConfigError(f"timesteps overflow {dtype}, in which the model takes them")
    keys = received.to(_wide(dtype)).sort().values
    if repeated := keys[1:][keys[1:] == keys[:-1]].unique().tolist():
        raise ConfigError(f"duplicate timesteps (as {dtype}): {_show(repeated)}")
    return keys


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if any(d.is_floating_point for d in dtypes) else torch.int64


def _in_eager_on_cpu(value: Tensor) -> bool:
    # Tracers (Dynamo, AOTAutograd, export, FakeTensor propagation) pass subclasses or set the flag.
    return (
        value.device.type == "cpu" and type(value) is Tensor and not torch.compiler.is_compiling()
    )


def _unknown_message(keys: Tensor, t: Tensor) -> str:
    return (
        f"no table row for timestep {_show(find_unknown(keys, t))}; "
        f"the table knows {len(keys)} timesteps: {_show(keys.tolist())}"
    )


def _show(values: Sequence[int | float]) -> str:
    text = ", ".join(map(str, values[:_SHOWN]))
    return f"{text}, ... ({len(values)} in all)" if len(values) > _SHOWN else text


# ---------------------------------------------------------------------------- facts about torch


def op_name(node: fx.Node) -> str:
    """The bare name of a call: "add" for operator.add, torch.add, aten.add.Tensor and x.add(...);
    "" for other nodes, calls of modules among them."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def size_hint(size: Any) -> int:
    """A size as it was when the model was captured; 1 where that is not known."""
    return int(size.node.hint or 1) if isinstance(size, torch.SymInt) else int(size)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SHAPE_READS = _words(
    """sym_size sym_numel sym_stride size numel nelement stride dim ndim shape dtype device layout
    is_floating_point is_complex is_contiguous _assert_tensor_metadata"""
)
_SHAPE_OF_FIRST = _words(
    """zeros_like ones_like empty_like full_like rand_like randn_like randint_like
    new_zeros new_ones new_empty new_full new_tensor"""
)
_SHAPE_OF_SECOND = _words("to type_as view_as expand_as reshape_as")
_RANDOM = _words(
    """rand randn randint randperm normal bernoulli multinomial poisson
    rand_like randn_like randint_like"""
)
_WRITES = _words("setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor imatmul")
_VIEWS = _words(
    """view reshape view_as reshape_as expand expand_as transpose permute movedim swapaxes t mT
    unsqueeze squeeze flatten unflatten ravel narrow select chunk split unbind tensor_split getitem
    getattr contiguous to type type_as float half bfloat16 double detach alias dropout real imag
    view_as_real view_as_complex diagonal as_strided unfold"""
)
_HEAVY = _words(
    """linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    convolution embedding embedding_bag matmul mm bmm mv addmm addmv baddbmm addbmm einsum tensordot
    scaled_dot_product_attention multi_head_attention_forward"""
)


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values `node` reads; not those it asks only for shape, dtype or device."""
    name = op_name(node)
    if name in _SHAPE_READS or (name == "getattr" and node.args[1] in _SHAPE_READS):
        return []
    ignored = 0 if name in _SHAPE_OF_FIRST else 1 if name in _SHAPE_OF_SECOND else None
    found: list[fx.Node] = []
    for i, argument in enumerate(node.args):
        if i != ignored:
            _collect(argument, found)
    _collect(node.kwargs, found)
    return found


def is_view(node: fx.Node) -> bool:
    """Whether the result of `node` may share memory with its first argument, judged by name."""
    return op_name(node) in _VIEWS


def is_random(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` draws random numbers; dropout does so only where it is in training mode."""
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
    """Each node that writes in place, with every node that may share the memory it writes."""
    targets = {node: _written_nodes(gm, node) for node in gm.graph.nodes}
    if not any(targets.values()):
        return
    memory = {node: _storages(node.meta.get("val")) for node in gm.graph.nodes}
    for node, todo in targets.items():
        found: set[fx.Node] = set()
        while todo:
            base = todo.pop()
            if base in found:
                continue
            found.add(base)
            # Recorded values tell by shared storage; where there are none, names of views do.
            if is_view(base):
                todo += base.all_input_nodes[:1]
            for other, storages in memory.items():
                same = other.op == base.op == "get_attr" and other.target == base.target
                if same or storages & memory[base]:
                    todo.append(other)
        if found:
            yield node, found


def writes_in_place(gm: fx.GraphModule) -> bool:
    """Whether any node may write to memory that it did not make; some that do, do not say so:
    norms to running statistics, embeddings with `max_norm` to the weight."""
    silent = ("batch_norm", "instance_norm", "embedding")
    return writes_to_values(gm) or any(op_name(node) in silent for node in gm.graph.nodes)


def writes_to_values(gm: fx.GraphModule) -> bool:
    """Whether any node writes to the value of another one."""
    return any(_written_nodes(gm, node) for node in gm.graph.nodes)


def _written(gm: fx.GraphModule, node: fx.Node) -> list[Any]:
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
    quantized = introduced_by(module) in (Stage.QUANTIZED, Stage.LOWERED)
    return quantized or any(True for _ in module.parameters())


def _collect(argument: Any, found: list[fx.Node]) -> None:
    def visit(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.map_arg(argument, visit)


_signature = functools.lru_cache(inspect.signature)


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    """An argument of a Python function by name, its default included; else `default`."""
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
