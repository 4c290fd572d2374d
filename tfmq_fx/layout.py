"""Places for the boxes of a layered drawing: no two overlap, and no line crosses a box.

The steps of Sugiyama, Tagawa and Toda (1981): layers, order within layers by barycentres, then
coordinates, as the linear program of Gansner, Koutsofios, North and Vo (1993).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx as nx

_SWEEPS = 12
_LANE = 12.0  # width kept free for a line that passes a layer
_GAP = 14.0
_SOLVED = 20_000  # boxes and lanes; beyond, the linear program takes too long

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
    import networkx as nx

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
    centre = _centres(rows, {link: _weight(link, layer) for link in links}, wide)
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
    """The longest way to each box, and then down to its first reader where no line gets longer."""
    import networkx as nx

    layer = {box: n for n, found in enumerate(nx.topological_generations(graph)) for box in found}
    for box in reversed(list(nx.topological_sort(graph))):
        readers = list(graph.successors(box))
        room = min((layer[reader] for reader in readers), default=0) - 1 - layer[box]
        if room > 0:
            ends = [max(layer[r] for r in graph.successors(p)) for p in graph.predecessors(box)]
            if sum(max(0, layer[box] + room - end) for end in ends) <= room:
                layer[box] += room
    return layer


def _weight(link: tuple[Item, Item], layer: Mapping[int, int]) -> int:
    """How much it matters that a link is straight, by how many of its ends are boxes."""
    return (8, 1, 2)[sum(layer[box] == row for box, row in link)]


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
    rows: Sequence[Sequence[Item]],
    links: Mapping[tuple[Item, Item], int],
    wide: Mapping[Item, float],
) -> dict[Item, float]:
    """Centres at which the least width is spent on slants, with nothing overlapping: a linear
    program in the centres and the slant of each link."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    number = {item: i for i, item in enumerate(item for row in rows for item in row)}
    centres, slants = len(number), len(links)
    beside = [pair for row in rows for pair in itertools.pairwise(row)]
    # slant >= first - second and slant >= second - first; right - left >= what both need
    ends = [(number[first], number[second]) for first, second in links]
    sides = [(number[first], number[second]) for first, second in beside]
    apart = [(wide[first] + wide[second]) / 2 + _GAP for first, second in beside]
    if not links or centres > _SOLVED:
        return _packed(rows, wide)
    plus = [first for first, _ in ends] + [second for _, second in ends]
    minus = [second for _, second in ends] + [first for first, _ in ends]
    plus, minus = plus + [left for left, _ in sides], minus + [right for _, right in sides]
    count = len(plus)
    entries = [1.0] * count + [-1.0] * count + [-1.0] * (2 * slants)
    row = [*range(count), *range(count), *range(2 * slants)]
    column = [*plus, *minus, *range(centres, centres + slants), *range(centres, centres + slants)]
    solved = linprog(
        c=[0.0] * centres + [float(weight) for weight in links.values()],
        A_ub=coo_array((entries, (row, column)), shape=(count, centres + slants)),
        b_ub=[0.0] * (2 * slants) + [-need for need in apart],
        bounds=[(0.0, None)] * (centres + slants),
    )
    if not solved.success:
        return _packed(rows, wide)
    return {item: float(solved.x[i]) for item, i in number.items()}


def _packed(rows: Sequence[Sequence[Item]], wide: Mapping[Item, float]) -> dict[Item, float]:
    """Each layer from the left, without gaps: for drawings too large to be looked at as a whole."""
    centre: dict[Item, float] = {}
    for row in rows:
        right = 0.0
        for item in row:
            centre[item] = right + wide[item] / 2
            right += wide[item] + _GAP
    return centre
