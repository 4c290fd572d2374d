"""An fx.GraphModule as a JSON-ready dict and back: what the graph says, not its tensors' contents.

A saved graph is data from somewhere else. Nothing in it is evaluated, unpickled or imported by
name unless an allowlist says so: functions, methods and modules that compute on tensors are
found by name, everything else is refused. The same allowlist holds when writing, so that what
could be saved can be loaded.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import itertools
import json
import keyword
import logging
import math
import operator
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.graph import CodeGen
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._sympy.numbers import int_oo

from . import ops as _registered  # noqa: F401 - torch.ops.tfmq_fx exists once it is imported
from .dialect import Stage, check, stage_of
from .errors import ArtifactError, GraphError

log = logging.getLogger(__name__)

# ---------------------------------------------------------------- what a graph may refer to


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
_WRITE = "tfmq_fx.effects.inplace_"  # calls the method named by its second argument
_OWN_FUNCTIONS = {_WRITE, "tfmq_fx.effects.setitem_"}  # beside those marked with a stage
_METHODS_REFUSED = _words(
    """
    apply_ as_subclass backward data_ptr map2_ map_ module_load new numpy record_stream
    register_hook register_post_accumulate_grad_hook reinforce requires_grad_ retain_grad set_
    share_memory_ storage to_dlpack type untyped_storage
    """
)
_INPLACE_DUNDERS = _words(
    """__iadd__ __iand__ __ifloordiv__ __imod__ __imul__ __ior__ __ipow__ __isub__ __itruediv__"""
)
_ATTRIBUTES = _words(
    """
    H T device dtype imag index is_cpu is_cuda is_meta is_mps is_nested is_quantized is_sparse
    is_xpu itemsize layout mH mT nbytes ndim real requires_grad shape type
    """
)
_TORCH_NN = re.compile(r"torch\.nn\.modules(\.[a-z]\w*)+", re.ASCII)
_OWN = re.compile(r"tfmq_fx(\.[a-z]\w*)+", re.ASCII)
_PATH = re.compile(r"(?!__)\w+(\.(?!__)\w+)*", re.ASCII)
_OP = re.compile(r"torch\.ops\.([a-z]\w*)\.(\w+)\.([A-Za-z]\w*)", re.ASCII)


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
    tensor_functions = {name for name in dir(torch._C._VariableFunctions) if name[0] != "_"}
    sources = [("torch", torch, tensor_functions - _TORCH_REFUSED), ("math", math, dir(math))]
    sources += [
        (f"torch.{name}", getattr(torch, name), dir(getattr(torch, name)))
        for name in ("fft", "linalg", "special")
    ]
    for prefix, namespace, names in sources:
        for name in names:
            value = getattr(namespace, name, None)
            if isinstance(value, types.BuiltinFunctionType) and not name.startswith("_"):
                table.setdefault(f"{prefix}.{name}", value)
    return table


@functools.cache
def _function_names() -> dict[Any, str]:
    return {function: name for name, function in reversed(_functions().items())}


def _function_name(function: Any, where: str) -> str:
    """The name under which `function` is saved. Raises ArtifactError if it is not allowed."""
    if isinstance(function, torch._ops.OpOverload):
        name = f"torch.ops.{function}"
    elif (known := _function_names().get(function)) is not None:
        return known
    else:
        name = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"
    if _function(name, where) is not function:
        raise ArtifactError(f"{where}: {name} is not the function that the graph calls")
    return name


def _function(name: str, where: str) -> Any:
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
        marked = name in _OWN_FUNCTIONS or isinstance(getattr(found, "stage", None), Stage)
        if isinstance(found, types.FunctionType) and found.__module__ == module and marked:
            return found
    raise ArtifactError(f"{where}: a saved graph may not call {name}")


def _import(module: str, where: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ArtifactError(f"{where}: cannot import {module} ({error})") from error


def _check_node(node: fx.Node) -> None:
    """Raise ArtifactError unless the node is one that a saved graph may hold.

    fx writes targets and keyword names into source code that it runs, so their form is checked.
    """
    where = node.name
    for key in node.kwargs:
        if not key.isidentifier() or keyword.iskeyword(key):
            raise ArtifactError(f"{where}: {key!r} is not a keyword argument")
    if node.op == "call_function":
        if node.target is getattr:
            of, *rest = node.args
            name = rest[0] if len(rest) == 1 else None
            if not isinstance(of, fx.Node) or type(name) is not str or name not in _ATTRIBUTES:
                raise ArtifactError(f"{where}: a saved graph may not read attribute {name!r}")
            if node.kwargs:
                raise ArtifactError(f"{where}: getattr takes no keyword arguments")
        elif _function_name(node.target, where) == _WRITE:
            of, method = node.args[:2] if len(node.args) > 1 else (None, None)
            if not isinstance(of, fx.Node) or type(method) is not str or "method" in node.kwargs:
                raise ArtifactError(f"{where}: the method to call must be named by the graph")
            if method not in _INPLACE_DUNDERS:
                _check_method(method, where)
        return
    if type(node.target) is not str:
        raise ArtifactError(f"{where}: target {node.target!r} of a {node.op} is not a name")
    if node.op == "call_method":
        _check_method(node.target, where)
        if not node.args or not isinstance(node.args[0], fx.Node):
            raise ArtifactError(f"{where}: method {node.target!r} is called on no value")
    elif node.op == "placeholder":
        if not node.target.isidentifier() or keyword.iskeyword(node.target):
            raise ArtifactError(f"{where}: {node.target!r} is not the name of an input")
    elif node.op in ("get_attr", "call_module"):
        _check_path(node.target, where)
    elif node.op != "output":
        raise ArtifactError(f"{where}: unknown kind of node {node.op!r}")


def _check_method(method: str, where: str) -> None:
    hidden = method.startswith("_") or method in _METHODS_REFUSED or not method.isidentifier()
    if hidden or not callable(getattr(Tensor, method, None)):
        raise ArtifactError(f"{where}: a saved graph may not call method {method!r}")


def _check_path(path: str, where: str) -> None:
    if not _PATH.fullmatch(path):
        raise ArtifactError(f"{where}: {path!r} is not a path of attributes")


# ---------------------------------------------------------------- values

_TORCH_VALUES: dict[str, type] = {
    "dtype": torch.dtype,
    "memory_format": torch.memory_format,
    "layout": torch.layout,
}
_UNKNOWN = object()
_NONE: Mapping[str, Callable[[Any], Any]] = {}


def encode(value: Any, where: str, special: Callable[[Any], Any] = lambda _: _UNKNOWN) -> Any:
    """`value` as JSON-ready data that `decode` turns back into an equal value of the same type.

    special: encodes what is not plain data, or returns its argument's `_UNKNOWN` mark.
    Raises ArtifactError, naming `where`, on a value of any other kind.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if (found := special(value)) is not _UNKNOWN:
        return found
    if kind in (list, immutable_list):
        return [encode(v, f"{where}[{i}]", special) for i, v in enumerate(value)]
    if kind in (tuple, torch.Size):
        tag = "tuple" if kind is tuple else "size"
        return {tag: [encode(v, f"{where}[{i}]", special) for i, v in enumerate(value)]}
    if kind in (dict, immutable_dict):
        items = value.items()
        return {
            "dict": [[encode(k, where), encode(v, f"{where}[{k!r}]", special)] for k, v in items]
        }
    if kind is slice:
        parts = (value.start, value.stop, value.step)
        return {"slice": [encode(v, where, special) for v in parts]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if kind is torch.device:
        return {"device": str(value)}
    for tag, torch_type in _TORCH_VALUES.items():
        if kind is torch_type:
            return {tag: str(value).removeprefix("torch.")}
    raise ArtifactError(f"{where}: a saved model cannot hold a {kind.__module__}.{kind.__name__}")


def decode(data: Any, where: str, special: Mapping[str, Callable[[Any], Any]] = _NONE) -> Any:
    """The value that `encode` saved; `special` decodes further tags. Raises ArtifactError."""
    if data is None or type(data) in (bool, int, float, str):
        return data
    if type(data) is list:
        return [decode(v, where, special) for v in data]
    if type(data) is not dict or len(data) != 1:
        raise ArtifactError(f"{where}: damaged value {data!r:.80}")
    ((tag, body),) = data.items()
    if tag in special:
        return special[tag](body)
    if tag in ("tuple", "size") and type(body) is list:
        values = tuple(decode(v, where, special) for v in body)
        return values if tag == "tuple" else torch.Size(values)
    if tag == "dict" and type(body) is list:
        return {decode(k, where): decode(v, where, special) for k, v in body}
    if tag == "slice" and type(body) is list:
        return slice(*(decode(v, where, special) for v in body))
    if tag == "ellipsis":
        return ...
    if tag == "float" and body in ("inf", "-inf", "nan"):
        return float(body)
    if tag == "device":
        return torch.device(str(body))
    if tag in _TORCH_VALUES:
        value = getattr(torch, str(body), None)
        if isinstance(value, _TORCH_VALUES[tag]):
            return value
    raise ArtifactError(f"{where}: damaged value {data!r:.80}")


def keys(data: Any, where: str, required: str, optional: str = "") -> dict[str, Any]:
    """`data`, a dict with these keys (two lists of words). Raises ArtifactError otherwise."""
    if type(data) is not dict:
        raise ArtifactError(f"{where}: expected an object, found {data!r:.80}")
    if missing := sorted(set(required.split()) - set(data)):
        raise ArtifactError(f"{where}: missing keys {missing}")
    if unknown := sorted(set(data) - set(required.split()) - set(optional.split())):
        raise ArtifactError(f"{where}: unknown keys {unknown}")
    return data


# ---------------------------------------------------------------- modules and tensors


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _module_json(module: nn.Module, where: str) -> dict[str, Any]:
    """How to build `module` again. Raises ArtifactError if that would not give the same module."""
    name = _class_name(module)
    _module_class(name, where)
    for path, part in module.named_modules():
        if "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks:
            raise ArtifactError(f"{where}.{path}: a module with hooks cannot be saved")
    if _is_own(module):
        spec: Any = module.spec()  # type: ignore[operator]
        try:
            text = json.dumps(spec, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{where}: spec() of {name} is not JSON-ready: {error}") from error
        return {"class": name, "spec": json.loads(text)}
    arguments = {}
    for key, parameter in inspect.signature(type(module)).parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if variadic or key.startswith("_") or key in ("device", "dtype"):
            continue
        if key in module._parameters:
            arguments[key] = module._parameters[key] is not None
        elif hasattr(module, key):
            arguments[key] = encode(getattr(module, key), f"{where}.{key}")
    entry = {"class": name, "arguments": arguments}
    _check_same(module, _build(entry, where), where)
    return entry


def _check_same(module: nn.Module, rebuilt: nn.Module, where: str) -> None:
    """Raise ArtifactError unless the constructor's arguments say all that `module` does."""
    parts, made = dict(module.named_modules()), dict(rebuilt.named_modules())
    if {k: type(v) for k, v in parts.items()} != {k: type(v) for k, v in made.items()}:
        raise ArtifactError(f"{where}: a {_class_name(module)} with its parts cannot be rebuilt")
    internal = set(vars(nn.Module()))
    for path, part in made.items():
        for name, value in vars(part).items():
            found = getattr(parts[path], name, _UNKNOWN)
            if name not in internal and value is not found and value != found:
                raise ArtifactError(
                    f"{where}: attribute {name!r} of the {_class_name(module)} is {found!r:.80}, "
                    f"but its constructor makes it {value!r:.80}"
                )
    expected, found = _shapes(rebuilt), _shapes(module)
    if expected != found:
        raise ArtifactError(
            f"{where}: the {_class_name(module)} holds tensors {found}, "
            f"but its constructor makes {expected}"
        )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _tensors(module)}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, less those that our own constructors compute."""
    yield from module.named_parameters(remove_duplicate=False)
    for name, value in module.named_buffers(remove_duplicate=False):
        owner, leaf = owner_of(module, name)
        if leaf not in owner._non_persistent_buffers_set or not _is_own(owner):
            yield name, value


def _is_own(module: nn.Module) -> bool:
    return type(module).__module__.startswith("tfmq_fx.")


def _module_class(name: str, where: str) -> type[nn.Module]:
    """The module class called `name`. Raises ArtifactError if it is not allowed."""
    module, _, attribute = name.rpartition(".")
    if not (_TORCH_NN.fullmatch(module) or _OWN.fullmatch(module)):
        raise ArtifactError(
            f"{where}: a saved graph may not hold a {name}; only torch.nn and tfmq_fx modules"
        )
    found = vars(_import(module, where)).get(attribute)
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise ArtifactError(f"{where}: there is no module class {name}")
    if found.__module__ != module or (_OWN.fullmatch(module) and not hasattr(found, "from_spec")):
        raise ArtifactError(f"{where}: modules of class {name} cannot be saved")
    return found


def _build(entry: dict[str, Any], where: str) -> nn.Module:
    """The module that `_module_json` described; its tensors come later."""
    made = _module_class(str(entry["class"]), where)
    if made.__module__.startswith("tfmq_fx."):
        spec = keys(entry, where, "class spec")["spec"]
        built = made.from_spec(spec)  # type: ignore[attr-defined]
        assert isinstance(built, nn.Module)
        return built
    arguments = keys(entry, where, "class arguments")["arguments"]
    allowed = inspect.signature(made).parameters
    for key in arguments:
        if key.startswith("_") or key in ("device", "dtype") or key not in allowed:
            raise ArtifactError(f"{where}: {key!r} is not an argument of {made.__name__}")
    with torch.device("meta"):  # no memory, and the random state is left alone
        return made(**{k: decode(v, f"{where}.{k}") for k, v in arguments.items()})


def tensors_of(gm: fx.GraphModule) -> dict[str, Tensor]:
    """Every tensor that the graph uses, by dotted name, shared ones under each of their names.

    Raises ArtifactError on an attribute that is not a tensor.
    """
    found: dict[str, Tensor] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module = gm.get_submodule(node.target)
            found.update((f"{node.target}.{name}", value) for name, value in _tensors(module))
        elif node.op == "get_attr":
            value = operator.attrgetter(node.target)(gm)
            if not isinstance(value, Tensor):
                raise ArtifactError(
                    f"{node.name}: attribute {node.target!r} is a {type(value).__name__}, "
                    "and only tensors can be saved"
                )
            found[node.target] = value
    return found


def owner_of(gm: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the tensor called `name`, and its name there."""
    path, _, leaf = name.rpartition(".")
    return gm.get_submodule(path), leaf


def _tensors_json(gm: fx.GraphModule) -> dict[str, Any]:
    table: dict[str, Any] = {}
    seen: dict[Any, str] = {}
    for name, value in tensors_of(gm).items():
        _check_path(name, name)
        if type(value) not in (Tensor, nn.Parameter) and not isinstance(value, FakeTensor):
            raise ArtifactError(f"{name}: a {type(value).__name__} cannot be saved, only tensors")
        if value.layout is not torch.strided:
            raise ArtifactError(f"{name}: a tensor of layout {value.layout} cannot be saved")
        owner, leaf = owner_of(gm, name)
        registered = leaf in owner._parameters or leaf in owner._buffers
        if (
            not registered
            and not isinstance(owner, fx.GraphModule)
            and type(owner) is not nn.Module
        ):
            raise ArtifactError(f"{name}: neither a parameter nor a buffer of {_class_name(owner)}")
        parameter, storage = leaf in owner._parameters, value.untyped_storage()._cdata
        place = (storage, value.storage_offset(), value.shape, value.stride())
        first = seen.setdefault((*place, value.dtype, parameter, value.is_conj()), name)
        table[name] = (
            {"same_as": first}
            if first != name
            else {
                "shape": list(value.shape),
                "dtype": str(value.dtype).removeprefix("torch."),
                "parameter": parameter,
                "requires_grad": parameter and value.requires_grad,
                "persistent": leaf not in owner._non_persistent_buffers_set,
            }
        )
    return table


def _child(module: nn.Module, path: str) -> nn.Module:
    """The module at `path`, made of plain containers where there is none."""
    for part in path.split(".") if path else ():
        if part not in module._modules:
            if type(module) is not nn.Module:
                raise ArtifactError(f"{path}: a {_class_name(module)} has no part {part!r}")
            module.add_module(part, nn.Module())
        found = module._modules[part]
        assert found is not None
        module = found
    return module


def _install_modules(root: nn.Module, table: dict[str, Any]) -> None:
    for path, entry in table.items():
        _check_path(path, path)
        owner, _, leaf = path.rpartition(".")
        same = entry.get("same_as")
        module = _build(entry, path) if same is None else root.get_submodule(same)
        _child(root, owner).add_module(leaf, module)


def _install_tensors(root: nn.Module, table: dict[str, Any]) -> None:
    """Give every tensor of `table` its place, empty."""
    made: dict[str, Tensor] = {}
    for name, entry in table.items():
        _check_path(name, name)
        path, _, leaf = name.rpartition(".")
        owner = _child(root, path)
        if "same_as" in entry:
            tensor = made[keys(entry, name, "same_as")["same_as"]]
        else:
            keys(entry, name, "shape dtype parameter requires_grad persistent")
            dtype = decode({"dtype": entry["dtype"]}, name)
            tensor = torch.empty([int(n) for n in entry["shape"]], dtype=dtype)
            if entry["parameter"]:
                tensor = nn.Parameter(tensor, requires_grad=entry["requires_grad"])
        made[name] = tensor
        parameter = isinstance(tensor, nn.Parameter)
        place: Any = owner._parameters if parameter else owner._buffers
        if leaf not in place and type(owner) is nn.Module and not hasattr(owner, leaf):
            register: Any = owner.register_parameter if parameter else owner.register_buffer
            register(leaf, tensor)
        elif (held := place.get(leaf)) is None or held.is_meta and held.shape != tensor.shape:
            raise ArtifactError(f"{name}: its module has no such tensor of {tuple(tensor.shape)}")
        place[leaf] = tensor


# ---------------------------------------------------------------- symbolic values

_EXPRESSIONS: dict[str, Callable[..., Any]] = {
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "Max": lambda *values: functools.reduce(torch.sym_max, values),
    "Min": lambda *values: functools.reduce(torch.sym_min, values),
    "ToFloat": torch.sym_float,
    "FloorToInt": math.floor,
    "CeilToInt": math.ceil,
    "TruncToInt": math.trunc,
    "OpaqueUnaryFn_sqrt": torch.sym_sqrt,
    "Eq": operator.eq,
    "Ne": operator.ne,
    "Add": operator.add,
    "Sub": operator.sub,
    "Mult": operator.mul,
    "FloorDiv_": operator.floordiv,
    "Pow": operator.pow,
    "USub": operator.neg,
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
}


def _evaluate(text: str, symbols: Mapping[str, Any]) -> Any:
    """The value of an expression as sympy prints it, over `symbols`; sympy's own parser evaluates
    code. Raises ValueError, KeyError or SyntaxError on what is not such an expression."""

    def value(tree: ast.expr) -> Any:
        match tree:
            case ast.Constant(value=number) if type(number) in (int, float):
                return number
            case ast.Name(id=name):
                return symbols[name]
            case ast.BinOp(left=left, op=op, right=right):
                if isinstance(op, ast.Pow) and not (
                    isinstance(right, ast.Constant) and right.value in range(17)
                ):
                    raise ValueError(f"power in {text!r:.80}")
                name = "FloorDiv_" if isinstance(op, ast.FloorDiv) else type(op).__name__
                return _EXPRESSIONS[name](value(left), value(right))
            case ast.UnaryOp(op=op, operand=operand):
                return _EXPRESSIONS[type(op).__name__](value(operand))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return _EXPRESSIONS[type(op).__name__](value(left), value(right))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return _EXPRESSIONS[name](*map(value, arguments))
        raise ValueError(f"not an expression of sizes: {text!r:.80}")

    return value(ast.parse(text, mode="eval").body)


class _SymbolWriter:
    """Gives symbols their saved names s0, s1, ... in order of appearance."""

    def __init__(self) -> None:
        self.table: list[dict[str, Any]] = []
        self.names: dict[Any, str] = {}  # of symbols
        self.texts: dict[Any, Any] = {}  # of expressions
        self.values: dict[str, Any] = {}

    def __call__(self, value: Any) -> Any:
        """A SymInt, SymFloat or SymBool as a number or the text of an expression."""
        expression, env = value.node.expr, value.node.shape_env
        if expression not in self.texts:
            constant = value.node.constant
            if constant is None and isinstance(value, torch.SymInt):
                constant = value.node.maybe_as_int()
            self.texts[expression] = self._text(value, env) if constant is None else constant
        return self.texts[expression]

    def _text(self, value: Any, env: ShapeEnv) -> str:
        expression = value.node.expr
        symbols = sorted(expression.free_symbols, key=str)
        if all(symbol.is_integer for symbol in symbols):
            for symbol in symbols:
                if symbol not in self.names:
                    hint, bounds = env.backed_var_to_val.get(symbol), env.var_to_range.get(symbol)
                    known = env.create_symintnode(symbol, hint=None if hint is None else int(hint))
                    limits = [getattr(bounds, end, None) for end in ("lower", "upper")]
                    self.names[symbol] = self._declare(known, "int", hint, limits)
            saved = {s: sympy.Symbol(self.names[s], **s.assumptions0) for s in symbols}
            text = str(expression.xreplace(saved))
            try:
                found = _evaluate(text, self.values).node.expr
                number = isinstance(value, torch.SymInt | torch.SymFloat)
                if found == expression or number and sympy.expand(found - expression) == 0:
                    return text
            except (AttributeError, ArithmeticError, KeyError, SyntaxError, TypeError, ValueError):
                pass  # a function this module does not know
        # A symbol of its own: the relation to other sizes is lost, equal values stay equal.
        hint = value.node.hint if value.node.has_hint() else None
        return self._declare(value, type(value).__name__.removeprefix("Sym").lower(), hint, [])

    def _declare(self, value: Any, kind: str, hint: Any, limits: list[Any]) -> str:
        number = {"int": int, "float": float, "bool": bool}[kind]
        ends = [int(n) if n is not None and n.is_Integer else None for n in limits]
        name = f"s{len(self.table)}"
        self.table.append(
            {
                "name": name,
                "kind": kind,
                "hint": None if hint is None else number(hint),
                "range": ends or [None, None],
            }
        )
        self.values[name] = value
        return name


class _SymbolReader:
    """Fresh symbols for the saved ones, and values over them."""

    def __init__(self, table: list[dict[str, Any]]) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env)
        self.values: dict[str, Any] = {}
        self.known: dict[str, Any] = {}
        for entry in table:
            name, kind, hint, (low, high) = (
                keys(entry, "symbols", "name kind hint range")[k]
                for k in ("name", "kind", "hint", "range")
            )
            if kind == "int" and type(hint) is int:
                symbol = self.env.create_symbol(
                    hint,
                    ConstantSource(f"saved_{name}"),
                    dynamic_dim=DimDynamic.DYNAMIC,
                    positive=None if low is None or low < 0 else True,
                    do_not_specialize_zero_one=True,
                )
                self.env.constrain_symbol_range(
                    symbol,
                    compiler_min=-int_oo if low is None else low,
                    compiler_max=int_oo if high is None else high,
                )
                self.values[name] = self.env.create_symintnode(symbol, hint=hint)
            else:
                self.values[name] = getattr(self.env, f"create_unbacked_sym{kind}")()

    def __call__(self, text: Any) -> Any:
        """The number, or the SymInt, SymFloat or SymBool that the saved text stands for."""
        if type(text) is not str:
            return text
        if text not in self.known:
            self.known[text] = _evaluate(text, self.values)
        return self.known[text]

    def tensor(self, data: Any) -> Tensor:
        """A FakeTensor of the saved shape, stride, dtype and device."""
        keys(data, "val", "shape dtype device", "stride")
        dtype, device = decode({"dtype": data["dtype"]}, "val"), torch.device(data["device"])
        shape = [self(n) for n in data["shape"]]
        # Layout tests on the way would guard on sizes; the loaded graph has no guards of its own.
        with self.mode, self.env.suppress_guards():
            if "stride" not in data:
                return torch.empty(shape, dtype=dtype, device=device)
            strides = [self(n) for n in data["stride"]]
            return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _tensor_json(value: Tensor, number: Callable[[Any], Any]) -> dict[str, Any]:
    def plain(n: Any) -> Any:
        return n if type(n) is int else number(n)

    shape, strides = [plain(n) for n in value.shape], [plain(n) for n in value.stride()]
    running: Any = 1
    usual: list[Any] = []
    for n in reversed(value.shape):
        usual.insert(0, plain(running))
        running = running * n
    data = {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}
    data["device"] = str(value.device)
    return data if strides == usual else data | {"stride": strides}


# ---------------------------------------------------------------- the whole graph

_DAMAGE = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    RecursionError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def to_json(gm: fx.GraphModule) -> dict[str, Any]:
    """`gm` without the contents of its tensors, as JSON-ready data for `from_json`.

    Kept: nodes, modules, the names, shapes and sharing of tensors, the nodes' "val",
    "nn_module_stack", "source", "temporal_feature" and "writes", and the graph's metadata that is
    plain data, the stage or a small tensor. Other metadata, type annotations and tensors that no
    node uses are left out. Raises ArtifactError, naming the node, on a call or value that is not
    allowed.
    """
    if type(gm.graph._codegen) is not CodeGen:
        raise ArtifactError(
            f"the graph's code generator is a {type(gm.graph._codegen).__name__}; "
            "only graphs of plain positional inputs can be saved"
        )
    symbols = _SymbolWriter()
    nodes = [_node_json(node, symbols) for node in gm.graph.nodes]
    modules: dict[str, Any] = {}
    seen: dict[nn.Module, str] = {}
    called = {n.target for n in gm.graph.nodes if n.op == "call_module"}
    for path in sorted(called):
        parents = itertools.accumulate(path.split(".")[:-1], lambda a, b: f"{a}.{b}")
        if not called.isdisjoint(parents):
            continue  # rebuilt as a part of another one
        module = gm.get_submodule(path)
        first = seen.setdefault(module, path)
        modules[path] = {"same_as": first} if first != path else _module_json(module, path)
    return {
        "name": type(gm).__name__,
        "nodes": nodes,
        "modules": modules,
        "tensors": _tensors_json(gm),
        "symbols": symbols.table,
        "meta": _meta_json(gm.meta),
    }


def _meta_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    saved: dict[str, Any] = {}
    for key, value in meta.items():
        where = f"gm.meta[{key!r}]"
        if key == "stage":
            saved[key] = value.value
        elif isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            saved[key] = {"values": encode([dtype, value.tolist()], where)}
        else:
            try:
                saved[key] = encode(value, where)
            except ArtifactError:
                if key in ("timestep", "passes"):
                    raise
                log.debug("%s is not saved with the graph", where)
    return saved


def _meta(saved: dict[str, Any]) -> dict[str, Any]:
    def values(body: Any) -> Tensor:
        dtype, numbers = decode(body, "meta")
        return torch.tensor(numbers, dtype=decode({"dtype": dtype}, "meta"))

    meta = {key: decode(value, f"meta {key}", {"values": values}) for key, value in saved.items()}
    if "stage" in meta:
        meta["stage"] = Stage(meta["stage"])
    return meta


def _node_json(node: fx.Node, symbols: _SymbolWriter) -> dict[str, Any]:
    def reference(value: Any) -> Any:
        return {"node": value.name} if isinstance(value, fx.Node) else _UNKNOWN

    def abstract(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": _tensor_json(value, symbols)}
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return {"symbol": symbols(value)}
        if isinstance(value, tuple) and type(value) not in (tuple, torch.Size):
            return encode(tuple(value), f"{node.name}: meta['val']", abstract)  # torch.return_types
        return _UNKNOWN

    _check_node(node)
    saved: dict[str, Any] = {"name": node.name, "op": node.op}
    function = node.op == "call_function"
    saved["target"] = _function_name(node.target, node.name) if function else node.target
    saved["args"] = [
        encode(v, f"{node.name}: argument {i}", reference) for i, v in enumerate(node.args)
    ]
    saved["kwargs"] = {
        k: encode(v, f"{node.name}: argument {k}", reference) for k, v in node.kwargs.items()
    }
    if "val" in node.meta:
        saved["val"] = encode(node.meta["val"], f"{node.name}: meta['val']", abstract)
    elif node.op not in ("output", "get_attr"):
        raise ArtifactError(f"{node.name}: no meta['val'] to save")
    if "nn_module_stack" in node.meta:
        saved["nn_module_stack"] = [
            [path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}", key]
            for key, (path, kind) in (node.meta["nn_module_stack"] or {}).items()
        ]
    for key in ("source", "temporal_feature"):
        if node.meta.get(key) is not None:
            saved[key] = str(node.meta[key])
    if node.meta.get("writes"):
        saved["writes"] = True
    return saved


def from_json(data: dict[str, Any]) -> fx.GraphModule:
    """The graph that `to_json` saved, its parameters and buffers empty.

    Fill them with `load_state_dict(strict=True, assign=True)`. Values are FakeTensors of a fresh
    ShapeEnv whose symbols are shared as they were. The module is in eval mode and has passed
    `dialect.check`. Raises ArtifactError on anything that `to_json` would not have written.
    """
    try:
        return _from_json(data)
    except ArtifactError:
        raise
    except GraphError as error:
        raise ArtifactError(f"the saved graph is not sound: {error}") from error
    except _DAMAGE as error:
        raise ArtifactError(
            f"the saved graph is damaged: {type(error).__name__}: {error}"
        ) from error


def _from_json(data: dict[str, Any]) -> fx.GraphModule:
    keys(data, "graph", "name nodes modules tensors symbols meta")
    symbols, graph, nodes = _SymbolReader(data["symbols"]), fx.Graph(), dict[str, fx.Node]()
    for entry in data["nodes"]:
        _add_node(graph, entry, nodes, symbols)
    root = nn.Module()
    _install_modules(root, data["modules"])
    _install_tensors(root, data["tensors"])
    name = str(data["name"])
    gm = fx.GraphModule(root, graph, name if name.isidentifier() else "GraphModule")
    if (found := set(tensors_of(gm))) != (listed := set(data["tensors"])):
        raise ArtifactError(
            f"the saved graph lists tensors it does not use ({sorted(listed - found)}) "
            f"or uses tensors it does not list ({sorted(found - listed)})"
        )
    for tensor, entry in data["tensors"].items():
        if not entry.get("persistent", True):  # fx forgets it
            owner, leaf = owner_of(gm, tensor)
            owner._non_persistent_buffers_set.add(leaf)
    gm.meta.update(_meta(data["meta"]))
    gm.eval()
    check(gm, stage_of(gm))
    return gm


def _add_node(
    graph: fx.Graph, entry: dict[str, Any], nodes: dict[str, fx.Node], symbols: _SymbolReader
) -> None:
    optional = "val nn_module_stack source temporal_feature writes"
    keys(entry, "node", "name op target args kwargs", optional)
    name, op = str(entry["name"]), str(entry["op"])

    def reference(other: Any) -> fx.Node:
        if other not in nodes:
            raise ArtifactError(f"{name}: uses {other!r}, which does not come before it")
        return nodes[other]

    if name in nodes:
        raise ArtifactError(f"{name}: two nodes of this name")
    where = f"{name}: argument"
    args = tuple(decode(v, where, {"node": reference}) for v in entry["args"])
    kwargs = {k: decode(v, where, {"node": reference}) for k, v in entry["kwargs"].items()}
    function = op == "call_function"
    target = _function(str(entry["target"]), name) if function else entry["target"]
    node = nodes[name] = graph.create_node(op, target, args, kwargs, name=name)
    _check_node(node)
    if "val" in entry:
        special: dict[str, Callable[[Any], Any]] = {"tensor": symbols.tensor, "symbol": symbols}
        node.meta["val"] = decode(entry["val"], f"{name}: meta['val']", special)
    if "nn_module_stack" in entry:
        node.meta["nn_module_stack"] = {
            str(key): (str(path), str(kind)) for path, kind, key in entry["nn_module_stack"]
        }
    for key in ("source", "temporal_feature"):
        if key in entry:
            node.meta[key] = str(entry[key])
    if entry.get("writes"):
        node.meta["writes"] = True
