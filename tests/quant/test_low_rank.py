"""lowrank: the best factors for the inputs there are, and a module that is saved as it is."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from tests.exact import inputs_of, layers
from tests.strategies import GraphBuilder
from tests.toys import seeded
from tfmq_fx.quant.low_rank import LowRank, low_rank_factors
from tfmq_fx.serialization import artifact

BESIDE = {"call": {}, "config": {}, "extra": {}}


def beside(layer, rank=1):
    """A branch of random factors beside a layer."""
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(rank, *layer.weight.shape[1:], generator=generator)
    return LowRank.from_layer(layer, down, torch.randn(len(layer.weight), rank))


def graph_of_branch(layer, shape):
    """A graph of a layer and a branch beside it."""
    b = GraphBuilder()
    size = (b.batch, *shape[1:])
    x = b.placeholder("y", b.x.meta["val"].new_empty(size, dtype=layer.weight.dtype))
    branch = beside(layer)
    y = b.layer("layer", layer, x)
    return b.finish(b.call(torch.add, y, b.layer("layer_low_rank", branch, x)))


@settings(max_examples=40)
@given(
    out=st.integers(2, 12),
    width=st.integers(2, 12),
    kernel=st.sampled_from(((), (3,), (2, 1))),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_factors_are_the_best_of_their_rank(out, width, kernel, seed, data):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, *kernel, generator=generator, dtype=torch.float64)
    s = torch.rand(width, generator=generator, dtype=torch.float64) * 10
    s[0] = data.draw(st.sampled_from((0.0, 1e-9, 1e6)))
    weight[:, -1] = data.draw(st.sampled_from((0.0, 1.0)))
    rank = data.draw(st.integers(1, min(out, width) - 1))
    down, up = low_rank_factors(weight, s, rank)
    assert down.shape == (rank, width, *kernel) and up.shape == (out, rank)
    diagonal = s.view(-1, *[1] * len(kernel)).expand(width, *kernel).reshape(-1)
    product = up @ down.flatten(1)
    assert bool(torch.isfinite(product).all())
    lost = ((weight.flatten(1) - product) * diagonal).square().sum()
    values = torch.linalg.svdvals(weight.flatten(1) * diagonal)
    # Eckart-Young: nothing of this rank loses less. Squares are good to 1e-16 of the largest.
    assert_close(lost, values[rank:].square().sum(), rtol=1e-6, atol=float(values[0] ** 2) * 1e-12)


def test_a_truncated_svd_where_every_channel_counts_the_same():
    weight = torch.randn(6, 9, dtype=torch.float64)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    down, up = low_rank_factors(weight, torch.ones(9), 2)
    assert_close(up @ down, (u[:, :2] * s[:2]) @ v[:2])


def test_factors_share_the_magnitude_between_them():
    weight = torch.randn(64, 32, dtype=torch.float64) * 1e-6
    for down, up in (
        low_rank_factors(weight, torch.ones(32), 4),
        low_rank_factors(weight.T, torch.ones(64), 4),
    ):
        ratio = down.abs().amax(1) / up.abs().amax(0)
        assert bool(((ratio >= 0.5) & (ratio <= 2)).all())


@pytest.mark.parametrize("importance", [torch.zeros(5), torch.ones(5)])
def test_a_zero_weight_or_zero_inputs_give_finite_factors(importance):
    for shape in ((3, 5), (7, 5)):
        for weight in (torch.zeros(shape), torch.randn(shape)):
            down, up = low_rank_factors(weight, importance, 2)
            assert bool(torch.isfinite(down).all() & torch.isfinite(up).all())
            assert bool(weight.any()) or not bool(down.any())


@settings(max_examples=40)
@given(case=layers(grouped=False))
def test_a_branch_computes_what_its_product_would(case):
    layer, x = case
    branch = beside(layer, rank=2)
    whole = copy.deepcopy(layer)
    whole.weight.data, whole.bias = branch.product(), None
    with torch.no_grad():
        # double precision; only the order of sums differs
        assert_close(branch(x), whole(x), rtol=1e-12, atol=1e-12)


def test_factors_keep_their_dtype_and_follow_the_input():
    branch = beside(seeded(nn.Linear, 8, 6))
    stored = branch.down.clone()
    for cast in (branch.half, branch.bfloat16, branch.double, lambda: branch.to(torch.float32)):
        cast()
        assert branch.down.dtype == branch.up.dtype == torch.float16
        assert torch.equal(branch.down, stored) and not branch.up.requires_grad
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert branch(torch.randn(2, 8, dtype=dtype)).dtype == dtype
    assert beside(seeded(nn.Linear, 8, 6).bfloat16()).bfloat16().up.dtype == torch.bfloat16
    assert branch.to("meta").down.is_meta and branch.down.dtype == torch.float16


@settings(max_examples=15)
@given(case=layers(grouped=False), bfloat16=st.booleans())
def test_a_branch_is_what_its_spec_says(case, bfloat16):
    layer, _ = case
    branch = beside(layer.bfloat16() if bfloat16 else layer)
    again = LowRank.from_spec(branch.spec())
    assert again.spec() == branch.spec() and repr(again) == repr(branch)
    shapes = {name: (p.shape, p.dtype) for name, p in branch.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in again.named_parameters()} == shapes


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 5), (2, 3, 6)),
        (nn.Conv2d(4, 3, 3, padding="same", padding_mode="reflect"), (2, 4, 5, 5)),
        (nn.Conv1d(4, 3, 3, stride=2, padding=1, dtype=torch.bfloat16), (2, 4, 9)),
    ],
)
def test_a_graph_with_a_branch_is_saved_and_loaded_bit_identical(layer, shape, tmp_path):
    dtype = layer.weight.dtype
    gm = graph_of_branch(layer, shape)
    artifact.save(tmp_path / "model", gm=gm, **BESIDE)
    loaded = artifact.load(tmp_path / "model").gm
    branch, again = gm.get_submodule("layer_low_rank"), loaded.get_submodule("layer_low_rank")
    assert type(again) is LowRank and again.spec() == branch.spec()
    assert again.down.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    assert not any(p.requires_grad for p in again.parameters())
    for name, value in branch.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    inputs = inputs_of(gm)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(loaded(*inputs), gm(*inputs), strict=True))
