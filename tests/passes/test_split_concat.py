"""split_concat: the parts of a concatenation add up to what the layer gave, under its name."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.exact import (
    TOLERANCE,
    all_sites,
    assert_untouched,
    captured,
    check_exact,
    graph_of,
    layers,
    snapshot,
)
from tests.strategies import GraphBuilder
from tests.toys import seeded
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.ir.graph import module_path
from tfmq_fx.ir.subgraphs import region
from tfmq_fx.passes.split_concat import split_concat


class Concatenated(nn.Module):
    """A layer on pieces of x put together again, normed and activated; called twice."""

    def __init__(self, layer, sizes, dim):
        super().__init__()
        self.layer, self.sizes, self.dim = layer, sizes, dim
        self.norm = nn.LayerNorm(sum(sizes)) if dim == -1 else nn.GroupNorm(1, sum(sizes))

    def forward(self, x, t):
        pieces = [2 * piece for piece in x.split(self.sizes, self.dim)]
        h = torch.cat([torch.cat(pieces[:2], self.dim), *pieces[2:]], self.dim)
        y = self.layer(F.silu(self.norm(h))) + self.layer(input=torch.tanh(h))
        return y + t.view(-1, *[1] * (y.dim() - 1))


@settings(max_examples=25)
@given(case=layers(grouped=False), data=st.data())
def test_any_layer_keeps_its_output(case, data):
    layer, x = case
    width = layer.weight.shape[1]
    count = data.draw(st.integers(1, min(4, width)))
    cuts = sorted(data.draw(st.permutations(range(1, width)))[: count - 1])
    edges = [0, *cuts, width]
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    dim = -1 if isinstance(layer, nn.Linear) else 1
    gm = graph_of(Concatenated(layer, sizes, dim), x)
    before = snapshot(gm)
    done = split_concat(gm, only={"layer"})
    check_exact(gm, done)
    assert_untouched(gm, before)
    assert stage_of(done.gm) is Stage.CAPTURED and not done.declined
    assert done.changed == (len(sizes) > 1)
    if done.changed:
        paths = done.details["parts"]["layer"]
        parts = [done.gm.get_submodule(path) for path in paths]
        assert paths == [f"layer.{i}" for i in range(len(sizes))]
        assert [part.weight.shape[1] for part in parts] == sizes
        assert all(type(part) is type(layer) for part in parts)
        assert torch.equal(torch.cat([part.weight for part in parts], 1), layer.weight)
        assert [part.bias is None for part in parts[1:]] == [True] * (len(sizes) - 1)
        assert (parts[0].bias is None) == (layer.bias is None)
        assert split_concat(done.gm, only=paths).changed == 0


@pytest.mark.parametrize("name", ["digits", "flux-dev"])
def test_whole_models_keep_their_outputs(name):
    gm = captured(name)
    before = snapshot(gm)
    names = [site.name for site in all_sites(gm)]
    done = split_concat(gm, only=names)
    check_exact(gm, done)
    assert_untouched(gm, before)
    parts = done.details["parts"]
    assert done.changed == len(parts)
    # skips; attention and MLP side by side; and the embeddings of numbers, cosines and sines
    joined = [n for n in names if "up_blocks" in n and n.endswith(("conv1", "conv_shortcut"))]
    joined += [n for n in names if "single" in n and n.endswith("proj_out")]
    others = [n for n in names if n not in joined and "time" not in n]
    assert joined and set(joined) <= set(parts) and not set(others) & set(parts)
    after = [site.name for site in all_sites(done.gm)]
    expected = [part for n in names for part in parts.get(n, [n])]
    assert after == expected


def test_names_and_places():
    gm = captured("digits")
    site = next(n.name for n in all_sites(gm) if n.name.endswith("up_blocks.0.resnets.0.conv1"))
    done = split_concat(gm, only={site}).gm
    (node,) = gm.graph.find_nodes(op="call_module", target=site)
    (first,) = done.graph.find_nodes(op="call_module", target=f"{site}.0")
    (second,) = done.graph.find_nodes(op="call_module", target=f"{site}.1")
    (total,) = first.users
    assert total.name == node.name and list(total.args) == [first, second]
    assert [first.name, second.name] == [f"{node.name}_0", f"{node.name}_1"]
    assert [module_path(n) for n in (first, second, total)] == [f"{site}.0", f"{site}.1", site]
    inside = region(done, site)
    assert {first, second, total} <= set(inside) and len(inside) == 5  # and two slices
    assert set(inside) <= set(region(done, site.rpartition(".")[0]))


def image(b, name, channels):
    shape = (b.batch, channels, 4, 4)
    return b.placeholder(name, b.x.meta["val"].new_empty(shape))


def joined(b):
    return b.call(torch.cat, [image(b, "a", 3), image(b, "b", 5)], 1)


def test_unbatched_images_are_split_as_well():
    b = GraphBuilder()
    a = b.placeholder("a", b.x.meta["val"].new_empty((3, 4, 4)))
    x = b.call(torch.cat, [a, a], 0)
    gm = b.finish(b.layer("conv", nn.Conv2d(6, 4, 3), x))
    done = split_concat(gm, only={"conv"})
    assert done.details == {"parts": {"conv": ["conv.0", "conv.1"]}}
    check_exact(gm, done, tolerance=1e-5)  # single precision


def test_a_concatenation_of_tokens_or_behind_another_layer_is_none_of_its_business():
    b = GraphBuilder()
    t = b.placeholder("tokens", b.x.meta["val"].new_empty((b.batch, 3, 4)))
    rows = b.layer("rows", nn.Linear(4, 4), b.call(torch.cat, [t, t], 1))
    behind = b.layer("behind", nn.Conv2d(4, 4, 1), b.layer("conv", nn.Conv2d(8, 4, 1), joined(b)))
    gm = b.finish(rows, behind)
    done = split_concat(gm, only={"rows", "behind"})
    assert done.changed == 0 and not done.declined


def test_what_is_declined_says_why():
    b = GraphBuilder()
    x = joined(b)
    grouped = b.layer("grouped", nn.Conv2d(8, 4, 1, groups=2), x)
    mixed = b.layer("mixed", nn.Conv2d(8, 4, 1), b.call(F.silu, b.call(torch.flip, x, [1])))
    other = b.call(torch.cat, [image(b, "c", 4), image(b, "d", 4)], 1)
    twice = b.call(torch.add, b.layer("both", nn.Conv2d(8, 4, 1), x), b.layer("both", None, other))
    gm = b.finish(grouped, mixed, twice)
    done = split_concat(gm, only={"grouped", "mixed", "both"})
    assert done.changed == 0
    assert {d.site: d.reason for d in done.declined} == {
        "grouped": "a grouped convolution of concatenated channels",
        "mixed": "its input was concatenated, but flip mixes its channels",
        "both": "its calls read different parts",
    }


def test_only_what_is_asked_for_is_split():
    gm = captured("digits")
    assert split_concat(gm, only=()).changed == 0
    with pytest.raises(ConfigError, match="no layer nothing"):
        split_concat(gm, only={"nothing"})


def test_parts_keep_the_settings_of_the_layer():
    layer = seeded(
        nn.Conv2d, 6, 4, 3, stride=2, padding=1, dilation=2, padding_mode="reflect"
    ).requires_grad_(False)
    gm = graph_of(Concatenated(layer, [2, 4], 1), torch.randn(2, 6, 9, 9))
    done = split_concat(gm, only={"layer"})
    check_exact(gm, done, tolerance=TOLERANCE)
    for part in map(done.gm.get_submodule, done.details["parts"]["layer"]):
        for name in ("stride", "padding", "dilation", "padding_mode", "kernel_size", "training"):
            assert getattr(part, name) == getattr(layer, name)
        assert not part.weight.requires_grad


class Follows(nn.Module):
    """Layers that read what layers of concatenations give: at once, through views, and beside."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 4, 3, padding=1)
        self.third, self.last = nn.Conv2d(6, 4, 1), nn.Linear(8, 3)

    def forward(self, x, t):
        h = self.second(self.first(torch.cat([x[:, :1], x[:, 1:]], 1)))
        left, right = h.chunk(2, 1)
        h = h + self.third(torch.cat([right, left, x], 1))
        tokens = torch.cat([h, self.second(self.first(x))], 1).flatten(2).transpose(1, 2)
        return self.last(tokens) + t.view(-1, 1, 1)


def test_layers_that_read_one_another_are_all_split():
    x = torch.randn(3, 2, 4, 4)
    gm = graph_of(seeded(Follows).eval(), x)
    done = split_concat(gm, only={site.name for site in all_sites(gm)})
    check_exact(gm, done)
    sizes = {
        site: [done.gm.get_submodule(path).weight.shape[1] for path in paths]
        for site, paths in done.details["parts"].items()
    }
    assert sizes["third"] == [2, 2, 2] and sizes["last"] == [4, 4]
    assert done.changed == len(sizes) >= 2
