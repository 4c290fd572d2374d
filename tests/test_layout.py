"""layout: boxes do not overlap, lines go down and cross no box."""

import itertools

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfmq_fx import layout
from tfmq_fx.layout import place

HEIGHT, GAP = 10.0, 6.0


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 9))
    pairs = list(itertools.combinations(range(count), 2))
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    return draw(st.lists(st.integers(5, 90), min_size=count, max_size=count)), edges


def check(widths, edges):
    found = place(widths, edges, height=HEIGHT, gap=GAP)
    boxes = [(x, y, w) for (x, y), w in zip(found.boxes, widths, strict=True)]
    for (x, y, w), (u, v, z) in itertools.combinations(boxes, 2):
        assert abs(y - v) >= HEIGHT + GAP - 1e-6 or x + w < u or u + z < x
    for x, y, w in boxes:
        assert x >= -1e-6 and x + w <= found.width + 1e-6
        assert y >= 0 and y + HEIGHT <= found.height + 1e-6
        for (lane, top), (end, bottom) in found.lanes:
            assert lane == end and bottom - top == HEIGHT
            assert top != y or lane < x or lane > x + w
    points = nx.DiGraph()
    for (x, y), (u, v) in found.lines:
        assert v - y == pytest.approx(GAP)  # curves stay between layers
        points.add_edge((round(x, 3), round(y, 3)), (round(u, 3), round(v, 3)))
    points.add_edges_from(
        tuple((round(x, 3), round(y, 3)) for x, y in lane) for lane in found.lanes
    )
    middle = [(round(x + w / 2, 3), round(y, 3), round(y + HEIGHT, 3)) for x, y, w in boxes]
    for source, target in edges:
        start, end = middle[source], middle[target]
        assert nx.has_path(points, (start[0], start[2]), (end[0], end[1]))
    return found


@given(graphs())
@settings(deadline=None, derandomize=True)
def test_random_graphs_are_legible(graph):
    check(*graph)


@given(graphs())
@settings(deadline=None, derandomize=True, max_examples=30)
def test_drawings_too_large_for_the_program_are_too(graph):
    before = layout._SOLVED
    layout._SOLVED = 0
    try:
        check(*graph)
    finally:
        layout._SOLVED = before


def test_a_chain_is_straight_beside_the_line_that_feeds_it_all():
    count = 24
    edges = [(i, i + 1) for i in range(1, count)] + [(0, i) for i in range(1, count + 1)]
    found = check([80] * (count + 1), edges)
    assert len({round(x, 3) for x, _ in found.boxes[1:]}) == 1
    assert found.width < 2 * 80


def test_inputs_stand_by_their_readers():
    # 0 -> 1 -> 2 -> 3, and 4 is read by 3 alone
    found = check([20] * 5, [(0, 1), (1, 2), (2, 3), (4, 3)])
    assert found.boxes[4][1] == found.boxes[2][1]
    assert not found.lanes


def test_no_boxes_take_no_room():
    found = place([], [], height=HEIGHT, gap=GAP)
    assert found.boxes == () and found.height == found.width == 0
