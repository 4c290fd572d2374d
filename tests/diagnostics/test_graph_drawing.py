"""drawing: Graphviz text that holds together, and SVG of all that is in it."""

import importlib.util
import itertools
import re
import sys
from xml.etree import ElementTree

import pytest

from tests.diagnostics.test_graph_boxes import MAKERS
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.diagnostics.graph_boxes import Op
from tfmq_fx.diagnostics.graph_drawing import COLOURS, Drawing, number
from tfmq_fx.ir.binding_times import Binding

SVG = "{http://www.w3.org/2000/svg}"
needs_graphviz = pytest.mark.skipif(
    importlib.util.find_spec("pygraphviz") is None, reason="pygraphviz is not installed"
)


@pytest.fixture(scope="module", params=MAKERS)
def found(request):
    return MAKERS[request.param]()


def unquoted(dot):
    return re.sub(r'"(\\.|[^"\\])*"', '""', dot)


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_dot_is_balanced_and_its_edges_have_ends(found, depth):
    dot = found.dot(depth)
    bare = unquoted(dot)
    assert bare.count("{") == bare.count("}") and bare.count("[") == bare.count("]")
    assert '"' not in bare.replace('""', "") and dot.startswith("digraph ")
    declared = re.findall(r"^ *(b\d+) \[", dot, re.MULTILINE)
    ends = re.findall(r"^ *(b\d+) -> (b\d+) \[", dot, re.MULTILINE)
    assert len(declared) == len(set(declared)) and ends
    assert set(itertools.chain(*ends)) <= set(declared)
    clusters = re.findall(r'subgraph "(cluster_[^"]*)"', dot)
    assert len(clusters) == len(set(clusters))


def test_dot_has_clusters_by_module_path_and_colours_by_binding_time():
    dot = MAKERS["unet2d"]().dot(2)
    down = dot[dot.index('subgraph "cluster_down_blocks"') :]
    down = down[: down.index("}")]
    assert 'label="down_blocks.0\\nDownBlock2D, 8.06 k, 13 % t + 87 % x"' in down
    colours = f"{COLOURS[Binding.T]};{1040 / 8064:.4f}:{COLOURS[Binding.X]}"
    assert f'style="striped", fillcolor="{colours}"' in down and "down_blocks.1" in down
    assert 'label="time_embedding.linear_1\\nLinear, 1.09 k, t"' in dot
    assert f'style="filled", fillcolor="{COLOURS[Binding.T]}"' in dot
    assert 'subgraph "cluster_mid_block.resnets"' in dot


def svg_groups(svg):
    """Of an SVG the groups of a kind by title: "node", "edge", "cluster"."""
    root = ElementTree.fromstring(svg)
    # self-contained: nothing is fetched and nothing runs
    assert not list(root.iter(f"{SVG}image")) and not list(root.iter(f"{SVG}script"))
    found = {}
    for group in root.iter(f"{SVG}g"):
        texts = [text.text for text in group.iter(f"{SVG}text")]
        found.setdefault(group.get("class"), []).append((group, texts))
    return found


@needs_graphviz
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_svg_has_every_box_and_edge_of_the_text(found, depth):
    dot = unquoted(found.dot(depth))
    groups = svg_groups(found.svg(depth))
    legend = len(re.findall(r"^ *legend\d \[", dot, re.MULTILINE))
    assert len(groups["node"]) == len(re.findall(r"^ *b\d+ \[", dot, re.MULTILINE)) + legend
    assert len(groups["edge"]) == len(re.findall(r"^ *b\d+ -> b\d+ \[", dot, re.MULTILINE))


@needs_graphviz
def test_svg_shows_every_module_and_explains_it():
    groups = svg_groups(MAKERS["unet2d"]().svg(1))
    shown = {texts[0]: group for group, texts in groups["node"]}
    modules = "conv_in time_proj time_embedding mid_block conv_norm_out conv_act conv_out"
    assert {*modules.split(), "sample", "timestep", "output"} <= set(shown)
    assert {"down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"} <= set(shown)
    told = ElementTree.tostring(shown["mid_block"], encoding="unicode")
    assert "mid_block: UNetMidBlock2D\nt: " in told.replace("&#10;", "\n")
    assert "table row: mid_block.resnets.0.time_emb_proj" in told
    assert "gives (batch, 32, 8, 8)" in told
    assert "t: 10.6 %" in shown and "x: 89.4 %" in shown
    ((_, texts),) = groups["graph"]
    assert "UNet2DModel: 177 k parameters, 68.9 MFLOPs a call" in texts


def test_without_graphviz_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    with pytest.raises(ConfigError, match=r'pip install "tfmq_fx\[draw\]"'):
        MAKERS["unet2d"]().svg(1)


def test_names_are_escaped():
    op = Op("f", "op", (('a<b>&"c"\\', "K"),), Binding.T, 1, 0, "(2,)", False, ())
    drawing = Drawing('m"<&', (op,))
    bare = unquoted(drawing.dot())
    assert bare.count("{") == bare.count("}") and "<" not in bare


@needs_graphviz
def test_names_are_escaped_in_pictures():
    op = Op("f", "op", (('a<b>&"c"\\', "K"),), Binding.T, 1, 0, "(2,)", False, ())
    names = [texts[0] for _, texts in svg_groups(Drawing('m"<&', (op,)).svg())["node"]]
    assert 'a<b>&"c"\\' in names


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 FLOPs"),
        (999, "999 FLOPs"),
        (999.6, "1 kFLOPs"),
        (1234567, "1.23 MFLOPs"),
        (5e18, "5e+06 TFLOPs"),
    ],
)
def test_numbers_have_three_digits(count, text):
    assert number(count, "FLOPs") == text
    assert number(count) == text.removesuffix("FLOPs").rstrip()
