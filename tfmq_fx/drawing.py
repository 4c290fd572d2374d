"""A picture of an analysed model: Graphviz text, and SVG that needs no Graphviz."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from .boxes import NAMES, Box, Boxes, Op, collapse
from .dataflow import Binding
from .layout import Point, place

COLOURS = {
    Binding.CONSTANT: "#d4d4d4",
    Binding.T: "#ffc766",
    Binding.C: "#93c5ee",
    Binding.TC: "#a5d69a",
    Binding.X: "#f3f1ec",
}
_HEIGHT, _GAP, _MARGIN, _HEAD = 36.0, 28.0, 16.0, 62.0
_CHARACTER = 6.6  # of an 11 px sans-serif font, on the safe side


@dataclass(frozen=True, slots=True)
class Drawing:
    """What is needed to draw a model at any depth. ops: as `plain_ops` gives them."""

    model: str
    ops: tuple[Op, ...]

    def dot(self, depth: int = 2) -> str:
        """Graphviz text: clusters by module path, colours by binding time."""
        return _dot(self.model, collapse(self.ops, depth))

    def svg(self, depth: int = 2) -> str:
        """A self-contained picture; pointing at a box or a line tells what it is."""
        return _svg(self.model, self._total(), collapse(self.ops, depth))

    def _total(self) -> Box:
        return Box("model", self.model, "", self.model, [op for op in self.ops if op.kind == "op"])


def number(count: float, unit: str = "") -> str:
    """Three digits and a prefix for powers of a thousand: number(1234567, "FLOPs") is
    "1.23 MFLOPs"."""
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
    """The lines of a tooltip."""
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
    lines += [f"table row: {name}" for name in box.features]
    return "\n".join(lines)


# ---------------------------------------------------------------------------- Graphviz


def _dot(model: str, drawn: Boxes) -> str:
    lines = [
        f"digraph {_quoted(model)} {{",
        "  rankdir=TB;",
        '  node [fontname="Helvetica", fontsize=10, shape=box, color="#777777"];',
        '  edge [color="#777777", arrowsize=0.6];',
        '  fontname="Helvetica"; fontsize=10;',
        *_legend(),
    ]
    tree: dict[str, list[int]] = {}
    for i, box in enumerate(drawn.boxes):
        around = box.path if box.kind == "ops" else box.path.rpartition(".")[0]
        tree.setdefault(around, []).append(i)
    lines += _cluster("", tree, drawn.boxes, "  ")
    for (source, target), shape in drawn.edges.items():
        lines.append(f"  b{source} -> b{target} [tooltip={_quoted(shape)}];")
    return "\n".join([*lines, "}", ""])


def _legend() -> Iterable[str]:
    yield "  subgraph cluster_legend {"
    yield '    label="known from"; color="#bbbbbb";'
    for binding, name in NAMES.items():
        colour = COLOURS[binding]
        yield f'    legend{int(binding)} [label="{name}", style=filled, fillcolor="{colour}"];'
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


# ---------------------------------------------------------------------------- SVG


def _svg(model: str, total: Box, drawn: Boxes) -> str:
    texts = [(box.title, _subtitle(box)) for box in drawn.boxes]
    widths = [max(len(title), 0.86 * len(below)) * _CHARACTER + 18 for title, below in texts]
    layout = place(widths, drawn.edges, height=_HEIGHT, gap=_GAP)
    head = f"{model}: {number(total.parameters)} parameters, {number(total.flops, 'FLOPs')} a call"
    legend, legend_width = _svg_legend(total)
    width = max(layout.width, legend_width, len(head) * 8) + 2 * _MARGIN
    left, top = (width - layout.width) / 2, _MARGIN + _HEAD

    def at(point: Point) -> str:
        return f"{point[0] + left:.1f} {point[1] + top:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" '
        f'height="{layout.height + top + _MARGIN:.0f}" '
        f'viewBox="0 0 {width:.0f} {layout.height + top + _MARGIN:.0f}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11">',
        f"<title>{escape(head)}</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="{_MARGIN + 12}" font-size="14" fill="#222222">{escape(head)}'
        "</text>",
        *legend,
        '<g fill="none" stroke="#8a8a8a">',
    ]
    for (x, y), end in layout.lanes:
        parts.append(f'<path d="M {at((x, y))} L {at(end)}"/>')
    for i, ((x, y), (u, v)) in enumerate(layout.lines):
        arrives, middle = i in layout.ends, (y + v) / 2
        stop = v - 5 if arrives else v
        bends = f"{at((x, middle))}, {at((u, middle))}, {at((u, stop))}"
        parts.append(f'<path d="M {at((x, y))} C {bends}"/>')
        if arrives:
            tip = f"M {at((u, v))} L {at((u - 3, v - 6))} L {at((u + 3, v - 6))} Z"
            parts.append(f'<path d="{tip}" fill="#8a8a8a" stroke="none"/>')
    parts.append("</g>")
    for box, (title, below), corner, wide in zip(
        drawn.boxes, texts, layout.boxes, widths, strict=True
    ):
        parts += _svg_box(box, title, below, corner[0] + left, corner[1] + top, wide)
    return "\n".join([*parts, "</svg>", ""])


def _svg_legend(total: Box) -> tuple[list[str], float]:
    parts, x, y = list[str](), _MARGIN, _MARGIN + 28
    for binding, name in NAMES.items():
        count = sum(op.parameters for op in total.ops if op.binding is binding)
        text = f"{name}: {100 * count / max(total.parameters, 1):.3g} %"
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="14" height="14" rx="3" '
            f'fill="{COLOURS[binding]}" stroke="#777777"/>'
            f'<text x="{x + 20:.1f}" y="{y + 11:.1f}" fill="#222222">{escape(text)}</text>'
        )
        x += 34 + len(text) * _CHARACTER
    return parts, x


def _svg_box(box: Box, title: str, below: str, x: float, y: float, wide: float) -> Iterable[str]:
    rim = "#bbbbbb" if box.kind == "ops" else "#666666"
    round_ = _HEIGHT / 2 if box.kind in ("input", "output") else 5
    middle, first = x + wide / 2, y + (15 if below else 22)
    yield f"<g><title>{escape(_details(box))}</title>"
    start = x
    mix = box.mix()
    if len(mix) > 1:
        for binding, share in mix.items():
            yield (
                f'<rect x="{start:.1f}" y="{y:.1f}" width="{share * wide:.1f}" '
                f'height="{_HEIGHT}" fill="{COLOURS[binding]}"/>'
            )
            start += share * wide
    fill = "none" if len(mix) > 1 else COLOURS[next(iter(mix))]
    yield (
        f'<rect class="box" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{_HEIGHT}" '
        f'rx="{0 if len(mix) > 1 else round_}" fill="{fill}" stroke="{rim}"/>'
    )
    yield (
        f'<text x="{middle:.1f}" y="{first:.1f}" text-anchor="middle" fill="#111111">'
        f"{escape(title)}</text>"
    )
    if below:
        yield (
            f'<text x="{middle:.1f}" y="{y + 28:.1f}" text-anchor="middle" font-size="9.5" '
            f'fill="#444444">{escape(below)}</text>'
        )
    yield "</g>"
