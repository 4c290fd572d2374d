"""sites: every layer that can be quantized is found, the others are declined by reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.strategies import WIDTH, GraphBuilder, draw_inputs
from tests.toys import SharedTwice, ToyUNet, seeded, tiny_unet2d
from tfmq_fx.capture.capture import capture
from tfmq_fx.core.config import Config
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.layer_config import LayerConfig, WeightSpec
from tfmq_fx.ir.sites import check_weights, find_sites, left_by_module, plan_sites


def graph_of(model, *shape):
    example = {"x": torch.randn(2, *shape), "t": torch.tensor([1, 2])}
    return capture(model, example, timestep="t").gm


@pytest.fixture(scope="module")
def toy():
    return graph_of(seeded(ToyUNet).eval(), 3, 8, 8)


def test_every_layer_with_weights_is_a_site_in_execution_order(toy):
    sites, declined = find_sites(toy)
    model = seeded(ToyUNet)
    kinds = (nn.Linear, nn.Conv2d)
    expected = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, kinds)}
    assert {s.name: s.weights for s in sites} == expected and not declined
    order = [node.name for node in toy.graph.nodes]
    first = [order.index(site.nodes[0].name) for site in sites]
    assert first == sorted(first)


def test_every_layer_of_a_diffusers_unet_is_a_site():
    model = tiny_unet2d()
    gm = capture(
        model, {"sample": torch.randn(1, 3, 16, 16), "timestep": 1}, timestep="timestep"
    ).gm
    sites, declined = find_sites(gm)
    expected = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert {s.name for s in sites} == expected and not declined


def test_a_layer_called_twice_is_one_site_with_two_nodes():
    gm = graph_of(seeded(SharedTwice).eval(), 4)
    (site,), declined = find_sites(gm)
    assert len(site.nodes) == 3 and not declined
    assert site.layer is gm.get_submodule(site.name)


def test_what_cannot_be_quantized_is_declined_by_reason():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Halved(nn.ConvTranspose1d):
        def forward(self, x):
            return super().forward(x) / 2

    b = GraphBuilder()
    h = b.call(F.linear, b.x, b.buffer("w", nn.Parameter(torch.eye(WIDTH))))
    h = b.layer("doubled", Doubled(WIDTH, WIDTH), h)
    image = b.call("view", h, b.size(h), WIDTH, 1)
    up = b.layer("up", Halved(WIDTH, 2, 2), image)
    weight = b.buffer("k", nn.Parameter(torch.ones(2, 2, 1)))
    up = b.call(F.conv1d, up, weight)
    gm = b.finish(up)
    sites, declined = find_sites(gm)
    assert not sites
    assert {d.site: d.reason for d in declined} == {
        "linear": "called as a function, not as a torch.nn layer",
        "doubled": "Doubled has a forward of its own",
        "up": "Halved has a forward of its own",
        "conv1d": "called as a function, not as a torch.nn layer",
    }
    with torch.no_grad():
        gm(*draw_inputs(gm, 2).values())  # a graph that runs


BITS = {n: LayerConfig(weights=WeightSpec(bits=n)) for n in (2, 3, 4, 8)}


def test_first_and_last_are_those_of_the_part_that_depends_on_the_sample(toy):
    sites, _ = find_sites(toy)
    temporal = [s.name for s in sites if "time" in s.name]
    config = Config(layers=BITS[4], first=BITS[8], last=BITS[3])
    plan = plan_sites(sites, config, early=temporal)
    assert sites[0].name == "time_mlp.0"
    assert plan["conv_in"] is BITS[8] and plan["conv_out"] is BITS[3]
    others = set(plan) - {"conv_in", "conv_out"}
    assert {plan[name] for name in others} == {BITS[4]} and set(temporal) < others


def test_without_a_first_and_last_they_are_like_the_rest(toy):
    sites, _ = find_sites(toy)
    assert set(plan_sites(sites, Config(layers=BITS[4])).values()) == {BITS[4]}


def test_overrides_are_patterns_and_later_ones_win(toy):
    sites, _ = find_sites(toy)
    plan = plan_sites(
        sites,
        Config(layers=BITS[4], first=BITS[8]),
        overrides={"down1.*": BITS[2], "*.conv1": BITS[3], "conv_in": LayerConfig()},
    )
    assert plan["down1.conv1"] is BITS[3] and plan["down1.conv2"] is BITS[2]
    assert plan["up1.conv1"] is BITS[3] and plan["up1.conv2"] is BITS[4]
    assert plan["conv_in"] == LayerConfig()


def test_an_override_that_matches_nothing_is_refused(toy):
    sites, _ = find_sites(toy)
    text = r"override 'attn\*' matches no layer; the model's layers are time_mlp\.0, .*29 in all"
    with pytest.raises(ConfigError, match=text):
        plan_sites(sites, Config(), overrides={"attn*": BITS[4]})


@pytest.mark.parametrize(("parameter", "value"), [("weight", float("nan")), ("bias", float("inf"))])
def test_weights_that_are_not_finite_name_their_layer(parameter, value):
    model = seeded(ToyUNet)
    getattr(model.mid1.conv2, parameter).data.view(-1)[0] = value
    gm = graph_of(seeded(ToyUNet).eval(), 3, 8, 8)
    check_weights(find_sites(gm)[0])
    gm.get_submodule("mid1.conv2").load_state_dict(model.mid1.conv2.state_dict())
    with pytest.raises(ConfigError, match=rf"mid1\.conv2\.{parameter} holds NaN or Inf"):
        check_weights(find_sites(gm)[0])


class Shares(nn.Module):
    """A layer with a hook, and one whose weight is used by itself as well."""

    def __init__(self):
        super().__init__()
        self.hooked, self.tied, self.free = (nn.Linear(8, 8) for _ in range(3))
        self.hooked.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x, t):
        h = self.free(self.tied(self.hooked(x)))
        return h @ self.tied.weight + t[:, None]


def test_layers_that_are_more_than_their_operation_are_declined():
    model = Shares().eval()
    gm = graph_of(model, 8)
    sites, declined = find_sites(gm)
    assert [site.name for site in sites] == ["free"]
    assert {d.site: d.reason for d in declined} == {
        "hooked": "it has hooks",
        "tied": "its weight is used elsewhere as well",
    }
    assert sum(left_by_module(gm, sites).values()) == 2 * 8 * 8
    x, t = torch.randn(3, 8), torch.arange(3)
    with torch.no_grad():
        assert torch.equal(gm(x, t)[0], model(x, t))
