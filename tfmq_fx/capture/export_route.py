"""Capture models whose code cannot be traced, by way of torch.export.

An exported graph has no layers and its sizes carry export's own guards. So it is run once more on
the tracer's proxies, with calls of the model's layers in place of their operations, and gets the
same form as any other captured graph.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.core.errors import CaptureError
from tfmq_fx.ir.graph import module_paths, named_tensors

from .fake_values import SizeTest
from .nested_values import Const, Structure
from .tracer import TRACING, ValueTracer

_aten = torch.ops.aten
# Operation -> the layer whose whole forward it may be, and the position of its weight.
_LAYERS: dict[Any, tuple[type[nn.Module], int]] = {
    _aten.linear.default: (nn.Linear, 1),
    _aten.embedding.default: (nn.Embedding, 0),
    _aten.group_norm.default: (nn.GroupNorm, 2),
    _aten.layer_norm.default: (nn.LayerNorm, 2),
    **{
        overload: (kind, 1)
        for name, kind in (("conv1d", nn.Conv1d), ("conv2d", nn.Conv2d), ("conv3d", nn.Conv3d))
        for overload in (getattr(_aten, name).default, getattr(_aten, name).padding)
    },
}
_CHECKS = {
    _aten._assert_tensor_metadata.default,
    _aten._assert_scalar.default,
    _aten.sym_constrain_range.default,
    _aten.sym_constrain_range_for_size.default,
}
_WHOLE = 2**63 - 1  # the end of x[a:] in an exported graph
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


@dataclass(frozen=True)
class Exported:
    """A model exported by torch.export.

    tensors: placeholder -> path of its parameter or buffer.
    constants: placeholder -> tensor that forward creates, or reads from elsewhere.
    output: structure of forward's result.  tests: the conditions on sizes that forward tests.
    """

    graph: fx.GraphModule
    tensors: dict[str, str]
    constants: dict[str, Tensor]
    output: Structure
    tests: tuple[SizeTest, ...]

    def register(self, model: nn.Module) -> None:
        """Register the constants as buffers of `model`, a copy of the exported model."""
        for name, value in self.constants.items():
            model.register_buffer(name, value.detach().clone(), persistent=False)

    def run(self, tracer: ValueTracer, model: nn.Module, values: Sequence[Any]) -> tuple[Any, ...]:
        """The flat outputs for `values`, computed by operations that the tracer records."""
        inputs = iter(values)
        nodes = self.graph.graph.find_nodes(op="placeholder")
        held = {**{name: name for name in self.constants}, **self.tensors}
        operands = [
            attrgetter(held[node.name])(model) if node.name in held else next(inputs)
            for node in nodes
        ]
        paths = {node: self.tensors[node.name] for node in nodes if node.name in self.tensors}
        return tuple(_Retrace(self.graph, tracer, model, paths).run(*operands))


def export(
    model: nn.Module,
    call: Callable[..., tuple[Structure, tuple[Any, ...]]],
    examples: Sequence[Tensor],
    shapes: Sequence[Sequence[int | str]],
) -> Exported:
    """Export `model` as call(*tensors) runs it, which returns its output's structure and tensors.

    shapes: of the examples; a name where a size is free.  Raises CaptureError where torch.export
    fails, or its graph cannot be traced.
    """
    from torch.export import Dim  # takes 0.2 s to import, and few models need it

    output: Structure = Const(None)

    def run(*values: Tensor) -> tuple[Any, ...]:
        nonlocal output
        output, leaves = call(*values)
        return leaves

    flat = _Flat(model, run)
    dims = [{i: Dim.DYNAMIC for i, s in enumerate(shape) if isinstance(s, str)} for shape in shapes]
    try:
        with TRACING, torch.no_grad(), _quiet():
            program = torch.export.export(
                flat, tuple(examples), dynamic_shapes={"values": tuple(dims)}, strict=False
            )
            if _is_high_level(program.graph_module):
                program = program.run_decompositions({})
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise CaptureError(f"torch.export raises {type(error).__name__}: {first}") from error
    signature = program.graph_signature
    written = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    if written:
        raise CaptureError(f"torch.export: forward writes to {', '.join(written.values())}")
    paths = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    tensors = {name: path.removeprefix("model.") for name, path in paths.items()}
    constants: dict[str, Tensor] = {}
    held = {_memory_key(value): path for path, value in reversed([*named_tensors(model)])}
    for name, target in signature.inputs_to_lifted_tensor_constants.items():
        value = program.constants[target]
        if (key := _memory_key(value)) in held:
            tensors[name] = held[key]
        else:
            constants[name] = value
    inputs = [
        node
        for node in program.graph_module.graph.find_nodes(op="placeholder")
        if node.name not in tensors and node.name not in constants
    ]
    tests = _tests(inputs, shapes)
    return Exported(program.graph_module, tensors, constants, output, tests)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch.export's logging and warnings; its error is raised again and reported."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _memory_key(value: Tensor) -> Any:
    """A key that is equal for tensors on the same memory.

    A function that a module holds may read a parameter of the original of an exported copy, which
    torch.export takes for a constant.
    """
    if not value.numel() or value.is_meta:
        return id(value)
    return value.data_ptr(), value.shape, value.stride(), value.dtype


class _Flat(nn.Module):
    """A module that calls a function on flat inputs, since torch.export takes modules only."""

    def __init__(self, model: nn.Module, call: Callable[..., tuple[Any, ...]]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *values: Tensor) -> tuple[Any, ...]:
        return self.call(*values)


def _is_high_level(gm: fx.GraphModule) -> bool:
    """Whether a graph contains autocast or vmap as operators that torch can decompose."""
    cast = torch.ops.higher_order.wrap_with_autocast
    return any(
        (node.target is cast and node.args[2])
        or "functorch" in str(getattr(node.target, "__module__", ""))
        for part in gm.modules()
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
    )


def _tests(inputs: list[fx.Node], shapes: Sequence[Sequence[int | str]]) -> tuple[SizeTest, ...]:
    """The conditions on free sizes that torch.export met in the model's own code."""
    import sympy  # type: ignore[import-untyped]

    names: dict[Any, sympy.Symbol] = {}
    environment: Any = None
    for node, shape in zip(inputs, shapes, strict=True):
        for size, free in zip(node.meta["val"].shape, shape, strict=True):
            if not isinstance(free, str):
                continue
            if not isinstance(size, torch.SymInt):
                raise CaptureError(f"torch.export fixes {free} of {node.name} at {size}")
            environment = size.node.shape_env
            names[size.node.expr] = sympy.Symbol(free, integer=True, positive=True)
    tests: dict[SizeTest, None] = {}
    for guard in environment.guards if environment else ():
        frame = guard.sloc.framework_loc
        where = str(getattr(frame, "filename", ""))
        if where.startswith(torch.__path__[0]):
            continue
        # Older guards have symbols of sizes that later turned out equal to others.
        expression = environment.replace(guard.expr).xreplace(names)
        source = f"{where.rpartition('/')[2]}:{getattr(frame, 'lineno', 0)}"
        if not expression.free_symbols <= {*names.values()}:
            raise CaptureError(f"torch.export: {source} branches on {expression}, no input's size")
        tests[SizeTest(expression, True, source)] = None
    return tuple(tests)


class _Retrace(fx.Interpreter):
    """An interpreter that runs an exported graph on proxies.

    It calls layers by name, leaves checks out and inlines contexts.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        tracer: ValueTracer,
        model: nn.Module,
        paths: dict[fx.Node, str],
    ) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.tracer, self.model, self.paths = tracer, model, paths
        self.known = {path for path, _ in model.named_modules(remove_duplicate=False)}
        self.node: fx.Node = next(iter(graph.graph.nodes))  # the node that is run

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        if n.op != "call_function":
            return super().run_node(n)
        paths = [path.removeprefix("model").removeprefix(".") for path in module_paths(n)]
        known = dict.fromkeys(path for path in paths if path in self.known)
        layer = self._layer(n, next(reversed(known), ""))
        if layer is not None:
            known.pop(layer)
        self.tracer.module_stack = OrderedDict(
            (path, (path, type(self.model.get_submodule(path)))) for path in known
        )
        frames = _FRAME.findall(n.meta.get("stack_trace") or "")
        own = [frame for frame in frames if not frame[0].startswith((*torch.__path__, "<"))]
        if own or frames:
            name, line = (own or frames)[-1]
            self.tracer.source = f"{name.rpartition('/')[2]}:{line}"
        try:
            if layer is None:
                return super().run_node(n)
            operand = 0 if _LAYERS[n.target][1] else 1  # before the weight, or behind it
            return self.model.get_submodule(layer)(self.fetch_args_kwargs_from_env(n)[0][operand])
        finally:
            self.tracer.source = None

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _CHECKS:
            return None
        higher = torch.ops.higher_order
        if target in (higher.wrap_with_set_grad_enabled, higher.wrap_with_autocast):
            at = 1 if target is higher.wrap_with_set_grad_enabled else 4
            return self._inline(args[at], args[at + 1 :])
        if isinstance(target, torch._ops.HigherOrderOperator):
            raise CaptureError(f"torch.export returns {target}, which no pass of ours can handle")
        if target is _aten.slice.Tensor and tuple(args[2:4]) == (0, _WHOLE) and len(args) == 4:
            return args[0]
        return super().call_function(target, args, kwargs)

    def _inline(self, part: fx.GraphModule, operands: Sequence[Any]) -> Any:
        """The outputs of a subgraph, run as a part of this graph."""
        outer = self.node.args[len(self.node.args) - len(operands) :]
        inner = part.graph.find_nodes(op="placeholder")
        paths = {
            placeholder: self.paths[node]
            for placeholder, node in zip(inner, outer, strict=True)
            if isinstance(node, fx.Node) and node in self.paths
        }
        return _Retrace(part, self.tracer, self.model, paths).run(*operands)

    def _layer(self, node: fx.Node, path: str) -> str | None:
        """The path of the layer at `path`, if `node` is its operation on its weight; else None."""
        kind, at = _LAYERS.get(node.target, (None, 0))
        if kind is None or not path:
            return None
        weight = node.args[at] if len(node.args) > at else None
        same = isinstance(weight, fx.Node) and self.paths.get(weight) == f"{path}.weight"
        return path if same and type(self.model.get_submodule(path)) is kind else None
