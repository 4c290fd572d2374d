"""site_parts: each layer's part computes its value, and its weights are those of the rewrites."""

import pytest
import torch
from torch import nn

from tests.converted import KEYS, captured, lossy
from tests.passes.test_quantize_layers import W8A8, quantize
from tests.test_sites import graph_of
from tests.toys import seeded
from tfmq_fx.config import LayerConfig, WeightSpec
from tfmq_fx.nn import QuantLayer
from tfmq_fx.passes.quantize_layers import quantize_layers
from tfmq_fx.passes.rotate_inputs import rotate_inputs
from tfmq_fx.passes.scale_channels import scale_channels
from tfmq_fx.passes.split_concat import split_concat
from tfmq_fx.passes.split_low_rank import split_low_rank
from tfmq_fx.site_parts import find_parts, input_scales
from tfmq_fx.sites import find_sites

W8 = LayerConfig(weights=WeightSpec(bits=8))


class Mixed(nn.Module):
    """Linear layers that read one value, a grouped convolution, and a concatenation."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.wide = nn.Conv2d(20, 16, 3, padding=1, bias=False)
        self.query, self.key = nn.Linear(16, 24), nn.Linear(16, 24)
        self.out = nn.Linear(24, 16)

    def forward(self, x, t):
        h = self.grouped(x + t[:, None, None, None].float() / 1000)
        h = self.wide(torch.cat([torch.tanh(h), x], 1)).flatten(2).transpose(1, 2)
        return self.out(torch.tanh(self.query(h)) * self.key(h))


@pytest.fixture(scope="module")
def gm():
    return graph_of(seeded(Mixed).eval(), 8, 4, 4)


def factors(gm):
    """Uneven ones for every site."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for site in find_sites(gm)[0]:
        channels = site.layer.weight.shape[1] * getattr(site.layer, "groups", 1)
        found[site.name] = torch.rand(channels, generator=generator) * 3 + 0.5
    return found


def names(gm):
    return [site.name for site in find_sites(gm)[0]]


REWRITES = {
    "none": lambda gm: gm,
    "scaled": lambda gm: scale_channels(gm, factors=factors(gm)).gm,
    "rotated": lambda gm: rotate_inputs(gm, group=8, only=names(gm)).gm,
    "split": lambda gm: split_concat(gm, only=names(gm)).gm,
    "low rank": lambda gm: split_low_rank(gm, rank=2, only=names(gm)).gm,
}
REWRITES["all"] = lambda gm: REWRITES["low rank"](
    REWRITES["rotated"](REWRITES["scaled"](REWRITES["split"](gm)))
)


@pytest.mark.parametrize("rewrite", REWRITES)
def test_weights_are_followed_through_rewrites(gm, rewrite):
    rewritten = REWRITES[rewrite](gm)
    sites = names(rewritten)
    quantized = quantize_layers(
        rewritten, plan=dict.fromkeys(sites, W8), ranges={}, timesteps=KEYS
    ).gm
    parts = find_parts(gm, quantized)
    assert [part.name for part in parts] == names(gm)
    assert sorted(leaf.path for part in parts for leaf in part.leaves) == sorted(sites)
    for part in parts:
        original = gm.get_submodule(part.name)
        for leaf in part.leaves:
            wanted = rewritten.get_submodule(leaf.path).weight
            # what the rewrites computed in float64 and rounded to float32 once each
            torch.testing.assert_close(leaf.weight, wanted.detach(), rtol=2e-6, atol=2e-7)
            assert leaf.layer is quantized.get_submodule(leaf.path) and leaf.column is None
            if leaf.bias is not None:
                assert torch.equal(leaf.bias, original.bias)
        biased = [leaf.bias is not None for leaf in part.leaves]
        assert biased == [original.bias is not None, *[False] * (len(biased) - 1)]


def test_a_part_gives_the_value_of_its_layer_from_the_references_values(gm):
    rewritten = REWRITES["all"](gm)
    quantized = quantize_layers(
        rewritten, plan=dict.fromkeys(names(rewritten), W8), ranges={}, timesteps=KEYS
    ).gm
    x, t = torch.randn(3, 8, 4, 4), torch.tensor([0, 250, 999])
    values = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, n):
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Record(gm).run(x, t)
        for part in find_parts(gm, quantized):
            found, *inputs = part.part(*(values[node] for node in part.given))
            assert len(inputs) == len(part.leaves)
            # 8-bit weights of the layer alone: half a step of a grid of 255 on every weight
            error = (found - values[part.target]).norm() / values[part.target].norm()
            assert 0 < float(error) < 0.02


def test_layers_tell_where_their_scales_come_from():
    model = lossy()
    leaves = {leaf.path: leaf for p in find_parts(captured(), model.gm) for leaf in p.leaves}
    assert len(leaves) == 21 and all(leaf.column for leaf in leaves.values())
    columns = [leaf.column for leaf in leaves.values()]
    assert columns == [("activation_scales", i) for i in range(21)]
    (sample, _) = model.gm.graph.find_nodes(op="placeholder")
    (scales,) = input_scales(model.gm, sample)
    assert torch.equal(scales, model.gm.activation_scales[:, 0])


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
    (scales,) = input_scales(model, x)
    assert torch.equal(scales, model.activation_scales[:, 0]) and input_scales(model, t) == []


def test_layers_that_the_model_does_not_quantize_have_no_part(gm):
    plan = dict.fromkeys(names(gm), LayerConfig()) | {"out": W8}
    quantized = quantize_layers(gm, plan=plan, ranges={}, timesteps=KEYS).gm
    assert [part.name for part in find_parts(gm, quantized)] == ["out"]
    assert find_parts(gm, gm) == []
    other = graph_of(seeded(Mixed, seed=1).eval(), 8, 4, 4)
    assert [part.name for part in find_parts(other, quantized)] == ["out"]


def test_a_weight_of_another_shape_is_not_known(gm):
    quantized = quantize_layers(gm, plan=dict.fromkeys(names(gm), W8), ranges={}, timesteps=KEYS).gm
    layer = quantized.get_submodule("out")
    spec = layer.spec() | {"weight_shape": [16, 12]}
    quantized.set_submodule("out", type(layer).from_spec(spec))
    (leaf,) = next(p for p in find_parts(gm, quantized) if p.name == "out").leaves
    assert leaf.weight is None and isinstance(leaf.layer, QuantLayer)
