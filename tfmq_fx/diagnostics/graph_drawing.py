"""Draw an analysed model: Graphviz text, and the SVG that Graphviz makes from it.

pygraphviz, whose wheels bring Graphviz along, is imported when first needed; it comes with
`pip install "tfmq_fx[draw]"`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.ir.binding_times import Binding

from .graph_boxes import NAMES, Box, Op, collapse

COLOURS = {
    Binding.CONSTANT: "#d4d4d4",
    Binding.T: "#ffc766",
    Binding.C: "#93c5ee",
    Binding.TC: "#a5d69a",
    Binding.X: "#f3f1ec",
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """The drawing of a model at any depth. ops: as `plain_ops` returns them."""

    model: str
    ops: tuple[Op, ...]

    def dot(self, depth: int = 2) -> str:
        """Graphviz text: clusters by module path, colours by binding time."""
        total = Box("model", self.model, "", "", [op for op in self.ops if op.kind == "op"])
        return _dot(total, *collapse(self.ops, depth))

    def svg(self, depth: int = 2) -> str:
        """A self-contained picture with a tooltip at each box and line. Raises ConfigError without
        pygraphviz."""
        try:
            graphs = importlib.import_module("pygraphviz")
        except ImportError as error:
            raise ConfigError(
                'an .svg picture needs pygraphviz: pip install "tfmq_fx[draw]"; .dot, text for a '
                "Graphviz of your own, needs nothing"
            ) from error
        picture = graphs.AGraph(string=self.dot(depth)).draw(format="svg", prog="dot")
        return cast(bytes, picture).decode()


def number(count: float, unit: str = "") -> str:
    """A number with three digits and a prefix: number(1234567, "FLOPs") is "1.23 MFLOPs"."""
    prefixes = iter(("", "k", "M", "G", "T"))
    prefix = next(prefixes)
    while abs(count) >= 999.5 and prefix != "T":
        count, prefix = count / 1000, next(prefixes)
    return f"{count:.3g} {prefix}{unit}".rstrip()


def _subtitle(box: Box) -> str:
    if box.kind != "module" or not box.parameters:
        return box.label
    return f"{box.label}, {number(box.parameters)}, {_mix(box)}"


def _mix(box: Box) -> str:
    mix = box.mix()
    if len(mix) == 1:
        return NAMES[next(iter(mix))]
    return " + ".join(f"{100 * share:.0f} % {NAMES[b]}" for b, share in mix.items())


def _details(box: Box) -> str:
    """The text of a box's tooltip."""
    if box.kind in ("input", "output"):
        shape = f" {box.ops[0].shape}" if box.ops[0].shape else ""
        return f"{box.kind} {box.title}{shape}: {_mix(box)}"
    lines = [f"{box.path or 'the model itself'}: {box.label or box.title}"]
    for binding, name in NAMES.items():
        part = [op for op in box.ops if op.binding is binding]
        if part:
            lines.append(
                f"{name}: {len(part)} operations, {sum(op.parameters for op in part):,} "
                f"parameters, {number(sum(op.flops for op in part), 'FLOPs')}"
            )
    lines.append(f"gives {box.ops[-1].shape}")
    lines += [f"table row: {name}" for op in box.ops for name in op.features]
    return "\n".join(lines)


def _dot(total: Box, boxes: Sequence[Box], edges: Mapping[tuple[int, int], str]) -> str:
    parameters, flops = number(total.parameters), number(total.flops, "FLOPs")
    head = f"{total.title}: {parameters} parameters, {flops} a call"
    lines = [
        f"digraph {_quoted(total.title)} {{",
        f"  rankdir=TB; newrank=true; labelloc=t; label={_quoted(head)};",
        '  node [fontname="Helvetica", fontsize=10, shape=box, color="#777777"];',
        '  edge [color="#777777", arrowsize=0.6];',
        '  fontname="Helvetica"; fontsize=10;',
        *_legend(total),
    ]
    tree: dict[str, list[int]] = {}
    for i, box in enumerate(boxes):
        around = box.path if box.kind == "ops" else box.path.rpartition(".")[0]
        tree.setdefault(around, []).append(i)
    lines += _cluster("", tree, boxes, "  ")
    for (source, target), shape in edges.items():
        lines.append(f"  b{source} -> b{target} [tooltip={_quoted(shape)}];")
    return "\n".join([*lines, "}", ""])


def _legend(total: Box) -> Iterable[str]:
    yield "  subgraph cluster_legend {"
    yield '    label="parameters known from"; color="#bbbbbb";'
    for binding, name in NAMES.items():
        colour = COLOURS[binding]
        count = sum(op.parameters for op in total.ops if op.binding is binding)
        label = f"{name}: {100 * count / max(total.parameters, 1):.3g} %"
        yield f'    legend{int(binding)} [label="{label}", style=filled, fillcolor="{colour}"];'
    yield "  }"


def _cluster(
    path: str, tree: Mapping[str, Sequence[int]], boxes: Sequence[Box], indent: str
) -> Iterable[str]:
    for i in tree.get(path, ()):
        yield f"{indent}b{i} [{_attributes(boxes[i])}];"
    start = f"{path}." if path else ""
    inner = {p[len(start) :].split(".")[0] for p in tree if p != path and p.startswith(start)}
    for name in sorted(inner - {""}, key=lambda part: (not part.isdigit(), part.zfill(6))):
        yield f"{indent}subgraph {_quoted('cluster_' + start + name)} {{"
        yield f'{indent}  label={_quoted(start + name)}; color="#bbbbbb"; style=rounded;'
        yield from _cluster(start + name, tree, boxes, indent + "  ")
        yield f"{indent}}}"


def _attributes(box: Box) -> str:
    mix = box.mix()
    colours = [COLOURS[b] for b in mix]
    stripes = ":".join(f"{COLOURS[b]};{share:.4f}" for b, share in list(mix.items())[:-1])
    shares = {
        "label": "\n".join(filter(None, (box.title, _subtitle(box)))),
        "tooltip": _details(box),
        "style": "striped" if stripes else "filled",
        "fillcolor": f"{stripes}:{colours[-1]}" if stripes else colours[0],
    }
    if box.kind in ("input", "output"):
        shares |= {"shape": "ellipse"}
    if box.kind == "ops":
        shares |= {"color": "#bbbbbb"}
    return ", ".join(f"{name}={_quoted(value)}" for name, value in shares.items())


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
