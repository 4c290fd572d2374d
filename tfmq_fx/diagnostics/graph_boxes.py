"""Turn an analysed graph into plain data, and that into boxes: modules down to a depth."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from tfmq_fx.ir.binding_times import Binding, BindingTimes
from tfmq_fx.ir.node_info import is_view, op_name, value_inputs

NAMES = {
    Binding.CONSTANT: "constant",
    Binding.T: "t",
    Binding.C: "c",
    Binding.TC: "(t, c)",
    Binding.X: "x",
}


@dataclass(frozen=True, slots=True)
class Op:
    """A node of a graph as plain data.

    kind: "input", "output" or "op".  stack: the modules it was recorded in, outermost first, as
    (path, class name).  reads: places of the nodes whose values it takes.  features: names of the
    table rows that would replace it.
    """

    name: str
    kind: str
    stack: tuple[tuple[str, str], ...]
    binding: Binding
    parameters: int
    flops: int
    shape: str
    view: bool
    reads: tuple[int, ...]
    features: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return self.stack[-1][0] if self.stack else ""


@dataclass(slots=True)
class Box:
    """One box of the drawing: an input, an output, a call of a module, or successive operations
    that belong to no module drawn as one.

    path: of the module, or of the one whose operations they are.
    """

    kind: str
    title: str
    path: str
    label: str
    ops: list[Op] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        return sum(op.parameters for op in self.ops)

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.ops)

    def mix(self) -> dict[Binding, float]:
        """The share of each binding time, earliest first, in parameters; where there are none in
        operations, of which constants do not count beside others."""
        count: Counter[Binding] = Counter()
        for op in self.ops:
            count[op.binding] += op.parameters
        if not count.total():
            count.update(op.binding for op in self.ops)
            if len(count) > 1:
                del count[Binding.CONSTANT]
        return {b: n / count.total() for b, n in sorted(count.items()) if n}


def plain_ops(
    gm: fx.GraphModule,
    times: BindingTimes,
    parameters: Mapping[fx.Node, int],
    flops: Mapping[fx.Node, int],
    features: Mapping[fx.Node, str],
) -> tuple[Op, ...]:
    """The nodes worth drawing, in graph order: no sizes, and no parameters that are only read."""
    place: dict[fx.Node, int] = {}
    ops: list[Op] = []
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "get_attr" or not (
            node.op == "output" or isinstance(value, (Tensor, tuple, list))
        ):
            continue
        stack = tuple(
            (path, getattr(kind, "__name__", str(kind)))
            for path, kind in (node.meta.get("nn_module_stack") or {}).values()
            if path
        )
        if node.op == "call_module" and (not stack or stack[-1][0] != str(node.target)):
            name = type(gm.get_submodule(str(node.target))).__name__
            stack = (*stack, (str(node.target), name))
        place[node] = len(ops)
        ops.append(
            Op(
                name=str(node.target) if node.op == "placeholder" else op_name(node) or node.op,
                kind={"placeholder": "input", "output": "output"}.get(node.op, "op"),
                stack=() if node.op in ("placeholder", "output") else stack,
                binding=times[node],
                parameters=parameters.get(node, 0),
                flops=flops.get(node, 0),
                shape=_shape(value),
                view=is_view(node),
                reads=tuple(dict.fromkeys(place[n] for n in value_inputs(node) if n in place)),
                features=(features[node],) if node in features else (),
            )
        )
    return tuple(ops)


def _shape(value: object) -> str:
    if isinstance(value, Tensor):
        return f"({', '.join(re.sub(r'[su][0-9]+', 'batch', str(size)) for size in value.shape)})"
    if isinstance(value, (tuple, list)):
        return ", ".join(dict.fromkeys(map(_shape, value)))
    return ""


def collapse(ops: Sequence[Op], depth: int) -> tuple[list[Box], dict[tuple[int, int], str]]:
    """The boxes for modules whose paths have `depth` parts, in an order in which they can be
    computed, and the edges between them: (from, to) by place -> the shape of the value passed.

    A path counts as "down_blocks.0.resnets.1" -> 4 parts.  Where the module at that depth is only a
    container that is never called, the first called one below it is drawn.  Views of one value
    belong to the box that makes the value; operations in between form boxes of their own, apart
    by binding time.
    """
    called = {path for op in ops for path, _ in op.stack}
    parents = {path.rpartition(".")[0] for path in called} | {
        outer for op in ops for (outer, _), _ in itertools.pairwise(op.stack)
    }
    times = _drawn_times(ops)
    boxes: list[Box] = []
    where: list[int] = []  # op -> box
    last: tuple[object, ...] | None = None
    edges: dict[tuple[int, int], str] = {}
    for i, op in enumerate(ops):
        sources = {where[j] for j in op.reads}
        path, name = _module(op, depth, parents)
        own = op.kind == "op" and not name
        if own and op.view and len(sources) == 1:
            (source,) = sources
            if boxes[source].kind != "input":
                where.append(source)
                boxes[source].ops.append(op)
                continue
        # Runs in graph order: their contraction cannot make a cycle, that of any others can.
        key = (op.kind, path, own and times[i], op.kind == "op" or i)
        if key != last:
            title = path if op.kind == "op" and not own else op.name
            boxes.append(Box("ops" if own else op.kind, title, path, name))
            last = key
        where.append(len(boxes) - 1)
        boxes[-1].ops.append(op)
        for j in op.reads:
            if where[j] != where[i]:
                edges.setdefault((where[j], where[i]), ops[j].shape)
    for box in boxes:
        if box.kind == "ops":
            names = list(dict.fromkeys(op.name for op in box.ops if not op.view)) or [box.title]
            box.title = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        elif box.kind == "op":
            box.kind = "module"
    return boxes, edges


def _module(op: Op, depth: int, parents: set[str]) -> tuple[str, str]:
    """The path and class of the module that stands for `op`; for an operation of a module that is
    drawn in parts, that module's path and no class."""
    for path, name in op.stack:
        if path.count(".") + 1 >= depth:
            return path, name
    if op.stack and op.path not in parents:
        return op.stack[-1]
    return op.path, ""


def _drawn_times(ops: Sequence[Op]) -> list[Binding]:
    """The binding time of each operation; a constant gets that of its first reader."""
    times = [op.binding for op in ops]
    for i in reversed(range(len(ops))):
        for j in ops[i].reads:
            if ops[j].binding is Binding.CONSTANT:
                times[j] = times[i]
    return times
