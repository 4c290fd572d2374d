"""scale_channels: the same outputs, read through scaled inputs; one product where one will do."""

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
from tests.strategies import WIDTH, GraphBuilder
from tests.toys import seeded
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.ir.functionalize import inplace_
from tfmq_fx.ir.layer_edits import groups_of, weight_of
from tfmq_fx.passes.scale_channels import scale_channels


def random_factors(gm, seed=0, powers=False):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for site in all_sites(gm):
        channels = weight_of(site.layer).shape[1] * groups_of(site.layer)
        exponent = torch.rand(channels, generator=generator) * 8 - 4
        found[site.name] = 2.0 ** (exponent.round() if powers else exponent)
    return found


def products(gm):
    return [n for n in gm.graph.nodes if n.target is torch.mul and n.name.endswith("_scaled")]


@settings(max_examples=40)
@given(case=layers(), seed=st.integers(0, 99))
def test_any_layer_called_several_times_keeps_its_output(case, seed):
    layer, x = case
    gm = graph_of(Called(layer), x)
    before = snapshot(gm)
    done = scale_channels(gm, factors=random_factors(gm, seed))
    check_exact(gm, done)
    assert_untouched(gm, before)
    assert done.changed == 1 and stage_of(done.gm) is Stage.CAPTURED
    assert len(products(done.gm)) == 2  # one layer, two inputs
    assert len([n for n, _ in done.gm.named_buffers() if n.startswith("input_scale")]) == 1
    assert not torch.equal(done.gm.get_submodule("layer").weight, layer.weight) or not bool(
        layer.weight.any()
    )


@settings(max_examples=20)
@given(case=layers(), seed=st.integers(0, 99))
def test_powers_of_two_change_no_bit(case, seed):
    layer, x = case
    gm = graph_of(Called(layer), x)
    done = scale_channels(gm, factors=random_factors(gm, seed, powers=True))
    check_exact(gm, done, tolerance=0.0)


@pytest.mark.parametrize("name", ["digits", "pixart-alpha"])
def test_whole_models_keep_their_outputs(name):
    gm = captured(name)
    before = snapshot(gm)
    done = scale_channels(gm, factors=random_factors(gm))
    check_exact(gm, done)
    assert_untouched(gm, before)
    assert done.changed == len(all_sites(gm)) and not done.declined
    check_exact(gm, scale_channels(done.gm, factors=random_factors(gm, 1)))  # factors multiply


def test_powers_of_two_change_no_bit_of_a_whole_model():
    gm = captured("digits")
    done = scale_channels(gm, factors=random_factors(gm, powers=True))
    check_exact(gm, done, tolerance=0.0)


class ThreeReaders(nn.Module):
    """Attention's three projections of one input, and one of another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x, t):
        h = torch.tanh(x)
        return self.out(self.q(h) * self.k(h) + self.v(h)) + t[:, None]


def test_sites_that_read_one_value_by_equal_factors_share_one_product():
    gm = graph_of(seeded(ThreeReaders), torch.randn(2, 4))
    r, other = torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([2.0, 3.0, 5.0, 7.0])
    done = scale_channels(gm, factors={"q": r, "k": r.clone(), "v": other, "out": r})
    check_exact(gm, done)
    inputs = {name: done.gm.graph.find_nodes(op="call_module", target=name) for name in "qkv"}
    q, k, v = (inputs[name][0].args[0] for name in "qkv")
    assert q is k and q is not v and len(products(done.gm)) == 3
    assert done.changed == 4 and done.details == {
        "largest": {"q": 7.0, "k": 7.0, "v": 7.0, "out": 7.0}
    }


def test_a_value_that_is_written_in_place_is_scaled_for_each_reader():
    b = GraphBuilder()
    h = b.call(torch.tanh, b.x)
    first = b.layer("a", nn.Linear(WIDTH, WIDTH), h)
    write = b.call(inplace_, h, "mul_", 3.0)
    write.meta["writes"] = True
    gm = b.finish(b.call(torch.add, first, b.layer("b", nn.Linear(WIDTH, WIDTH), h)))
    r = torch.tensor([1.0, 2.0, 3.0, 4.0])
    done = scale_channels(gm, factors={"a": r, "b": r})
    check_exact(gm, done, tolerance=1e-5)  # single precision
    assert len(products(done.gm)) == 2


def test_factors_of_one_leave_a_layer_alone():
    gm = graph_of(seeded(ThreeReaders), torch.randn(2, 4))
    done = scale_channels(gm, factors={"q": torch.ones(4), "k": torch.full((4,), 2.0)})
    assert done.changed == 1 and [(d.site, d.reason) for d in done.declined] == [
        ("q", "every factor is 1")
    ]
    assert done.gm.get_submodule("q") is gm.get_submodule("q")
    assert scale_channels(gm, factors={}).changed == 0


def test_half_precision_makes_up_for_the_rounding_of_the_multiplier():
    layer = seeded(nn.Linear, 64, 32).half()
    b = GraphBuilder()
    x = b.placeholder("y", b.x.meta["val"].new_empty((b.batch, 64), dtype=torch.float16))
    gm = b.finish(b.layer("layer", layer, x))
    r = torch.full((64,), 1.0 + 2.0**-10 / 1.9)  # 1 / r is rounded by nearly half a step
    done = scale_channels(gm, factors={"layer": r}).gm
    weight, scaled = layer.weight.double(), done.get_submodule("layer").weight.double()
    scale = done.input_scale.double()
    # Within the rounding of the new weights, 2**-11; the multiplier's own would come on top.
    assert bool(((scaled * scale - weight).abs() <= weight.abs() * 2.0**-11 + 1e-7).all())
    assert done(*inputs_of(gm))[0].dtype == torch.float16


def test_scaled_weights_that_overflow_are_declined():
    layer = seeded(nn.Linear, 4, 4).half()
    b = GraphBuilder()
    x = b.placeholder("y", b.x.meta["val"].new_empty((b.batch, 4), dtype=torch.float16))
    gm = b.finish(b.layer("layer", layer, x))
    layer.weight.data[0, 0] = 60000.0
    done = scale_channels(gm, factors={"layer": torch.tensor([2.0, 1.0, 1.0, 1.0])})
    assert done.changed == 0 and done.gm.get_submodule("layer") is layer
    assert done.declined[0].reason == "its scaled weight overflows torch.float16"


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"q": torch.ones(3)}, r"q: factors of shape \(3,\), but the layer has 4 input channels"),
        ({"k": torch.tensor([1.0, 0.0, 1.0, 1.0])}, "k: factors must be finite and positive"),
        ({"k": torch.tensor([1.0, torch.nan, 1.0, 1.0])}, "k: factors must be finite"),
        ({"v": torch.tensor([1.0, -2.0, 1.0, 1.0])}, "v: factors must be finite and positive"),
        ({"nothing": torch.ones(4)}, "no layer nothing in the graph"),
    ],
)
def test_factors_that_cannot_be_used_are_refused(factors, message):
    gm = graph_of(seeded(ThreeReaders), torch.randn(2, 4))
    with pytest.raises(ConfigError, match=message):
        scale_channels(gm, factors=factors)


def test_factors_whose_inverse_does_not_fit_are_refused():
    layer = seeded(nn.Linear, 4, 4).half()
    b = GraphBuilder()
    x = b.placeholder("y", b.x.meta["val"].new_empty((b.batch, 4), dtype=torch.float16))
    gm = b.finish(b.layer("layer", layer, x))
    with pytest.raises(ConfigError, match=r"layer: 1 / r .* does not fit torch.float16"):
        scale_channels(gm, factors={"layer": torch.full((4,), 1e-9)})
