"""Trace a model with proxies that carry values: fake tensors and symbolic sizes.

Every recorded node is run on fake values, so that shapes, dtypes, lengths and comparisons of sizes
are known while tracing; they create no data edges and take the branch that the model would take.
"""

from __future__ import annotations

import collections
import contextlib
import operator
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.proxy import Proxy
from torch.utils._pytree import tree_leaves, tree_map_only

from tfmq_fx.core.errors import CaptureError, StateError
from tfmq_fx.core.module_overrides import is_plain, replaced_forward
from tfmq_fx.core.stages import REPLACED
from tfmq_fx.ir.functionalize import functionalize
from tfmq_fx.ir.graph import held_tensors, named_tensors
from tfmq_fx.ir.held_values import checked_sizes
from tfmq_fx.ir.node_info import value_inputs

from .data_dependence import Allowances, DataDependent, Unfit
from .data_values import DataValues
from .fake_values import SYMBOLIC, SizeTest
from .proxies import SizeProxy, Sizes, TensorProxy
from .torch_patches import RECORDED, patched

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
TRACING = threading.RLock()  # torch.fx patches nn.Module for the whole process: one trace at a time


class ValueTracer(DataValues):
    """A tracer for one run of one model.

    original: the model that `model` is a copy of. Forwards and hooks put on its parts may refer to
    it: the tensors and modules that they use there count as the copy's.
    inputs: fake tensors of `mode`, one for each placeholder.  call: runs the model on a proxy for
    each input and returns the flat outputs.  The modules of the model are changed only where one
    works in place (inplace=True) without need.
    allowances: what may be kept of code that depends on data; None: nothing.
    names: symbol of a free size -> symbol with a readable name.  forced: outcomes to pretend, keyed
    by the test with held=True.
    tests: the conditions on sizes that the model's code tested, in order.  outside: tensors that
    the code reads and no module of the model holds, by the names of their copies in the graph.
    replaced: the error for a buffer that the code replaces, if the next call reads it.
    baked: names of the model's tensors from which its code computed constants, which a graph cannot
    update (a function that holds a weight by itself).
    """

    def __init__(
        self,
        model: nn.Module,
        original: nn.Module,
        mode: FakeTensorMode,
        inputs: dict[str, Tensor],
        call: Callable[[list[Any]], Any],
        names: Mapping[Any, Any],
        forced: Mapping[SizeTest, bool],
        allowances: Allowances | None = None,
    ) -> None:
        super().__init__(mode, names, forced, allowances)
        self.last = "before its first operation"  # module and line of the latest operation
        self._model, self._inputs, self._call = model, inputs, call
        self._thread = threading.get_ident()
        self._sizes: dict[Any, Any] = {}
        # Reversed: of several names for one module or tensor, the first counts.
        copies = dict(model.named_modules(remove_duplicate=False))
        self._paths = {module: name for name, module in reversed(copies.items())}
        tensors = [*named_tensors(model), *held_tensors(original)]
        # Proxies are what a first run left in buffers: a second one that reads them is refused.
        self._tensors = {id(t): n for n, t in reversed(tensors) if not isinstance(t, Proxy)}
        self._copies = {m: copies[name] for name, m in original.named_modules() if name in copies}
        self._replaced: list[str] = []  # why the layers that are traced are not taken as layers
        self.outside: dict[str, Tensor] = {}
        self.baked: set[str] = set()
        self.replaced: StateError | None = None
        self._buffers = dict(model.named_buffers(remove_duplicate=False))

    def run(self) -> fx.Graph:
        """The graph of the model, with a placeholder for each input and a flat tuple of outputs."""
        model = self._model
        with TRACING, torch.no_grad(), patched(self.make):
            graph = self.trace(model)
        functionalize(graph, model, self._writes)
        self._check_state()
        graph._tracer_cls = None  # a tracer class of ours would have to be unpickled
        for node in graph.nodes:
            stack = node.meta.get("nn_module_stack") or {}
            root = {"": ("", type(model))}
            node.meta["nn_module_stack"] = collections.OrderedDict({**root, **stack})
            node.meta.setdefault("source", "")
        return graph

    def _check_state(self) -> None:
        """Raise StateError where forward replaced a buffer by what is not traced; note it where it
        is, for the next call may not read it."""
        before, now = self._buffers, dict(self._model.named_buffers(remove_duplicate=False))
        for name in {**now, **before}:
            if now.get(name) is not before.get(name):
                self.replaced = StateError(
                    f"{name.rpartition('.')[0] or 'the model'}: forward assigns to the buffer "
                    f"{name}, so one call changes the next; a graph holds no such state"
                )
                if not isinstance(now.get(name), TensorProxy):
                    raise self.replaced

    def leaves_values(self) -> bool:
        """Whether the model's code put a traced tensor that depends on an input on a module."""
        containers = ("_parameters", "_buffers", "_modules")
        todo = [
            leaf.node
            for module in self._model.modules()
            for name, value in vars(module).items()
            if name not in containers
            for leaf in tree_leaves(value)
            if isinstance(leaf, TensorProxy)
        ]
        reached: set[fx.Node] = set()
        while todo:
            node = todo.pop()
            if node.op == "placeholder":
                return True
            if node not in reached:
                reached.add(node)
                todo += value_inputs(node)
        return False

    # Called by proxies and by patched torch functions

    def size_of(self, proxy: TensorProxy, dim: int) -> Any:
        """The size of a dimension: a number where it is fixed, else a proxy.

        There is one proxy for each distinct expression, read from the first input that has it.
        """
        size = proxy.value.shape[dim]
        if isinstance(size, int):
            return size
        key = size.node.expr
        if key.is_number:
            return int(key)
        if key not in self._sizes:
            read = torch.ops.aten.sym_size.int
            self._sizes[key] = self.create_proxy("call_function", read, (proxy, dim), {})
        return self._sizes[key]

    def make(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a torch function that has no proxy argument; record it if it is a tensor factory."""
        if not self._idle() and func in RECORDED:
            with contextlib.suppress(NotImplementedError):  # arguments no graph can hold: numpy
                return self.create_proxy("call_function", func, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and not isinstance(result, Proxy) and not self._idle():
            weights = [a for a in (*args, *kwargs.values()) if isinstance(a, nn.Parameter)]
            self.baked |= {self._tensors[id(a)] for a in weights if id(a) in self._tensors}
        return result

    # fx.Tracer's hooks

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self._inputs]
        for proxy in proxies:  # bare sizes are read from the inputs, whatever tensor has them
            for dim in range(proxy.value.dim()):
                size = proxy.value.shape[dim]
                if not isinstance(size, int) and size.node.expr not in self._sizes:
                    self.size_of(proxy, dim)
        return (lambda root: self._call(proxies)), [self.root]

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        node = self.create_node(
            kind, target, self.create_arg(args), self.create_arg(kwargs), name, type_expr
        )
        node.meta["source"] = self._line()
        self.last = self.whereabouts()
        if kind == "placeholder":
            node.meta["val"] = self._inputs[target]
        elif kind != "get_attr":
            try:
                node.meta["val"] = self._compute(node)
            except DataDependent as error:
                return self.result_of_held(node, error)
        return self._wrap(node)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise CaptureError(
                f"{self.whereabouts()}: autocast is on here; a graph would lose it. Take it out of "
                f"forward, or convert the model to the dtype it shall run in."
            )
        node = super().create_node(kind, *args, **kwargs)
        if self._replaced:
            node.meta[REPLACED] = self._replaced[-1]
        if kind == "get_attr":
            node.meta["source"] = self._line()
            self.computing = True  # getattr on modules records nothing
            try:
                value = operator.attrgetter(str(node.target))(self.root)
            finally:
                self.computing = False
            node.meta["val"] = self._fake(value) if isinstance(value, Tensor) else value
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Proxy):
            if a.tracer is not self:
                raise StateError(
                    f"{self.whereabouts()}: forward reads a value that an earlier call left on the "
                    f"module, so one call changes the next; a graph holds no such state"
                )
            return a.node
        if isinstance(a, (Sizes, torch.Size)):
            a = tuple(a)
        if isinstance(a, SYMBOLIC):
            raise CaptureError(f"{self.whereabouts()}: a size escaped the trace")
        if isinstance(a, Tensor):
            name = self._tensors.get(id(a)) or self._take_in(a)
            return self.create_node("get_attr", name, (), {})
        return super().create_arg(a)

    def _take_in(self, tensor: Tensor) -> str:
        """Give the model a copy of a tensor that no module of it holds; returns the copy's name."""
        known = self.tensor_attrs.get(tensor)
        name = str(known or self.get_fresh_qualname("_tensor_constant"))
        if known is None:
            self.outside[name] = tensor
            copied: Any = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                copied = nn.Parameter(copied, tensor.requires_grad)
            setattr(self.root, name, copied)
            self._tensors[id(copied)] = name
        self._tensors[id(tensor)] = name
        return name

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._idle() or not isinstance(attr_val, Tensor):
            return attr_val
        name = self._tensors.get(id(attr_val))
        if name is None and isinstance(attr_val, nn.Parameter):  # of a module outside the model
            name = self._take_in(attr_val)
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        # A module made inside forward, such as a slice of an nn.Sequential, has no name: its
        # children are traced under theirs.
        if self._idle():
            return forward(*args, **kwargs)
        if m in self._copies and self._copies[m] is not self.root:
            return self._copies[m](*args, **kwargs)
        if m not in self._paths:
            return forward(*args, **kwargs)
        if self.is_opaque(path := self._paths[m]):
            return self._call_opaque(path, m, forward, args, kwargs)
        reason = replaced_forward(m) if isinstance(m, _LAYERS) else None
        if reason is None and isinstance(m, _LAYERS) and not args and "input" in kwargs:
            args, kwargs = (kwargs.pop("input"),), kwargs  # steps look for a layer's input there
        if reason is None:
            return super().call_module(m, forward, args, kwargs)
        self._replaced.append(reason)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._replaced.pop()

    def _call_opaque(self, path: str, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """The result of a module that is called as it is."""
        try:
            result = super().call_module(m, forward, args, kwargs)
        except NotImplementedError as error:  # torch.fx has no arguments like these
            raise Unfit(path, f"it takes more than tensors and constants ({error})") from error

        def known(size: Any) -> Any:
            if isinstance(size, int):
                return size
            key = size.node.expr
            return int(key) if key.is_number else self._sizes.get(key)

        def checked(proxy: TensorProxy) -> Any:
            sizes = tuple(map(known, proxy.value.shape))
            return self.create_proxy("call_function", checked_sizes, (proxy, sizes, path), {})

        return tree_map_only(TensorProxy, checked, result)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Traced are modules that compute a weight, layers with another forward, and those made of
        # other modules.
        if self.is_opaque(module_qualified_name):
            return True
        return (
            type(m).__module__ != "torch.nn.modules.transformer"
            and super().is_leaf_module(m, module_qualified_name)
            and not type(m).__module__.startswith("torch.nn.utils.")
            and all(is_plain(part) for part in m.modules())
        )

    def path_of_module(self, mod: nn.Module) -> str:
        return str(self._paths[mod])

    def _idle(self) -> bool:
        return self.computing or threading.get_ident() != self._thread

    # Values

    def _wrap(self, node: fx.Node) -> Any:
        """The proxy for a node, or its value itself where that is known."""
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return TensorProxy(node, self)
        if isinstance(value, SYMBOLIC):
            expression = value.node.expr
            if getattr(expression, "free_symbols", None):
                return SizeProxy(node, self)
            self.graph.erase_node(node)
            if expression.is_Boolean:
                return bool(expression)
            return int(expression) if expression.is_integer else float(expression)
        if isinstance(value, (tuple, list)):
            return self._unpack(node, value)
        if value is not None and not node.users:  # None: called for its effect
            self.graph.erase_node(node)
        return value

    def _unpack(self, node: fx.Node, value: Any) -> Any:
        parts = [
            self.create_proxy("call_function", operator.getitem, (Proxy(node, self), i), {})
            if isinstance(part, (Tensor, *SYMBOLIC, tuple, list))
            else part
            for i, part in enumerate(value)
        ]
        if isinstance(value, list):
            return parts
        names = getattr(value, "_fields", None) or getattr(value, "__match_args__", None)
        if not names or type(value) is tuple:
            return tuple(parts)
        return collections.namedtuple(type(value).__name__, names)(*parts)
