"""fold_weights: products with weights that no input changes become layers; the rest is named."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfmq_fx import CoverageWarning, StaleError, convert, fold_timesteps, prepare, refresh, report
from tfmq_fx.capture.capture import capture
from tfmq_fx.ir.sites import find_sites, left_by_module
from tfmq_fx.passes.fold_weights import fold_weights
from tfmq_fx.quant.sqnr import sqnr

STEPS = [700, 3]


class Standardized(nn.Module):
    """A convolution whose weight is standardized in forward."""

    def __init__(self, i, o):
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(o, i, 3, 3)), nn.Parameter(torch.ones(o))

    def forward(self, x):
        weight = self.weight
        mean, std = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
        weight = (weight - mean) / (std + 1e-5) * self.gain.view(-1, 1, 1, 1) / 6
        return F.conv2d(x, weight, padding=1)


class Halves(nn.Module):
    """A strided convolution whose weight comes in two parts, with a bias."""

    def __init__(self, i, o):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(o // 2, i, 3, 3) / 8) for _ in range(2))
        self.shift = nn.Parameter(torch.randn(o))

    def forward(self, x):
        return F.conv2d(x, torch.cat([self.a, self.b]), self.shift, (2, 1), (1, 1))


class Adapted(nn.Module):
    """A linear product with a low-rank update that is merged at each call, in channels."""

    def __init__(self, width):
        super().__init__()
        self.base = nn.Linear(width, width)
        self.up, self.down = (nn.Parameter(torch.randn(*s) / 4) for s in ((width, 2), (2, width)))

    def forward(self, x):
        weight = self.base.weight + self.up @ self.down
        return F.linear(x.movedim(1, -1), weight, self.base.bias).movedim(-1, 1)


class TwoWeights(nn.Module):
    """A feed-forward part with its matrices in a list, and one of them tied to a layer."""

    def __init__(self, width):
        super().__init__()
        self.list = nn.ParameterList([torch.randn(2 * width, width) / 4, torch.randn(width) / 4])
        self.out = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        h = F.silu(F.linear(x.movedim(1, -1), self.list[0]))
        return (self.out(h) + F.linear(h, self.out.weight, self.list[1])).movedim(-1, 1)


class Twice(nn.Module):
    """One standardized convolution called twice."""

    def __init__(self, width):
        super().__init__()
        self.inner = Standardized(width, width)

    def forward(self, x):
        return self.inner(F.silu(self.inner(x)))


class FromTimestep(nn.Module):
    """A convolution whose weight an input changes."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, 3, 3) / 12)

    def forward(self, x):
        return F.conv2d(x, self.weight * x.abs().mean(), padding=1)


class Net(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.enter, self.time, self.middle = Standardized(3, 8), nn.Linear(1, 8), middle
        self.leave = nn.Conv2d(8, 3, 1)

    def forward(self, x, t):
        time = self.time(t[:, None].to(x.dtype) / 1000)[:, :, None, None]
        return self.leave(self.middle((self.enter(x) + time).sigmoid()))


def net_of(make):
    torch.manual_seed(0)
    return Net(make()).eval()


def example(batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 8, 8, generator=generator), torch.tensor(STEPS[:batch])


MIDDLES = {
    "standardized": (lambda: Standardized(8, 8), {"middle"}, "weight"),
    "halves": (lambda: Halves(8, 8), {"middle"}, "b"),
    "adapted": (lambda: Adapted(8), {"middle"}, "up"),
    "tied": (lambda: TwoWeights(8), {"middle.linear", "middle.linear_1", "middle.out"}, "list.0"),
    "twice": (lambda: Twice(8), {"middle.inner"}, "inner.weight"),
}


@pytest.mark.parametrize("kind", MIDDLES)
@torch.no_grad()
def test_constant_weights_are_quantized_under_the_names_of_their_modules(kind):
    make, sites, parameter = MIDDLES[kind]
    net = net_of(make)
    x, t = example(1)
    assert torch.equal(fold_timesteps(net, STEPS, example())(x, t), net(x, t))
    model = convert(prepare(net, example(), config="w8a8-dynamic", timesteps=STEPS), progress=False)
    assert set(model.record["sites"]) == {"enter", "leave", *sites}
    assert sqnr(net(x, t), model(x, t)) > 25
    facts = report(model)
    assert facts.weight_coverage == 1 and not facts.data["declined"]
    counts = facts.data["parameters"]
    assert counts["model"] == sum(p.numel() for p in net.parameters())
    assert counts["model"] == sum(counts[k] for k in ("quantized", "float", "tables", "unused"))
    assert counts["tables"] == 16 and counts["constants"] == 0
    net.middle.get_parameter(parameter).mul_(1.7).add_(0.1)
    with pytest.raises(StaleError, match=f"middle.{parameter}"):
        model(x, t)
    assert sqnr(net(x, t), refresh(model, net, progress=False)(x, t)) > 25


@torch.no_grad()
def test_a_weight_that_inputs_change_is_declined_by_its_module():
    net = net_of(lambda: FromTimestep(8))
    with pytest.warns(CoverageWarning, match=r"576 of \d+ .*: middle \(the weight of its conv2d"):
        model = convert(
            prepare(net, example(), config="w8a8-dynamic", timesteps=STEPS), progress=False
        )
    reason = "the weight of its conv2d is computed from the inputs"
    assert model.record["declined"] == [["middle", reason]]
    assert report(model).weight_coverage == pytest.approx(240 / 816)
    x, t = example(1)
    assert sqnr(net(x, t), model(x, t)) > 25


@torch.no_grad()
def test_the_graph_computes_the_same_and_sizes_are_kept():
    net = net_of(lambda: Halves(8, 8))
    gm = capture(net, dict(zip(("x", "t"), example(), strict=True)), timestep="t").gm
    done = fold_weights(gm)
    assert done.changed == 2 and {site.name for site in find_sites(done.gm)[0]} == {
        "time",
        "enter",
        "middle",
        "leave",
    }
    assert left_by_module(gm, find_sites(gm)[0]) == {"enter": 216, "middle": 576}
    assert left_by_module(done.gm, find_sites(done.gm)[0]) == {}
    layer = done.gm.get_submodule("middle")
    assert (layer.stride, layer.padding, layer.bias is not None) == ((2, 1), (1, 1), True)
    for a, b in zip(gm(*example()), done.gm(*example()), strict=True):
        assert torch.equal(a, b)
    assert fold_weights(done.gm).changed == 0


class Upsampled(nn.Module):
    """Transposed convolutions called as functions, with a normalized weight and in groups."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (
            nn.Parameter(torch.randn(3, 4, 2, 2)),
            nn.Parameter(torch.randn(4, 2, 3, 3)),
        )
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x, t):
        weight = F.normalize(self.a.flatten(1), dim=1).view_as(self.a)
        h = F.conv_transpose2d(x, weight, self.shift, stride=2) * t[:, None, None, None]
        return F.conv_transpose2d(h, self.b, None, 2, 1, 1, 2, 2)


def test_transposed_convolutions_with_constant_weights_become_layers():
    model = Upsampled().eval()
    inputs = {"x": torch.randn(2, 3, 5, 5), "t": torch.tensor([0.5, 0.25])}
    gm = capture(model, inputs, timestep="t").gm
    folded = fold_weights(gm)
    layers = [site.layer for site in find_sites(folded.gm)[0]]
    assert [type(layer) for layer in layers] == [nn.ConvTranspose2d] * 2
    assert layers[1].groups == 2 and layers[1].output_padding == (1, 1)
    with torch.no_grad():
        assert torch.equal(folded.gm(*inputs.values())[0], model(**inputs))
