"""Concatenated parts are tracked through every operation that keeps elements in place."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.exact import captured
from tests.strategies import GraphBuilder
from tfmq_fx.ir.concat_tracking import concat_parts, part_sizes


def image(b, name, channels, size=6):
    """An input (B, channels, size, size)."""
    shape = (b.batch, channels, size, size)
    return b.placeholder(name, b.x.meta["val"].new_empty(shape))


def tokens(b, name, channels, count=6):
    """An input (B, count, channels)."""
    return b.placeholder(name, b.x.meta["val"].new_empty((b.batch, count, channels)))


def parts_of(b, node):
    return concat_parts(b.finish(node))[node]


KEEPS = {  # in (B, 8, 6, 6), with a cut at 3; out: cuts by dimension
    "silu": (lambda b, x: b.call(F.silu, x), {1: {3}}),
    "gelu module": (lambda b, x: b.layer("act", nn.GELU(), x), {1: {3}}),
    "group norm": (lambda b, x: b.layer("norm", nn.GroupNorm(2, 8), x), {1: {3}}),
    "group norm function": (lambda b, x: b.call(F.group_norm, x, 4), {1: {3}}),
    "batch norm": (lambda b, x: b.layer("norm", nn.BatchNorm2d(8), x), {1: {3}}),
    "dropout": (lambda b, x: b.layer("drop", nn.Dropout(), x), {1: {3}}),
    "scalars": (lambda b, x: b.call(operator.truediv, b.call(torch.add, x, 1), 2.0), {1: {3}}),
    "cast": (lambda b, x: b.call("to", x, torch.float64), {1: {3}}),
    "power": (lambda b, x: b.call(operator.pow, x, 2), {1: {3}}),
    "broadcast": (lambda b, x: b.call(torch.mul, x, image(b, "z", 1, 1)), {1: {3}}),
    "broadcast, other side": (lambda b, x: b.call(torch.mul, image(b, "z", 1, 1), x), {1: {3}}),
    "aligned": (lambda b, x: b.call(torch.add, x, image(b, "z", 8, 1)), {1: {3}}),
    "pad": (lambda b, x: b.call(F.pad, x, (1, 1, 0, 1)), {1: {3}}),
    "interpolate": (lambda b, x: b.call(F.interpolate, x, scale_factor=2.0), {1: {3}}),
    "pool": (lambda b, x: b.layer("pool", nn.AvgPool2d(2), x), {1: {3}}),
    "upsample": (lambda b, x: b.layer("up", nn.Upsample(scale_factor=2), x), {1: {3}}),
    "crop": (lambda b, x: b.call(operator.getitem, x, (..., slice(1, 5), slice(None))), {1: {3}}),
    "slice": (lambda b, x: b.call(operator.getitem, x, (slice(None), slice(1, 5))), {1: {2}}),
    "narrow": (lambda b, x: b.call(torch.narrow, x, 1, 0, 4), {1: {3}}),
    "slice of one part": (lambda b, x: b.call("narrow", x, 1, 3, 5), {}),
    "new axis": (lambda b, x: b.call(operator.getitem, x, (slice(None), None)), {2: {3}}),
    "permute": (lambda b, x: b.call("permute", x, 0, 2, 3, 1), {3: {3}}),
    "transpose": (lambda b, x: b.call(torch.transpose, x, 1, 3), {3: {3}}),
    "flatten": (lambda b, x: b.call("flatten", x, 2), {1: {3}}),
    "tokens": (
        lambda b, x: b.call("reshape", b.call("permute", x, 0, 2, 3, 1), b.size(x), -1, 8),
        {2: {3}},
    ),
    "unsqueeze": (lambda b, x: b.call("unsqueeze", x, 1), {2: {3}}),
    "half": (lambda b, x: b.call(operator.getitem, b.call("chunk", x, 2, 1), 0), {1: {3}}),
    "other half": (lambda b, x: b.call(operator.getitem, b.call("chunk", x, 2, 1), 1), {}),
    "nested": (lambda b, x: b.call(torch.cat, [image(b, "z", 2), x], 1), {1: {2, 5}}),
    "twice": (lambda b, x: b.call(torch.cat, [x, x], dim=-3), {1: {3, 8, 11}}),
}


def concatenation(b):
    return b.call(torch.cat, [image(b, "a", 3), image(b, "b", 5)], 1)


@pytest.mark.parametrize("name", KEEPS)
def test_cuts_are_tracked(name):
    b = GraphBuilder()
    make, expected = KEEPS[name]
    parts = parts_of(b, make(b, concatenation(b)))
    assert {dim: set(cuts) for dim, cuts in parts.cuts.items()} == expected
    assert parts.lost is None


LOSES = {
    "mixing reshape": (lambda b, x: b.call("reshape", x, b.size(x), 36, 8), "reshape"),
    "shuffle": (lambda b, x: b.call(F.pixel_shuffle, x, 2), "pixel_shuffle"),
    "shuffle module": (lambda b, x: b.layer("s", nn.PixelShuffle(2), x), "PixelShuffle"),
    "flip": (lambda b, x: b.call(torch.flip, x, [1]), "flip"),
    "roll, then activation": (lambda b, x: b.call(F.silu, b.call(torch.roll, x, 1, 1)), "roll"),
    "every other": (
        lambda b, x: b.call(operator.getitem, x, (slice(None), slice(0, None, 2))),
        "getitem",
    ),
    "picked": (lambda b, x: b.call(operator.getitem, x, (slice(None), [0, 1, 3])), "getitem"),
}


@pytest.mark.parametrize("name", LOSES)
def test_what_mixes_channels_is_named(name):
    b = GraphBuilder()
    make, operation = LOSES[name]
    parts = parts_of(b, make(b, concatenation(b)))
    assert not parts.cuts and parts.lost == f"{operation} mixes its channels"


def test_layers_begin_anew():
    b = GraphBuilder()
    y = b.layer("conv", nn.Conv2d(8, 8, 1), b.call(torch.flip, concatenation(b), [1]))
    parts = parts_of(b, y)
    assert not parts.cuts and parts.lost is None


def test_cuts_of_both_operands_and_of_other_dimensions():
    b = GraphBuilder()
    x, y = tokens(b, "y", 4), tokens(b, "z", 4)
    rows = b.call(torch.cat, [x, y], 1)
    columns = b.call(torch.cat, [rows, rows], -1)
    other = b.call(torch.cat, [tokens(b, "u", 2, 12), tokens(b, "w", 6, 12)], 2)
    parts = parts_of(b, b.call(torch.add, columns, other))
    assert {dim: set(cuts) for dim, cuts in parts.cuts.items()} == {1: {6}, 2: {2, 4}}


def test_empty_parts_and_sizes_that_vary_make_no_cuts():
    b = GraphBuilder()
    assert not parts_of(b, b.call(torch.cat, [image(b, "b", 0), image(b, "a", 3)], 1)).cuts
    b = GraphBuilder()
    assert not parts_of(b, b.call(torch.cat, [b.x, b.x], 0)).cuts


def test_token_sequences_put_together_are_no_channels():
    b = GraphBuilder()
    joined = b.call(torch.cat, [tokens(b, "y", 4), tokens(b, "z", 4)], 1)
    parts = parts_of(b, b.call(torch.flip, joined, [1]))
    assert not parts.cuts and parts.lost is None


def test_part_sizes():
    assert part_sizes(frozenset({5, 2}), 8) == [2, 3, 3]
    assert part_sizes(frozenset(), 8) == [8]


def test_every_skip_of_a_unet_is_found():
    gm = captured("digits")
    parts = concat_parts(gm)
    convs = {}
    for node in gm.graph.nodes:
        if node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), nn.Conv2d):
            convs[str(node.target)] = parts[node.args[0]].cuts.get(1)
    first = {
        n for n in convs if n.startswith("up_blocks") and n.endswith(("conv1", "conv_shortcut"))
    }
    assert first and {n for n, cuts in convs.items() if cuts} == first
