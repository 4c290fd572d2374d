"""List the functions, methods, attributes and module classes that a saved graph may name.

A saved graph is data from somewhere else. Nothing that it names is imported or called unless it is
listed here: tensor functions and methods, torch.nn layers, and the classes and functions of
`saved_names`. The same list holds when saving, so that every saved graph can be loaded.

Not listed are functions that could do harm: read files, run code, crash the process on arguments
that torch does not check, change more of the caller's tensors than their elements.
"""

from __future__ import annotations

import builtins
import functools
import keyword
import math
import operator
import re
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.ir.functionalize import PURE_FORMS, inplace_
from tfmq_fx.quant import timestep_lookup as _registered  # noqa: F401 - torch.ops.tfmq_fx exists once it is imported

from .saved_names import FUNCTIONS, MODULES, class_name


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
# By bare name, for functions, methods and operators alike.
_REFUSED = re.compile(
    # files, foreign memory, code
    r"from_file|from_numpy|frombuffer|from_blob|numpy|data_ptr|to_dlpack|apply|map2?|register_.*"
    # change the tensor itself, not its elements
    r"|resize.*|set|set_data|data|storage|untyped_storage|share_memory|record_stream|as_subclass"
    r"|module_load|new|type|rename|refine_names|names|requires_grad|retain_grad|reinforce"
    # tensors of other layouts and quantized ones, whose parts nothing checks against each other
    r"|.*(sparse|_coo|_csr|_csc|_bsr|_bsc|mkldnn|cudnn|miopen|fbgemm|nested|jagged).*|coalesce"
    r"|smm|hsmm|sspaddmm|hspmm|saddmm|(col|crow|ccol|row)?_?indices|values"
    r"|quantize_.*|quantized_.*|dequantize|q_.*|int_repr|qscheme|choose_qparams.*|fused_moving.*"
    # take places, lengths and statistics that kernels do not check
    r"|.*backward.*|segment_reduce|max_unpool.*|embedding_bag|ctc_loss|(lu|ldl)_(solve|unpack)"
    r"|lobpcg|native_batch_norm|batch_norm_.*|rnn_.*|lstm.*|gru.*|.*_cell|pack_.*"
    r"|unpack_.*|.*_renorm|histogramdd|rrelu_with_noise|lcm|factorial|comb|perm"
    # in torch.nn.functional, but no functions of tensors
    r"|assert_int_or_pair|boolean_dispatch|handle_torch_function|get_device|init_.*"
)
_INPLACE_REFUSED = _words(
    "as_strided detach swapdims swapaxes t transpose squeeze unsqueeze renorm"
)
_OP_NAMESPACES = {"aten", "tfmq_fx", "quantized_decomposed", "prims"}
_OPS_UNDERSCORED = _words(
    """
    _assert_async _assert_scalar _assert_tensor_metadata _log_softmax _softmax _to_copy
    _unsafe_view
    """
)
_INPLACE_DUNDERS = {f"__{form.__name__}__" for form in PURE_FORMS if not isinstance(form, str)}
_ATTRIBUTES = _words(
    """
    H T data device dtype imag index is_cpu is_cuda is_meta is_mps is_nested is_quantized is_sparse
    is_xpu itemsize layout mH mT nbytes ndim real requires_grad shape type
    """
)
_ENUMERATIONS: dict[str, type] = {
    "ScalarType": torch.dtype,
    "Layout": torch.layout,
    "MemoryFormat": torch.memory_format,
}
_TORCH_NN = re.compile(r"torch\.nn\.modules(\.[a-z]\w*)+", re.ASCII)
# Classes that build any number of others, that have no weights before their first call, or that
# give unchecked numbers to kernels.
_NN_REFUSED = re.compile(
    r"^(Transformer|TransformerEncoder|TransformerDecoder|Module)$|^Lazy|^MaxUnpool|^EmbeddingBag"
    r"|^RNNBase$|^RNNCellBase$|^CTCLoss$|^AdaptiveLogSoftmax"
)
_PATH = re.compile(r"(?!__)[\w-]+(\.(?!__)[\w-]+){,63}", re.ASCII)  # ModuleDicts have keys like 2-1
_OP = re.compile(r"torch\.ops\.([a-z]\w*)\.(\w+)\.([A-Za-z]\w*)", re.ASCII)


def function_name(function: Any, where: str) -> str:
    """Return the name under which `function` is saved. Raises ArtifactError if not allowed."""
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
    """Return the function called `name`. Raises ArtifactError if it is not allowed."""
    if (known := _functions().get(name)) is not None:
        return known
    namespace, packet, overload = op.groups() if (op := _OP.fullmatch(name)) else ("", "_", "")
    plain = packet[0] != "_" or packet in _OPS_UNDERSCORED
    truncates = (namespace, packet) == ("prims", "div")
    if namespace in _OP_NAMESPACES and plain and not is_refused(packet) and not truncates:
        operator = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
        # TorchScript has operators that are not tensor operators (aten::save writes files);
        # only those of the dispatcher are.
        qualified = f"{namespace}::{packet}.{overload}".removesuffix(".default")
        known_op = isinstance(operator, torch._ops.OpOverload)
        if not known_op or not torch._C._dispatch_has_kernel(qualified):
            raise ArtifactError(f"{where}: there is no operator {name} here")
        if not _writes_elsewhere(operator):
            return operator
    raise ArtifactError(f"{where}: a saved graph may not call {name:.200}")


def is_refused(name: str) -> bool:
    """Whether functions, methods and operators of this bare name are not allowed."""
    bare = name.rstrip("_") or name
    writes = name.endswith("_") and not name.endswith("__")
    return bool(_REFUSED.fullmatch(bare)) or (writes and bare in _INPLACE_REFUSED)


def _writes_elsewhere(op: Any) -> bool:
    """Whether an operator writes to an argument other than its first, or to an `out` argument."""
    arguments = op._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    return written not in ([], [0]) or any(a.is_out for a in arguments)


@functools.cache
def _functions() -> dict[str, Any]:
    """Return every function outside torch.ops that a graph may call, by name."""
    table: dict[str, Any] = {"torch._weight_norm": torch._weight_norm}  # of nn.utils.weight_norm
    for space, names in ((builtins, _BUILTINS), (operator, _OPERATORS), (torch, _TORCH_PYTHON)):
        table |= {f"{space.__name__}.{name}": getattr(space, name) for name in names}
    for name, value in vars(F).items():
        native = isinstance(value, types.BuiltinFunctionType)
        ours = isinstance(value, types.FunctionType) and value.__module__ == F.__name__
        from_c = native and value.__module__ in ("torch", "torch._C._nn")
        if (ours or from_c) and not name.startswith("_") and not is_refused(name):
            table[f"torch.nn.functional.{name}"] = value
    tensor_functions = dir(torch._C._VariableFunctions)
    # The native functions that torch.meshgrid and the like, written in Python, call.
    inner = [name for name in _TORCH_PYTHON if name in tensor_functions]
    table |= {f"torch._VF.{name}": getattr(torch._C._VariableFunctions, name) for name in inner}
    spaces = (math, torch.fft, torch.linalg, torch.special, torch._C._nn)
    for space, listed in [(torch, tensor_functions), *((space, dir(space)) for space in spaces)]:
        for name in listed:
            value = getattr(space, name, None)
            native = isinstance(value, types.BuiltinFunctionType)
            if native and not name.startswith("_") and not is_refused(name):
                table.setdefault(f"{space.__name__}.{name}", value)
    return table | dict(FUNCTIONS)


@functools.cache
def _function_names() -> dict[tuple[Any, str], str]:
    # Aliases are told apart by their own names: torch.mm == torch.dsmm.
    table = reversed(_functions().items())
    return {(function, function.__name__): name for name, function in table}


@functools.cache
def _modules() -> dict[str, type[nn.Module]]:
    """Return every module class that a graph may hold, by name."""
    layers = [
        kind
        for kind in vars(nn).values()
        if isinstance(kind, type) and issubclass(kind, nn.Module)
        if _TORCH_NN.fullmatch(kind.__module__) and not _NN_REFUSED.search(kind.__name__)
    ]
    return {class_name(kind): kind for kind in layers} | dict(MODULES)


def module_class(name: Any, where: str) -> type[nn.Module]:
    """Return the module class called `name`. Raises ArtifactError if it is not allowed."""
    if type(name) is str and name in _modules():
        return _modules()[name]
    raise ArtifactError(
        f"{where}: a saved graph may not hold a {name!s:.200}; only layers of torch.nn and tfmq_fx"
    )


def check_node(node: fx.Node) -> None:
    """Raise ArtifactError unless the node is one that a saved graph may hold.

    `function_name` and `function_named` check the function that it calls.
    fx writes targets and keyword names into source code that it runs, so their form is checked.
    """
    where, target = node.name, node.target
    for key in node.kwargs:
        if not _is_word(key):
            raise ArtifactError(f"{where}: {key!r} is not a keyword argument")
        if key == "out" and node.kwargs[key] is not None:
            raise ArtifactError(f"{where}: a saved graph may not write to out={node.kwargs[key]}")
        if key == "rounding_mode" and node.kwargs[key] not in (None, "floor"):
            # The smallest integer over -1 ends the process.
            raise ArtifactError(f"{where}: a saved graph may not round by {node.kwargs[key]!r:.40}")
    fx.node.map_aggregate((node.args, node.kwargs), functools.partial(_check_layout, where))
    if isinstance(target, torch._ops.OpOverload):
        _check_enumerations(node, target)
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


def _check_enumerations(node: fx.Node, op: torch._ops.OpOverload) -> None:
    """Raise ArtifactError where an operator takes a dtype, layout or memory format and gets a
    number, which torch does not check."""
    for i, argument in enumerate(op._schema.arguments):
        kind = _ENUMERATIONS.get(str(argument.real_type).removeprefix("Optional[").rstrip("]?"))
        value = node.kwargs.get(argument.name, node.args[i] if i < len(node.args) else None)
        if kind is None or value is None or isinstance(value, kind):
            continue
        if not (isinstance(value, fx.Node) and value.target is getattr):
            raise ArtifactError(f"{node.name}: {argument.name} of {op} is {value!r:.80}")


def _check_layout(where: str, value: Any) -> Any:
    if isinstance(value, torch.layout) and value is not torch.strided:
        raise ArtifactError(f"{where}: a saved graph may not make tensors of {value}")
    return value


def check_path(path: str, where: str) -> None:
    """Raise ArtifactError unless `path` is a dotted path of attributes without internal ones."""
    if not _PATH.fullmatch(path):
        raise ArtifactError(f"{where}: {path!r} is not a path of attributes")


def _is_word(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _check_method(method: str, where: str) -> None:
    hidden = method.startswith("_") or is_refused(method) or not method.isidentifier()
    if hidden or not callable(getattr(Tensor, method, None)):
        raise ArtifactError(f"{where}: a saved graph may not call method {method!r}")
