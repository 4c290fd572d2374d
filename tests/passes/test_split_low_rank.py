"""split_low_rank: layer and branch together are the layer, whatever 16 bits leave of the branch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.exact import (
    Called,
    all_sites,
    assert_untouched,
    captured,
    check_exact,
    graph_of,
    inputs_of,
    layers,
    snapshot,
)
from tests.strategies import GraphBuilder
from tests.toys import SharedTwice, seeded
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.ir.graph import module_path
from tfmq_fx.ir.layer_edits import weight_of
from tfmq_fx.passes.split_low_rank import split_low_rank
from tfmq_fx.quant.low_rank import LowRank
from tfmq_fx.serialization import artifact


class SharedLinear(SharedTwice):
    def __init__(self):
        super().__init__()
        self.linear = self.alias = nn.Linear(16, 16)

    def base(self, x, t):
        return self.linear(x) + t[:, None]


def graph_of_dtype(layer):
    b = GraphBuilder()
    like = b.x.meta["val"].new_empty((b.batch, 32), dtype=layer.weight.dtype)
    return b.finish(b.layer("layer", layer, b.placeholder("y", like)))


def graph_inputs(gm, x):
    values = dict(zip(("x", "t", "y"), inputs_of(gm, len(x)), strict=True))
    return (values | {"y": x}).values()


def as_tensor(value):
    return value[0] if isinstance(value, tuple) else value


@settings(max_examples=40)
@given(case=layers(), rank=st.integers(1, 2), data=st.data())
def test_any_layer_called_several_times_keeps_its_output(case, rank, data):
    layer, x = case
    gm = graph_of(Called(layer), x)
    before = snapshot(gm)
    importance = None
    if data.draw(st.booleans()):
        s = torch.rand(layer.weight.shape[1])
        s[0] = data.draw(st.sampled_from((0.0, 1e-12, 1e8)))
        importance = {"layer": s} if getattr(layer, "groups", 1) == 1 else None
    done = split_low_rank(gm, rank=rank, only={"layer"}, importance=importance)
    check_exact(gm, done)
    assert_untouched(gm, before)
    out, width = layer.weight.flatten(1).shape
    small = rank < min(out, width) and 2 * rank * (out + width) < out * width
    assert done.changed == (small and getattr(layer, "groups", 1) == 1)
    assert done.changed + len(done.declined) == 1 and stage_of(done.gm) is Stage.CAPTURED
    if done.changed:
        assert 0 <= done.details["share"]["layer"] <= 1


@pytest.mark.parametrize("name", ["digits", "pixart-alpha"])
def test_whole_models_keep_their_outputs(name):
    gm = captured(name)
    before = snapshot(gm)
    names = [site.name for site in all_sites(gm)]
    generator = torch.Generator().manual_seed(0)
    importance = {
        site.name: torch.rand(weight_of(site.layer).shape[1], generator=generator)
        for site in all_sites(gm)
    }
    done = split_low_rank(gm, rank=2, only=names, importance=importance)
    check_exact(gm, done)
    assert_untouched(gm, before)
    assert done.changed > 20 and done.changed + len(done.declined) == len(names)
    assert [site.name for site in all_sites(done.gm)] == names
    again = split_low_rank(done.gm, rank=2, only=names)
    assert again.changed == 0 and len(again.declined) == len(names)


def test_names_and_places():
    gm = captured("pixart-alpha")
    site = "transformer_blocks.0.attn1.to_q"
    done = split_low_rank(gm, rank=2, only={site})
    (residual,) = done.gm.graph.find_nodes(op="call_module", target=site)
    (branch,) = done.gm.graph.find_nodes(op="call_module", target=f"{site}_low_rank")
    (total,) = residual.users
    (node,) = gm.graph.find_nodes(op="call_module", target=site)
    assert total.name == node.name and list(total.args) == [residual, branch]
    assert residual.name == f"{node.name}_residual" and branch.name == f"{node.name}_low_rank"
    assert residual.args == branch.args and residual.args[0].name == node.args[0].name
    assert [module_path(n) for n in (residual, branch, total)] == [site, f"{site}_low_rank", site]
    assert isinstance(done.gm.get_submodule(f"{site}_low_rank"), LowRank)
    assert type(done.gm.get_submodule(site)) is nn.Linear


def test_the_residual_makes_up_for_the_rounding_of_the_factors():
    gm = graph_of(seeded(Called, nn.Conv2d(16, 24, 3, padding=1)), torch.randn(2, 16, 5, 5))
    done = split_low_rank(gm, rank=3, only={"layer"}).gm
    branch, residual = done.get_submodule("layer_low_rank"), done.get_submodule("layer").weight
    assert branch.down.dtype == branch.up.dtype == torch.float16
    whole = gm.get_submodule("layer").weight
    assert torch.allclose(residual + branch.product(), whole, rtol=0, atol=1e-15)
    # three singular values are gone; what is left is the rest, and the rounding to 16 bits
    left = torch.linalg.svdvals(residual.flatten(1).detach())
    expected = torch.linalg.svdvals(whole.flatten(1).detach())
    assert torch.allclose(left[:-3], expected[3:], rtol=0.01)


def test_outlier_channels_go_into_the_branch():
    layer = seeded(nn.Linear, 32, 32)
    layer.weight.data[:, :2] *= 30
    gm = graph_of(Called(layer), torch.randn(2, 32))
    done = split_low_rank(gm, rank=2, only={"layer"})
    residual = done.gm.get_submodule("layer").weight.detach()
    assert residual.abs().max() < layer.weight.detach().abs().max() / 10
    assert done.details["share"]["layer"] > 0.95
    # Importance decides which: of channels nothing comes through, nothing need be kept.
    s = torch.ones(32)
    s[:2] = 0
    other = split_low_rank(gm, rank=2, only={"layer"}, importance={"layer": s})
    assert other.details["share"]["layer"] < 0.5


def test_one_branch_serves_every_call_of_a_layer():
    gm = graph_of(seeded(SharedLinear), torch.randn(2, 16))
    done = split_low_rank(gm, rank=1, only={"linear"})
    check_exact(gm, done)
    calls = done.gm.graph.find_nodes(op="call_module", target="linear_low_rank")
    assert done.changed == 1 and len(calls) == 3


def test_single_precision_and_half_precision_models():
    for dtype, tolerance in (
        (torch.float32, 1e-6),
        (torch.bfloat16, 2**-6),
        (torch.float16, 2**-9),
    ):
        layer = seeded(nn.Linear, 32, 24).to(dtype)
        x = torch.randn(4, 32, dtype=dtype)
        gm = graph_of_dtype(layer)
        done = split_low_rank(gm, rank=2, only={"layer"})
        stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        assert done.gm.get_submodule("layer_low_rank").down.dtype == stored
        with torch.no_grad():
            found, expected = done.gm(*graph_inputs(gm, x))[0], gm(*graph_inputs(gm, x))[0]
        # a step of the dtype at the largest output, or two: each sum is rounded on its own
        assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_a_graph_with_branches_is_saved_and_loaded_bit_identical(tmp_path):
    gm = split_low_rank(
        captured("pixart-alpha"), rank=2, only=[s.name for s in all_sites(captured("pixart-alpha"))]
    ).gm
    artifact.save(tmp_path / "model", gm=gm, call={}, config={}, extra={})
    loaded = artifact.load(tmp_path / "model").gm
    branches = [m for m in loaded.modules() if isinstance(m, LowRank)]
    assert len(branches) > 10 and all(m.up.dtype == torch.float16 for m in branches)
    inputs = inputs_of(gm)
    with torch.no_grad():
        assert torch.equal(as_tensor(loaded(*inputs)), as_tensor(gm(*inputs)))


@pytest.mark.parametrize(
    ("layer", "shape", "rank", "reason"),
    [
        (nn.Conv1d(8, 8, 3, groups=2), (8, 5), 1, "a grouped convolution"),
        (nn.Linear(4, 64), (4,), 4, "its rank is 4 at most"),
        (nn.Linear(16, 16), (16,), 4, "a branch of rank 4 has half of its 256 weights or more"),
    ],
)
def test_what_is_declined_says_why(layer, shape, rank, reason):
    gm = graph_of(Called(layer), torch.randn(2, *shape))
    done = split_low_rank(gm, rank=rank, only={"layer"})
    assert done.changed == 0 and done.declined[0].site == "layer"
    assert done.declined[0].reason.startswith(reason)
    assert done.gm.get_submodule("layer") is gm.get_submodule("layer")


def test_factors_that_overflow_are_declined():
    layer = nn.Linear(16, 16)
    layer.weight.data *= 1e12
    done = split_low_rank(graph_of(Called(layer), torch.randn(2, 16)), rank=1, only={"layer"})
    assert done.changed == 0 and done.declined[0].reason == "its factors overflow torch.float16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "at least 1, got 0"),
        ({"only": {"nothing"}}, "no layer nothing"),
        ({"importance": {"layer": torch.ones(3)}}, r"layer: .* of shape \(16,\), got shape \(3,\)"),
        ({"importance": {"layer": -torch.ones(16)}}, "layer: .* finite, not negative"),
        ({"importance": {"layer": torch.full((16,), torch.inf)}}, "layer: .* finite"),
    ],
)
def test_what_cannot_be_used_is_refused(options, message):
    gm = graph_of(Called(nn.Linear(16, 16)), torch.randn(2, 16))
    with pytest.raises(ConfigError, match=message):
        split_low_rank(gm, **({"rank": 1, "only": {"layer"}} | options))
