"""drawing: Graphviz text that holds together, SVG that is well-formed and legible."""

import itertools
import re
from xml.etree import ElementTree

import pytest
import torch

from tests.test_boxes import MAKERS
from tests.toys import ToyDiT, seeded
from tfmq_fx.analysis import analyze
from tfmq_fx.boxes import Op
from tfmq_fx.dataflow import Binding
from tfmq_fx.drawing import COLOURS, Drawing, number

SVG = "{http://www.w3.org/2000/svg}"


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


def svg_boxes(root):
    found = {}
    for group in root.iter(f"{SVG}g"):
        rects = group.findall(f"{SVG}rect[@class='box']")
        for rect in rects:
            x, y, w, h = (float(rect.get(k)) for k in ("x", "y", "width", "height"))
            title = group.find(f"{SVG}text").text
            found[title, x, y] = (x, y, w, h, group)
    return found


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_svg_is_well_formed_and_boxes_do_not_overlap(found, depth):
    root = ElementTree.fromstring(found.svg(depth))
    width, height = float(root.get("width")), float(root.get("height"))
    boxes = svg_boxes(root)
    for x, y, w, h, group in boxes.values():
        assert x >= 0 and x + w <= width and y >= 0 and y + h <= height
        assert group.find(f"{SVG}title").text
        for text in group.findall(f"{SVG}text"):  # of a font of usual width, it fits
            assert len(text.text) * float(text.get("font-size", 11)) * 0.55 < w
    for (x, y, w, h, _), (u, v, z, k, _) in itertools.combinations(boxes.values(), 2):
        assert x + w < u or u + z < x or y + h < v or v + k < y


def test_svg_shows_every_module_and_explains_it():
    root = ElementTree.fromstring(MAKERS["unet2d"]().svg(1))
    shown = {title: group for (title, _, _), (*_, group) in svg_boxes(root).items()}
    modules = "conv_in time_proj time_embedding mid_block conv_norm_out conv_act conv_out"
    assert {*modules.split(), "sample", "timestep", "output"} <= set(shown)
    assert {"down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"} <= set(shown)
    told = shown["mid_block"].find(f"{SVG}title").text
    assert told.startswith("mid_block: UNetMidBlock2D\nt: ")
    assert "table row: mid_block.resnets.0.time_emb_proj" in told
    assert "gives (batch, 32, 8, 8)" in told
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "t: 10.6 %" in texts and "x: 89.4 %" in texts
    assert texts[0] == "UNet2DModel: 177 k parameters, 68.9 MFLOPs a call"
    # self-contained: nothing is fetched and nothing runs
    assert not list(root.iter(f"{SVG}image")) and not list(root.iter(f"{SVG}script"))


def test_a_deep_transformer_is_one_straight_column():
    model = seeded(ToyDiT, depth=24).eval()
    inputs = (torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 4]))
    boxes = svg_boxes(ElementTree.fromstring(analyze(model, inputs).svg(2)))
    blocks = {title: x + w / 2 for (title, x, _), (_, _, w, _, _) in boxes.items()}
    centres = {round(c) for title, c in blocks.items() if title.startswith("blocks.")}
    assert len(blocks) >= 24 and max(centres) - min(centres) <= 1
    assert max(x + w for x, _, w, _, _ in boxes.values()) < 900


def test_names_are_escaped():
    op = Op("f", "op", (('a<b>&"c"\\', "K"),), Binding.T, 1, 0, "(2,)", False, ())
    drawing = Drawing('m"<&', (op,))
    ElementTree.fromstring(drawing.svg())
    bare = unquoted(drawing.dot())
    assert bare.count("{") == bare.count("}") and "<" not in bare


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
