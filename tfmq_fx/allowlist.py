"""What a saved graph may name: functions, methods, attributes and module classes.

A saved graph is data from somewhere else. Nothing that it names is imported or called unless it is
found here: tensor functions and methods, and what tfmq_fx marks as its own. The same list holds
when saving, so that what could be saved can be loaded.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import keyword
import math
import operator
import re
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import ops as _registered  # noqa: F401 - torch.ops.tfmq_fx exists once it is imported
from .dialect import Stage
from .effects import PURE_FORMS, inplace_, setitem_
from .errors import ArtifactError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BUILTINS = _words("abs bool divmod float getattr int len list max min pow round sum tuple")
_OPERATORS = _words(
    """
    abs add and_ contains eq floordiv ge getitem gt iadd iand ifloordiv ilshift imatmul imod imul
    index inv invert ior ipow irshift is_ is_not isub itruediv ixor le lshift lt matmul mod mul ne
    neg not_ or_ pos pow rshift setitem sub truediv truth xor
    """
)
_TORCH_PYTHON = _words(
    """
    _assert atleast_1d atleast_2d atleast_3d block_diag broadcast_shapes broadcast_tensors
    cartesian_prod cdist chain_matmul einsum is_tensor meshgrid norm split stft sym_float sym_int
    sym_ite sym_max sym_min sym_not sym_sqrt sym_sum tensordot unique unique_consecutive
    unravel_index
    """
)
_TORCH_REFUSED = {"from_file", "from_numpy", "frombuffer"}  # files and foreign memory
_FUNCTIONAL_REFUSED = {"assert_int_or_pair", "boolean_dispatch", "handle_torch_function"}
_OP_NAMESPACES = {"aten", "tfmq_fx", "quantized_decomposed", "prims"}
_OPS_REFUSED = {"from_file"}
_OPS_UNDERSCORED = _words(
    """
    _assert_async _assert_scalar _assert_tensor_metadata _log_softmax _softmax _to_copy
    _unsafe_view
    """
)
_METHODS_REFUSED = _words(
    """
    apply_ as_subclass backward data_ptr map2_ map_ module_load new numpy record_stream
    register_hook register_post_accumulate_grad_hook reinforce requires_grad_ retain_grad set_
    share_memory_ storage to_dlpack type untyped_storage
    """
)
_INPLACE_DUNDERS = {f"__{form.__name__}__" for form in PURE_FORMS if not isinstance(form, str)}
_ATTRIBUTES = _words(
    """
    H T device dtype imag index is_cpu is_cuda is_meta is_mps is_nested is_quantized is_sparse
    is_xpu itemsize layout mH mT nbytes ndim real requires_grad shape type
    """
)
_TORCH_NN = re.compile(r"torch\.nn\.modules(\.[a-z]\w*)+", re.ASCII)
_OWN = re.compile(r"tfmq_fx(\.[a-z]\w*)+", re.ASCII)
_PATH = re.compile(r"(?!__)[\w-]+(\.(?!__)[\w-]+)*", re.ASCII)  # ModuleDicts have keys like 2-1
_OP = re.compile(r"torch\.ops\.([a-z]\w*)\.(\w+)\.([A-Za-z]\w*)", re.ASCII)


def function_name(function: Any, where: str) -> str:
    """The name under which `function` is saved. Raises ArtifactError if it is not allowed."""
    own_name = getattr(function, "__name__", "?")
    if (known := _function_names().get((function, own_name))) is not None:
        return known
    if isinstance(function, torch._ops.OpOverload):
        name = f"torch.ops.{function}"
    else:
        name = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"
    if function_named(name, where) is not function:
        raise ArtifactError(f"{where}: {name} is not the function that the graph calls")
    return name


def function_named(name: str, where: str) -> Any:
    """The function called `name`. Raises ArtifactError if it is not allowed."""
    if (known := _functions().get(name)) is not None:
        return known
    if op := _OP.fullmatch(name):
        namespace, packet, overload = op.groups()
        plain = packet[0] != "_" or packet in _OPS_UNDERSCORED
        if namespace in _OP_NAMESPACES and plain and packet not in _OPS_REFUSED:
            found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
            # TorchScript has operators that are not tensor operators (aten::save writes files);
            # only those of the dispatcher are.
            qualified = f"{namespace}::{packet}.{overload}".removesuffix(".default")
            known_op = isinstance(found, torch._ops.OpOverload)
            if known_op and torch._C._dispatch_has_kernel(qualified):
                return found
            raise ArtifactError(f"{where}: there is no operator {name} here")
    module, _, attribute = name.rpartition(".")
    if _OWN.fullmatch(module):
        found = vars(_import(module, where)).get(attribute)
        if isinstance(found, types.FunctionType) and found.__module__ == module:
            marked = isinstance(getattr(found, "stage", None), Stage)
            if marked or found in (inplace_, setitem_):
                return found
    raise ArtifactError(f"{where}: a saved graph may not call {name}")


@functools.cache
def _functions() -> dict[str, Any]:
    """Every function outside torch.ops and tfmq_fx that a graph may call, by name."""
    table: dict[str, Any] = {f"builtins.{name}": getattr(builtins, name) for name in _BUILTINS}
    table |= {f"operator.{name}": getattr(operator, name) for name in _OPERATORS}
    table |= {f"torch.{name}": getattr(torch, name) for name in _TORCH_PYTHON}
    for name, value in vars(F).items():
        native = isinstance(value, types.BuiltinFunctionType)
        ours = isinstance(value, types.FunctionType) and value.__module__ == F.__name__
        from_c = native and value.__module__ in ("torch", "torch._C._nn")
        if (ours or from_c) and not name.startswith("_") and name not in _FUNCTIONAL_REFUSED:
            table[f"torch.nn.functional.{name}"] = value
    tensor_functions = set(dir(torch._C._VariableFunctions)) - _TORCH_REFUSED
    # What torch.meshgrid and its like, written in Python, call.
    inner = {name: getattr(torch._C._VariableFunctions, name, None) for name in _TORCH_PYTHON}
    table |= {f"torch._VF.{name}": value for name, value in inner.items() if value is not None}
    sources = [(torch, tensor_functions), (math, dir(math))]
    spaces = (torch.fft, torch.linalg, torch.special, torch._C._nn)
    sources += [(space, dir(space)) for space in spaces]
    for space, names in sources:
        for name in names:
            value = getattr(space, name, None)
            if isinstance(value, types.BuiltinFunctionType) and not name.startswith("_"):
                table.setdefault(f"{space.__name__}.{name}", value)
    return table


@functools.cache
def _function_names() -> dict[tuple[Any, str], str]:
    # Aliases are told apart by their own names: torch.mm == torch.dsmm.
    table = reversed(_functions().items())
    return {(function, function.__name__): name for name, function in table}


def module_class(name: str, where: str) -> type[nn.Module]:
    """The module class called `name`. Raises ArtifactError if it is not allowed."""
    module, _, attribute = name.rpartition(".")
    own = _OWN.fullmatch(module)
    if not own and not _TORCH_NN.fullmatch(module):
        raise ArtifactError(
            f"{where}: a saved graph may not hold a {name}; only torch.nn and tfmq_fx modules"
        )
    found = vars(_import(module, where)).get(attribute)
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise ArtifactError(f"{where}: there is no module class {name}")
    if found.__module__ != module or (own and not hasattr(found, "from_spec")):
        raise ArtifactError(f"{where}: modules of class {name} cannot be saved")
    return found


def _import(module: str, where: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ArtifactError(f"{where}: cannot import {module} ({error})") from error


def check_node(node: fx.Node) -> None:
    """Raise ArtifactError unless the node is one that a saved graph may hold.

    The function that it calls is checked where it is named (`function_name`, `function_named`).
    fx writes targets and keyword names into source code that it runs, so their form is checked.
    """
    where, target = node.name, node.target
    for key in node.kwargs:
        if not _is_word(key):
            raise ArtifactError(f"{where}: {key!r} is not a keyword argument")
    value, name = (*node.args, None, None)[:2]
    on_value = isinstance(value, fx.Node)
    if node.op == "call_function":
        named = on_value and type(name) is str
        if target is getattr and not (named and len(node.args) == 2 and name in _ATTRIBUTES):
            raise ArtifactError(f"{where}: a saved graph may not read attribute {name!r}")
        if target is inplace_:
            if not named:
                raise ArtifactError(f"{where}: the method to call must be named by the graph")
            if name not in _INPLACE_DUNDERS:
                _check_method(str(name), where)
    elif type(target) is not str:
        raise ArtifactError(f"{where}: target {target!r} of a {node.op} is not a name")
    elif node.op == "call_method":
        _check_method(target, where)
        if not on_value:
            raise ArtifactError(f"{where}: method {target!r} is called on no value")
    elif node.op == "placeholder":
        if not _is_word(target):
            raise ArtifactError(f"{where}: {target!r} is not the name of an input")
    elif node.op in ("get_attr", "call_module"):
        check_path(target, where)
    elif node.op != "output":
        raise ArtifactError(f"{where}: unknown kind of node {node.op!r}")


def check_path(path: str, where: str) -> None:
    """Raise ArtifactError unless `path` is a dotted path of attributes, none of them internal."""
    if not _PATH.fullmatch(path):
        raise ArtifactError(f"{where}: {path!r} is not a path of attributes")


def _is_word(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _check_method(method: str, where: str) -> None:
    hidden = method.startswith("_") or method in _METHODS_REFUSED or not method.isidentifier()
    if hidden or not callable(getattr(Tensor, method, None)):
        raise ArtifactError(f"{where}: a saved graph may not call method {method!r}")
