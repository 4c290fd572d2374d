"""Random small CAPTURED graphs, complete with values, for property tests.

A graph takes x (B, WIDTH), t (B,), c (B, WIDTH) and an input that nothing reads. Values are of
shape (B, WIDTH), drawn from earlier ones, so that regions share subgraphs and have several outputs.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import note
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

WIDTH = 4
STEPS = torch.tensor([0, 3, 7, 11, 500, 999])


class GraphBuilder:
    """Writes a CAPTURED graph node by node; each node's value is computed on fake tensors."""

    def __init__(self, *, timestep_dtype: torch.dtype = torch.int64) -> None:
        self.root, self.graph = nn.Module(), fx.Graph()
        self.fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.fake.cache_enabled = False  # as in `capture`
        self._generator = torch.Generator().manual_seed(0)
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
        sample = self.fake.from_tensor(
            torch.empty(3, WIDTH), symbolic_context=context, source=ConstantSource("x")
        )
        self.batch = sample.shape[0]
        self.x = self.placeholder("x", sample)
        self.t = self.placeholder("t", sample.new_empty((self.batch,), dtype=timestep_dtype))

    def placeholder(self, name: str, value: Tensor) -> fx.Node:
        """An input with its (fake) value."""
        return self._finish(self.graph.placeholder(name), value, "")

    def condition(self, name: str) -> fx.Node:
        """A float input (B, WIDTH)."""
        value: Tensor = self.x.meta["val"]
        return self.placeholder(name, value.new_empty((self.batch, WIDTH)))

    def call(self, target: Any, *args: Any, path: str = "", **kwargs: Any) -> fx.Node:
        """A call of a function, or of a method where `target` is a string."""
        op = "call_method" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(op, target, args, kwargs)
        values, named = (fx.map_arg(a, _value) for a in (args, kwargs))
        function = getattr(type(values[0]), target) if isinstance(target, str) else target
        return self._finish(node, self._run(function, *values, **named), path)

    def layer(self, path: str, module: nn.Module, *args: fx.Node) -> fx.Node:
        """A call of a leaf module, added at `path` unless there is one."""
        if path not in dict(self.root.named_modules()):
            for parameter in module.parameters():
                parameter.data.uniform_(-0.5, 0.5, generator=self._generator)
            _plant(self.root, path, module.eval())
        node = self.graph.call_module(path, args)
        value = self._run(self.root.get_submodule(path), *(a.meta["val"] for a in args))
        return self._finish(node, value, path)

    def buffer(self, name: str, value: Tensor) -> fx.Node:
        """A get_attr node for a buffer (or parameter) of the root."""
        if isinstance(value, nn.Parameter):
            self.root.register_parameter(name, value)
        else:
            self.root.register_buffer(name, value)
        return self._finish(self.graph.get_attr(name), self.fake.from_tensor(value), "")

    def size(self, node: fx.Node, dim: int = 0) -> fx.Node:
        """The size of a dimension as a node."""
        return self.call(torch.ops.aten.sym_size.int, node, dim)

    def sinusoid(self) -> fx.Node:
        """Sines of t at several frequencies, (B, WIDTH)."""
        column = self.call(operator.getitem, self.call("float", self.t), (slice(None), None))
        frequencies = self.buffer("frequencies", torch.tensor([1.0, 0.3, 0.1, 0.01]))
        return self.call(torch.sin, self.call(operator.mul, column, frequencies))

    def finish(self, *outputs: fx.Node) -> fx.GraphModule:
        """The graph module that returns `outputs`."""
        self.graph.output(outputs)
        gm = fx.GraphModule(self.root, self.graph, "Denoiser")
        gm.meta["timestep"] = "t"
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return gm

    def _run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.fake, enable_python_dispatcher(), torch.no_grad():
            return function(*args, **kwargs)

    def _finish(self, node: fx.Node, value: Any, path: str) -> fx.Node:
        parts = path.split(".") if path else []
        paths = [""] + [".".join(parts[: i + 1]) for i in range(len(parts))]
        stack = OrderedDict((p, (p, nn.Module)) for p in paths)
        node.meta = {"val": value, "nn_module_stack": stack}
        return node


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def _plant(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


_UNARY: tuple[Callable[[GraphBuilder, fx.Node], fx.Node], ...] = (
    lambda b, v: b.call(F.silu, v),
    lambda b, v: b.call("neg", v),
    lambda b, v: b.call(torch.zeros_like, v),
    lambda b, v: b.call(
        operator.getitem,
        b.call("chunk", b.call(torch.cat, [v, v], 1), 2, 1),
        1,
    ),
    lambda b, v: b.call(  # expansion to the batch, the size read from another input
        operator.mul, v, b.call("new_ones", v, (b.size(b.x), 1))
    ),
    lambda b, v: b.call("reshape", b.call("unsqueeze", v, 1), b.size(v), WIDTH),
    lambda b, v: b.call("sum", b.call("view", v, b.size(v), 2, 2), 2, keepdim=True),
)
_BINARY = (operator.add, operator.mul, torch.maximum)


@st.composite
def captured_graphs(draw: st.DrawFn) -> fx.GraphModule:
    """A random graph: x, t, c, unused -> tuple of 1 to 3 values that depend on x, t or c."""
    b = GraphBuilder(timestep_dtype=draw(st.sampled_from((torch.int64, torch.float32))))
    condition = b.condition("c")
    b.condition("unused")
    values = [b.x, condition, b.sinusoid(), b.buffer("table", torch.ones(1, WIDTH))]
    values.append(b.layer("time.linear", nn.Linear(WIDTH, WIDTH), values[2]))
    for i in range(draw(st.integers(2, 9))):
        pick = st.sampled_from(values)
        kind = draw(st.sampled_from(("layer", "layer", "unary", "binary", "binary")))
        if kind == "layer":
            made = b.layer(f"blocks.{i}.proj", nn.Linear(WIDTH, WIDTH), draw(pick))
        elif kind == "unary":
            made = draw(st.sampled_from(_UNARY))(b, draw(pick))
            if made.meta["val"].dim() == 3:
                made = b.call("repeat", b.call("flatten", made, 1), 1, 2)
        else:
            made = b.call(draw(st.sampled_from(_BINARY)), draw(pick), draw(pick))
        values.append(made)
    chosen = draw(st.lists(st.sampled_from(values[4:]), min_size=1, max_size=3, unique=True))
    outputs = [b.call(operator.add, v, b.x) if draw(st.booleans()) else v for v in chosen]
    gm = b.finish(*outputs)
    note(gm.code)
    return gm


def draw_inputs(gm: fx.GraphModule, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of a graph of `captured_graphs` or `GraphBuilder`, t from STEPS."""
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if node.target == gm.meta["timestep"]:
            picks = torch.randint(len(STEPS), (batch,), generator=generator)
            inputs[str(node.target)] = STEPS[picks].to(value.dtype)
        else:
            shape = (batch, *value.shape[1:])
            inputs[str(node.target)] = torch.randn(shape, generator=generator)
    return inputs
