"""drawn_inputs: what is drawn is legal, varied, repeatable, and as wide as the model expects."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.converted import KEYS, lossy
from tests.diagnostics.test_layer_errors import REWRITES
from tests.ir.test_sites import graph_of
from tests.passes.test_quantize_layers import W8A8, quantize
from tests.toys import ToyDiT, seeded
from tfmq_fx.capture.capture import capture
from tfmq_fx.diagnostics.random_inputs import (
    RandomInputs,
    batches,
    draw_examples,
    join,
    relative_widths,
    rows_of,
)


class Looks(nn.Module):
    """Labels look up rows of two tables, by functions, through views and casts."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 4))
        self.other = nn.Parameter(torch.randn(5, 4))
        self.linear = nn.Linear(4, 4)

    def forward(self, x, t, y, mask, kind, flag, scale):
        h = F.embedding(y.long().reshape(-1), self.table)
        h = h + F.embedding(input=y.long().reshape(-1), weight=self.other)
        h = torch.where(flag, h * mask[:, None], h) * scale + kind[:, None]
        return self.linear(x + h + t[:, None].float())


def looks_example():
    return {
        "x": torch.randn(2, 4),
        "t": torch.tensor([1, 2]),
        "y": torch.zeros(2, 1, dtype=torch.int32),
        "mask": torch.ones(2, dtype=torch.int64),
        "kind": torch.zeros(2, dtype=torch.int64),
        "flag": torch.tensor([True]),
        "scale": torch.ones(4),
    }


@pytest.fixture(scope="module")
def looks():
    return capture(seeded(Looks).eval(), looks_example(), timestep="t")


@pytest.fixture(scope="module")
def dit():
    example = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([1, 2]), "y": torch.tensor([3, 4])}
    return capture(seeded(ToyDiT).eval(), example, timestep="t")


def node(gm, name):
    return next(n for n in gm.graph.find_nodes(op="placeholder") if n.target == name)


def drawn(found, keys=KEYS, seed=0):
    draw = RandomInputs(found.gm, found.call, keys, seed=seed)
    draw.rows = {
        n.target: rows
        for n in found.gm.graph.find_nodes(op="placeholder")
        if (rows := rows_of(found.gm, n))
    }
    return draw


def test_rows_are_those_of_the_smallest_embedding_that_looks_an_input_up(looks, dit):
    assert rows_of(dit.gm, node(dit.gm, "y")) == 10
    assert rows_of(looks.gm, node(looks.gm, "y")) == 5
    for name in ("x", "t", "mask", "kind", "flag"):
        assert rows_of(looks.gm, node(looks.gm, name)) is None


def test_every_kind_of_input_gets_legal_values(looks):
    draw = drawn(looks)
    assert looks.call.conditions == ("y", "mask", "kind", "flag", "scale")
    labels = torch.cat([draw.conditions()["y"] for _ in range(200)])
    assert labels.dtype == torch.int32 and labels.shape == (200, 1)
    # uniform: each of 5 comes up 40 times, with a deviation of 5.7
    assert labels.unique(return_counts=True)[0].tolist() == [0, 1, 2, 3, 4]
    assert bool(((labels.unique(return_counts=True)[1] - 40).abs() < 6 * 5.7).all())
    given = draw.conditions()
    assert (given["mask"].tolist(), given["kind"].tolist()) == ([1], [0])
    assert given["flag"].tolist() == [True]
    assert given["scale"].shape == (4,) and not torch.equal(
        given["scale"], draw.conditions()["scale"]
    )
    x, t, *_ = draw.example(1, given)
    assert x.shape == (1, 4) and t.tolist() == [250] and t.dtype == torch.int64
    with torch.no_grad():
        looks.gm(*draw.example(2, given))


def test_timesteps_take_conditions_in_turn_or_each(dit):
    one = draw_examples(drawn(dit), conditions=2, every=False)
    assert [int(t) for _, t, _ in one] == [0, 250, 999]
    assert torch.equal(one[0][2], one[2][2])
    every = draw_examples(drawn(dit), conditions=4, every=True)
    assert [int(t) for _, t, _ in every] == [0, 250, 999] * 4
    labels = [[int(y) for _, _, y in every[i : i + 3]] for i in range(0, 12, 3)]
    assert all(len(set(part)) == 1 for part in labels) and len({part[0] for part in labels}) > 1
    # samples are drawn anew each time
    assert len({float(x.sum()) for x, _, _ in every}) == 12


def test_models_without_conditions_have_one():
    model = lossy()
    draw = RandomInputs(model.gm, model.call, KEYS, seed=0)
    assert len(draw_examples(draw, conditions=3, every=True)) == 3


def test_a_seed_repeats_what_it_draws(dit):
    def values(seed):
        return [
            v for e in draw_examples(drawn(dit, seed=seed), conditions=2, every=True) for v in e
        ]

    random = torch.get_rng_state()
    first, again, other = values(3), values(3), values(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


def test_samples_are_as_wide_as_their_ranges_relative_to_the_widest():
    model = copy.deepcopy(lossy())
    scales = model.gm.activation_scales
    scales[:, 0] = torch.tensor([0.5, 2.0, 1.0])  # conv_in reads the sample, and comes first
    x = [
        e[0]
        for e in draw_examples(
            RandomInputs(model.gm, model.call, KEYS, seed=0), conditions=1, every=False
        )
    ]
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(1, 3, 8, 8, generator=generator) for _ in KEYS]
    for value, normal, share in zip(x, plain, (0.25, 1.0, 0.5), strict=True):
        assert torch.equal(value, normal * share)
    scales[1, 0] = float("nan")  # ranges that tell nothing
    draw = RandomInputs(model.gm, model.call, KEYS, seed=0)
    assert torch.equal(draw.example(0, {})[0], plain[0])


def test_examples_are_joined_where_only_the_batch_differs(looks, dit):
    first, second = draw_examples(drawn(dit), conditions=2, every=False)[:2]
    joined = join(dit.call, [first, second])
    assert all(
        torch.equal(j, torch.cat(v))
        for j, v in zip(joined, zip(first, second, strict=True), strict=True)
    )
    draw = drawn(looks)
    given, other = draw.conditions(), draw.conditions()
    assert [v.shape[0] for v in join(looks.call, [draw.example(k, given) for k in range(3)])] == [
        *(3, 3, 3, 3, 3),
        *(1, 4),  # flag and scale have no batch
    ]
    assert join(looks.call, [draw.example(0, given), draw.example(1, other)]) is None
    wide = torch.randn(1, 3, 16, 16), *first[1:]
    assert join(dit.call, [first, list(wide)]) is None


def test_batches_keep_the_order_and_leave_apart_what_cannot_be_joined(looks):
    draw = drawn(looks)
    given, other = draw.conditions(), draw.conditions()
    examples = [draw.example(k % 3, given) for k in range(5)] + [draw.example(0, other)]
    found = batches(looks.call, examples, 2)
    assert [len(values[0]) for values in found] == [2, 2, 1, 1]
    assert torch.equal(torch.cat([v[0] for v in found]), torch.cat([e[0] for e in examples]))


def test_widths_come_from_the_scales_of_the_layers_that_read_an_input():
    model = lossy()
    (sample, _) = model.gm.graph.find_nodes(op="placeholder")
    scales = model.gm.activation_scales[:, 0]
    assert torch.equal(relative_widths(model.gm, sample, len(KEYS)), scales / scales.max())
    assert relative_widths(model.gm, sample, 2) is None  # a table of another set


def test_scales_of_what_reads_an_input_rewritten_count_as_its_own():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, t):
            return self.second(self.first(x) * t[:, None].float())

    gm = REWRITES["all"](graph_of(seeded(Plain).eval(), 8))
    batches = [(torch.randn(4, 8), torch.full((4,), int(t))) for t in KEYS]
    model = quantize(gm, W8A8, batches, KEYS).gm
    x, t = model.graph.find_nodes(op="placeholder")
    scales = model.activation_scales[:, 0]
    assert torch.equal(relative_widths(model, x, len(KEYS)), scales / scales.max())
    assert relative_widths(model, t, len(KEYS)) is None
