"""Places for the boxes of a layered drawing: no two overlap, and no line crosses a box.

The steps of Sugiyama, Tagawa and Toda (1981): layers, order within layers by barycentres, then
coordinates, here by least squares under a least distance.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

_SWEEPS = 12
_LANE = 12.0  # width kept free for a line that passes a layer
_GAP = 14.0

Point = tuple[float, float]
Item = tuple[int, int]  # a box (box, its layer), or a line that passes: (its source, the layer)


@dataclass(frozen=True, slots=True)
class Layout:
    """boxes: top left corners.  lines: for each (item, item) of neighbouring layers a line from
    bottom to top; lane: a line straight down through a layer, from top to bottom.  Lines of one
    source share their way.  ends: which of `lines` arrive at a box.
    """

    boxes: tuple[Point, ...]
    lines: tuple[tuple[Point, Point], ...]
    lanes: tuple[tuple[Point, Point], ...]
    ends: frozenset[int]
    width: float
    height: float


def place(
    widths: Sequence[float], edges: Iterable[tuple[int, int]], *, height: float, gap: float
) -> Layout:
    """Where to draw boxes of these widths, all of one height, that these acyclic edges join.

    gap: free height between layers.
    """
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(widths)))
    graph.add_edges_from(edges)
    layer = _layers(graph)
    links: dict[tuple[Item, Item], None] = {}
    for source, target in graph.edges:
        way = [(source, n) for n in range(layer[source], layer[target])] + [(target, layer[target])]
        links.update(dict.fromkeys(itertools.pairwise(way)))
    items = dict.fromkeys((box, layer[box]) for box in graph.nodes)
    items.update(dict.fromkeys(item for link in links for item in link))
    rows: list[list[Item]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    for item in items:
        rows[item[1]].append(item)
    above: dict[Item, list[Item]] = {item: [] for item in items}
    below: dict[Item, list[Item]] = {item: [] for item in items}
    for first, second in links:
        above[second].append(first)
        below[first].append(second)
    rows = _order(rows, above, below)
    wide = {item: widths[item[0]] if layer[item[0]] == item[1] else _LANE for item in items}
    centre = _centres(rows, above, below, wide)
    left = min((centre[item] - wide[item] / 2 for item in items), default=0.0)
    right = max((centre[item] + wide[item] / 2 for item in items), default=0.0)

    def at(item: Item, bottom: bool) -> Point:
        return centre[item] - left, item[1] * (height + gap) + (height if bottom else 0.0)

    return Layout(
        boxes=tuple(
            (centre[box, layer[box]] - left - widths[box] / 2, layer[box] * (height + gap))
            for box in graph.nodes
        ),
        lines=tuple((at(first, True), at(second, False)) for first, second in links),
        lanes=tuple(
            (at(item, False), at(item, True)) for item in items if layer[item[0]] != item[1]
        ),
        ends=frozenset(i for i, (_, (box, row)) in enumerate(links) if layer[box] == row),
        width=right - left,
        height=len(rows) * (height + gap) - gap if rows else 0.0,
    )


def _layers(graph: nx.DiGraph) -> dict[int, int]:
    """The longest way to each box; what nothing leads to stands right above its first reader."""
    layer = {box: n for n, layer in enumerate(nx.topological_generations(graph)) for box in layer}
    for box in graph.nodes:
        if not graph.in_degree(box) and graph.out_degree(box):
            layer[box] = min(layer[reader] for reader in graph.successors(box)) - 1
    return layer


def _order(
    rows: list[list[Item]], above: Mapping[Item, list[Item]], below: Mapping[Item, list[Item]]
) -> list[list[Item]]:
    """Each layer sorted by the mean place of its neighbours, over and over; the best is kept."""
    best, fewest = rows, _crossings(rows, below)
    for sweep in range(_SWEEPS):
        if not fewest:
            break
        rows = list(rows)
        near, downwards = (below, above)[sweep % 2 == 0], sweep % 2 == 0
        numbers = range(1, len(rows)) if downwards else range(len(rows) - 2, -1, -1)
        for n in numbers:
            place = {item: i for i, item in enumerate(rows[n - 1 if downwards else n + 1])}
            here = {item: i for i, item in enumerate(rows[n])}
            rows[n] = sorted(rows[n], key=lambda item: _mean(near[item], place, here[item]))
        if (crossings := _crossings(rows, below)) < fewest:
            best, fewest = rows, crossings
    return best


def _mean(items: Sequence[Item], place: Mapping[Item, float], otherwise: float) -> float:
    return sum(place[item] for item in items) / len(items) if items else otherwise


def _crossings(rows: list[list[Item]], below: Mapping[Item, list[Item]]) -> int:
    count = 0
    for first, second in itertools.pairwise(rows):
        place, seen = {item: i for i, item in enumerate(second)}, list[int]()
        for item in first:
            ends = sorted(place[end] for end in below[item])
            count += sum(len(seen) - bisect.bisect_right(seen, end) for end in ends)
            for end in ends:
                bisect.insort(seen, end)
    return count


def _centres(
    rows: list[list[Item]],
    above: Mapping[Item, list[Item]],
    below: Mapping[Item, list[Item]],
    wide: Mapping[Item, float],
) -> dict[Item, float]:
    centre: dict[Item, float] = {}
    for row in rows:
        centre |= dict(zip(row, _spread([0.0] * len(row), row, wide), strict=True))
    for sweep in range(_SWEEPS):
        near = below if sweep % 2 else above
        for row in reversed(rows) if sweep % 2 else rows:
            wanted = [_mean(near[item], centre, centre[item]) for item in row]
            centre |= dict(zip(row, _spread(wanted, row, wide), strict=True))
    return centre


def _spread(wanted: list[float], row: list[Item], wide: Mapping[Item, float]) -> list[float]:
    """Centres nearest to the wanted ones, in least squares, at which nothing overlaps."""
    offsets = [0.0]
    for first, second in itertools.pairwise(row):
        offsets.append(offsets[-1] + (wide[first] + wide[second]) / 2 + _GAP)
    blocks: list[tuple[float, int]] = []  # isotonic regression: pool what is out of order
    for want, offset in zip(wanted, offsets, strict=False):
        mean, size = want - offset, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, size = (mean * size + before * count) / (size + count), size + count
        blocks.append((mean, size))
    means = [mean for mean, size in blocks for _ in range(size)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=False)]
