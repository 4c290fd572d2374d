"""products: what counts as a product of activations, and what calibration finds of its operands."""

import operator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.toys import ToyDiT, ToyUNet, seeded
from tfmq_fx.calibration.product_ranges import measure_products
from tfmq_fx.capture.capture import capture
from tfmq_fx.core.config import AttentionSpec
from tfmq_fx.core.errors import CalibrationError
from tfmq_fx.core.layer_config import ActivationSpec
from tfmq_fx.ir.products import find_products, replace_operand
from tfmq_fx.passes.decompose_attention import decompose_attention

UNIFORM = AttentionSpec()
TIMES = torch.arange(4)


def graph_of(model, tokens=6, width=12):
    example = {"x": torch.randn(2, tokens, width), "t": torch.tensor([1, 2])}
    return capture(model.eval(), example, timestep="t").gm


def chunk(t, count=4, tokens=6, width=12, seed=0):
    """A batch whose spread grows with t."""
    t = torch.as_tensor(t).expand(count)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, tokens, width, generator=generator) * (1.0 + t).view(-1, 1, 1)
    return x, t


class Forms(nn.Module):
    """Products in every spelling, and matrix products that are none."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 12))

    def forward(self, x, t):
        a = x @ x.transpose(1, 2)
        b = torch.matmul(input=x, other=x.transpose(1, 2))
        c = torch.bmm(x, x.transpose(1, 2))
        d = torch.baddbmm(c, x, x.transpose(1, 2), beta=0.5, alpha=0.1)
        e = torch.einsum("bnc,bmc->bnm", x, x)
        f = torch.einsum("bnc,bmc->bnm", [x, x])
        g = x.matmul(x.transpose(1, 2))
        rates = torch.einsum("b,c->bc", t.float(), torch.ones(6))  # no sample in it
        h = x @ self.weight @ self.weight.t()[None]  # parameters
        return a + b + c + d + e + f + g + (rates[:, :, None] * h).sum(-1, keepdim=True)


def test_products_in_every_spelling_are_found_and_those_with_parameters_are_not():
    gm = graph_of(seeded(Forms))
    products = find_products(gm)
    assert len(products) == 7
    assert all(p.probabilities is None for p in products)
    assert all(p.left.op == "placeholder" for p in products)
    order = [node.name for node in gm.graph.nodes]
    assert [p.name for p in products] == sorted((p.name for p in products), key=order.index)


def test_an_operand_is_replaced_on_its_own_side():
    gm = graph_of(seeded(Forms))
    x, t = chunk(1)
    (expected,) = gm(x, t)
    for product in find_products(gm):
        for side, factor in (("left", 2.0), ("right", 0.5)):
            value = product.operand(side)
            with gm.graph.inserting_before(product.node):
                scaled = gm.graph.call_function(operator.mul, (value, factor))
            replace_operand(product, side, scaled)
    gm.recompile()
    (found,) = gm(x, t)
    assert torch.equal(found, expected)  # powers of two
    assert gm.code.count("* 2.0") == gm.code.count("* 0.5") == 7


class Weighs(nn.Module):
    """Attention whose probabilities pass dropout, a cast and views."""

    def __init__(self, how):
        super().__init__()
        self.how, self.drop = how, nn.Dropout(0.2)
        self.softmax = nn.Softmax(-1)

    def forward(self, x, t):
        scores = x @ x.transpose(1, 2) * t[:, None, None]
        if self.how == "plain":
            return F.softmax(scores, dim=-1) @ x
        if self.how == "passed on":
            p = F.dropout(self.drop(scores.softmax(-1).float()), 0.1, self.training)
            return torch.bmm(p.to(x.dtype).unsqueeze(1).squeeze(1), x)
        if self.how == "module":
            return self.softmax(scores) @ x
        if self.how == "right":
            return x.transpose(1, 2) @ scores.softmax(-1).transpose(1, 2)
        return (2 * scores.softmax(-1)) @ x  # scaled: no probabilities any more


@pytest.mark.parametrize(
    ("how", "side"),
    [
        ("plain", "left"),
        ("passed on", "left"),
        ("module", "left"),
        ("right", "right"),
        ("scaled", None),
    ],
)
def test_probabilities_are_followed_back_to_their_softmax(how, side):
    scores, values = find_products(graph_of(Weighs(how)))
    assert scores.probabilities is None and values.probabilities == side


def test_attention_of_toy_models():
    model = seeded(ToyUNet).eval()
    example = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([1, 2])}
    products = find_products(capture(model, example, timestep="t").gm)
    assert [p.probabilities for p in products] == [None, "left"]
    example["y"] = torch.tensor([3, 4])
    gm = capture(seeded(ToyDiT).eval(), example, timestep="t").gm
    assert find_products(gm) == []
    products = find_products(decompose_attention(gm).gm)
    assert [p.probabilities for p in products] == [None, "left"] * 2


# ---------------------------------------------------------------- measuring


def only(measured):
    """Operands of q.k and of softmax.v, in that order."""
    scores, values = measured.values()
    return scores["left"], scores["right"], values["left"], values["right"]


def test_ranges_go_by_timestep_though_batches_mix_them():
    gm = graph_of(Weighs("plain"))
    mixed = [chunk(torch.tensor([0, 1, 2, 3]), seed=s) for s in range(3)]
    q, _, p, v = only(measure_products(gm, mixed, spec=UNIFORM, timesteps=TIMES))
    for step in range(4):
        x = torch.stack([batch[0][step] for batch in mixed])
        weights = (x @ x.transpose(1, 2) * step).softmax(-1)
        assert q.ranges.low[step] == x.min() and v.ranges.high[step] == x.max()
        torch.testing.assert_close(p.ranges.high[step], weights.max())
    assert q.static is None and p.static is None and q.ranges.interpolated == 0
    assert not q.probabilities and p.probabilities


def test_timesteps_that_were_not_visited_are_interpolated():
    gm = graph_of(Weighs("plain"))
    visited = [chunk(t) for t in (0, 3)]
    q, *_ = only(measure_products(gm, visited, spec=UNIFORM, timesteps=TIMES))
    assert q.ranges.interpolated == 2
    ends = [q.ranges.high[0], q.ranges.high[3]]
    expected = torch.tensor(np.interp([0, 1, 2, 3], [0, 3], ends)).float()
    torch.testing.assert_close(q.ranges.high, expected)


def test_groups_share_a_range():
    gm = graph_of(Weighs("plain"))
    batches = [chunk(t) for t in range(4)]

    def high(**options):
        spec = AttentionSpec(activations=ActivationSpec(**options))
        q, *_ = only(measure_products(gm, batches, spec=spec, timesteps=TIMES))
        return q.ranges.high

    own = high()
    assert bool((own.diff() > 0).all())
    assert torch.equal(high(timestep_groups=2), own[[1, 1, 3, 3]])
    assert torch.equal(high(timestep_groups=9), own)
    assert torch.equal(high(per_timestep=False), own[[3, 3, 3, 3]])


def test_measuring_again_gives_the_same():
    gm = graph_of(Weighs("plain"))
    spec = AttentionSpec(activations=ActivationSpec(bits=4, ranges="mse"))
    found = [
        only(measure_products(gm, (chunk(t) for t in (0, 3)), spec=spec, timesteps=TIMES, seed=5))
        for _ in range(2)
    ]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.ranges.low, other.ranges.low)
        assert torch.equal(one.ranges.high, other.ranges.high)


def test_clipped_ranges_are_narrower_but_for_a_logarithmic_grid():
    gm = graph_of(Weighs("plain"))
    batches = [chunk(t, count=16) for t in range(4)]

    def measure(ranges, probabilities):
        spec = AttentionSpec(
            activations=ActivationSpec(bits=4, ranges=ranges),
            probabilities_bits=4,
            probabilities=probabilities,
        )
        return [o.ranges for o in only(measure_products(gm, batches, spec=spec, timesteps=TIMES))]

    plain, clipped, log2 = (
        measure("minmax", "log2"),
        measure("mse", "uniform"),
        measure("mse", "log2"),
    )
    share = clipped[0].high / plain[0].high
    assert bool((share < 1).all()) and bool((share > 0.5).all())
    assert bool((clipped[0].low >= plain[0].low).all())
    assert bool((clipped[2].high <= plain[2].high).all()) and bool((clipped[2].low <= 0).all())
    assert torch.equal(log2[2].high, plain[2].high)
    assert torch.equal(log2[0].high, clipped[0].high)


class HeadsFirst(nn.Module):
    """Heads folded into the batch, outermost or innermost."""

    def __init__(self, outermost):
        super().__init__()
        self.outermost = outermost

    def forward(self, x, t):
        heads = x.unflatten(-1, (3, 4)).permute((2, 0, 1, 3) if self.outermost else (0, 2, 1, 3))
        q = heads.flatten(0, 1)
        y = torch.bmm((q @ q.transpose(1, 2)).softmax(-1), q)
        return y.mean() * t[:, None, None] * x


@pytest.mark.parametrize("count", [4, 1])
def test_rows_that_do_not_follow_the_batch_get_one_range(count):
    batches = [chunk(t, count=count) for t in range(4)]
    for outermost in (False, True):
        gm = graph_of(HeadsFirst(outermost))
        found = only(measure_products(gm, batches, spec=UNIFORM, timesteps=TIMES))
        if outermost and count > 1:  # one sample at a time, nothing tells the difference
            assert all("do not follow the order of the batch" in o.static for o in found)
            assert all(o.ranges.high.unique().numel() == 1 for o in found)
        else:
            assert all(o.static is None for o in found)


class TokensFirst(nn.Module):
    def forward(self, x, t):
        x = x.transpose(0, 1)  # (tokens, B, channels)
        scores = torch.einsum("nbc,mbc->bnm", x, x)
        return torch.einsum("bnm,mbc->bnc", scores.softmax(-1), x) * t[:, None, None]


@pytest.mark.parametrize(("count", "tokens"), [(4, 6), (4, 8), (1, 6)])
def test_the_batch_in_another_dimension_gets_one_range(count, tokens):
    gm = graph_of(TokensFirst(), tokens=tokens)
    batches = [chunk(t, count=count, tokens=tokens) for t in range(4)]
    q, k, p, v = only(measure_products(gm, batches, spec=UNIFORM, timesteps=TIMES))
    assert p.static is None
    assert all(o.static is not None for o in (q, k, v))
    assert q.ranges.high.unique().numel() == 1
    # whoever owns a row, the range covers every value
    assert q.ranges.high[0] == max(x.max() for x, _ in batches)


def test_data_that_cannot_be_used_is_refused():
    gm = graph_of(Weighs("plain"))
    with pytest.raises(CalibrationError, match="saw no data"):
        measure_products(gm, [], spec=UNIFORM, timesteps=TIMES)
    x, t = chunk(1)
    x[2, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"the product matmul.* \(left\) holds NaN"):
        measure_products(gm, [(x, t)], spec=UNIFORM, timesteps=TIMES)


def test_a_model_without_products_has_nothing_to_measure():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 12)

        def forward(self, x, t):
            return self.linear(x) * t[:, None, None]

    assert measure_products(graph_of(Plain()), [], spec=UNIFORM, timesteps=TIMES) == {}
