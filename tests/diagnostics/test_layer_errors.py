"""site_errors: sound layers are found sound at any recipe, and each planted fault where it is."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from tests.converted import KEYS, captured, examples, lossy, spoil, toy
from tests.ir.test_sites import graph_of
from tests.passes.test_quantize_layers import W8A8, quantize
from tests.test_api import calibrated, fast
from tests.toys import seeded
from tfmq_fx import ActivationSpec, LayerConfig, WeightSpec, convert
from tfmq_fx.capture.capture import capture
from tfmq_fx.diagnostics.layer_errors import FAR, OFF, find_parts, site_errors
from tfmq_fx.ir.sites import find_sites
from tfmq_fx.passes.quantize_layers import quantize_layers
from tfmq_fx.passes.rotate_inputs import rotate_inputs
from tfmq_fx.passes.scale_channels import scale_channels
from tfmq_fx.passes.split_concat import split_concat
from tfmq_fx.passes.split_low_rank import split_low_rank
from tfmq_fx.quant.sqnr import sqnr

LAYERS = 21


def errors(model, **options):
    found = site_errors(captured(), model.gm, examples(model), **options)
    return {each.name: each for each in found}


@pytest.fixture(scope="module")
def sound():
    return errors(lossy())


def figures(error):
    """All that must not change where nothing else does."""
    return (error.alone.tolist(), error.pooled, error.gain)


@pytest.mark.parametrize(
    "config", ["w8a8", "best-w4a6", "q-diffusion-w8a8", "fp8", "w8a8-dynamic", "fp8-dynamic"]
)
def test_sound_layers_are_found_sound(config):
    found = errors(lossy(config))
    products = ["einsum", "einsum_1"] if config.startswith("q-diffusion") else []
    # the time embedding of q-diffusion is quantized like the rest
    assert len(found) == LAYERS + len(products) + (8 if products else 0)
    assert not [name for name, each in found.items() if each.broken]
    assert not [each.note for each in found.values() if each.excess == math.inf or each.untrusted]
    assert all(15 < each.pooled < 60 for each in found.values())
    # far from where blame begins
    assert all(each.excess < FAR - 6 and 0.95 < each.gain < 1.05 for each in found.values())


def record(gm, values):
    """The value of every node, by name."""
    found = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, node):
            found[node.name] = super().run_node(node)
            return found[node.name]

    with torch.no_grad():
        Record(gm).run(*values)
    return found


def test_figures_are_those_of_the_layer_alone_and_as_the_model_runs(sound):
    each, model = sound["down2.conv2"], lossy()
    assert each.alone.shape == each.running.shape == (24,)  # 8 draws of 3 timesteps
    assert each.alone.min() <= each.pooled <= each.alone.max()
    (part,) = [p for p in find_parts(captured(), model.gm) if p.name == "down2.conv2"]
    expected, alone, running = [], [], []
    for values in examples(model):
        theirs, mine = record(captured(), values), record(model.gm, values)
        value, *given = (theirs[node.name] for node in part.nodes)
        expected.append(value)
        with torch.no_grad():
            alone.append(part.part(*given)[0])
        running.append(mine[part.nodes[0].name])
        assert torch.equal(part.original(*given)[0], value)
    # float32 differences of the two ways to sum
    assert each.pooled == pytest.approx(sqnr(torch.cat(expected), torch.cat(alone)), abs=1e-4)
    first = expected[0][:1], running[0][:1]
    assert float(each.running[0]) == pytest.approx(sqnr(*first), abs=1e-4)
    assert each.running.mean() < each.alone.mean() - 3


@pytest.mark.parametrize("factor", [2.0, 0.5])
@pytest.mark.parametrize("site", ["conv_in", "down2.conv1", "attention.qkv", "up1.skip"])
def test_a_weight_scale_off_by_two_is_broken_and_no_other(sound, site, factor):
    model = copy.deepcopy(lossy())
    spoil(model, site, "weight", factor)
    found = errors(model)
    assert [name for name, each in found.items() if each.broken] == [site]
    assert found[site].gain == pytest.approx(factor, rel=0.05)
    assert found[site].note == f"its weights give {factor:.2g} times what they should"
    others = [name for name in found if name != site]
    assert [figures(found[n]) for n in others] == [figures(sound[n]) for n in others]


@pytest.mark.parametrize("site", ["down2.conv1", "attention.qkv"])
def test_an_input_scale_that_is_far_too_wide_is_broken(sound, site):
    model = copy.deepcopy(lossy())
    spoil(model, site, "input", 64.0)  # a quarter of 8 bits is left
    found = errors(model)
    assert [name for name, each in found.items() if each.broken] == [site]
    assert found[site].excess > FAR > sound[site].excess + 6


@pytest.mark.parametrize("config", ["best-w4a6", "q-diffusion-w8a8"])
@pytest.mark.parametrize("what, factor", [("weight", 2.0), ("weight", 0.5), ("input", 1 / 16)])
def test_faults_are_found_in_rewritten_and_in_static_layers(config, what, factor):
    site = "up2.conv1"  # split at its concatenation, and with a branch, in "best"
    model = copy.deepcopy(lossy(config))
    spoil(model, site, what, factor)
    assert [name for name, each in errors(model).items() if each.broken] == [site]


def test_a_range_that_clips_everything_is_broken(sound):
    model = copy.deepcopy(lossy())
    spoil(model, "conv_out", "input", 1 / 16)
    found = errors(model)
    assert [name for name, each in found.items() if each.broken] == ["conv_out"]
    assert found["conv_out"].excess > FAR > sound["conv_out"].excess
    assert found["conv_out"].note.startswith(f"{found['conv_out'].excess:.0f} dB more noise than")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bias_that_is_not_finite_is_broken(value):
    model = copy.deepcopy(lossy())
    model.gm.get_submodule("conv_out").bias[0] = value
    found = errors(model)
    assert [name for name, each in found.items() if each.broken] == ["conv_out"]
    assert found["conv_out"].excess == math.inf
    assert found["conv_out"].note == "its output is not finite"


def test_one_channel_that_is_off_is_broken():
    model = copy.deepcopy(lossy())
    model.gm.get_submodule("down2.conv1").weight_scale[0] *= 8
    assert [name for name, each in errors(model).items() if each.broken] == ["down2.conv1"]


def test_an_input_changed_in_front_of_a_layer_is_broken():
    model = copy.deepcopy(lossy())
    (node,) = [n for n in model.gm.graph.nodes if n.target == "conv_out"]
    with model.gm.graph.inserting_before(node):
        doubled = model.gm.graph.call_function(torch.mul, (node.args[0], 2.0))
    node.args = (doubled, *node.args[1:])
    model.gm.recompile()
    found = errors(model)
    assert [name for name, each in found.items() if each.broken] == ["conv_out"]
    assert found["conv_out"].gain == pytest.approx(2, rel=0.05)


def test_what_makes_up_for_errors_before_it_is_not_broken():
    acts = ActivationSpec(bits=8)
    plan = {"down2.conv1": LayerConfig(weights=WeightSpec(bits=3), activations=acts)}
    prepared = calibrated(toy(), 8, fast("w8a8", mode="table"), overrides=plan)
    model = convert(prepared, progress=False)
    found = errors(model)
    # its 8-bit weights are fitted to what 3 bits before it leave, and off by that on clean inputs
    assert found["down2.conv2"].pooled < 25 < 30 < errors(lossy())["down2.conv2"].pooled
    assert not [name for name, each in found.items() if each.broken]
    model.gm.get_submodule("down2.conv2").bias += 10
    assert [n for n, each in errors(model).items() if each.broken] == ["down2.conv2"]


class Conditioned(nn.Module):
    """A condition in floating point goes through a layer of its own."""

    def __init__(self):
        super().__init__()
        self.text, self.both = nn.Linear(6, 8), nn.Linear(8, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, t, text):
        h = self.first(x) + self.text(text) + t[:, None].float() / 1000
        return self.second(torch.tanh(h)) + self.both(torch.tanh(text[:, :1].expand(-1, 8)))


def test_layers_of_conditions_drawn_from_no_data_are_judged_by_their_weights_alone():
    example = {"x": torch.randn(2, 8), "t": torch.tensor([1, 2]), "text": torch.randn(2, 6)}
    gm = capture(seeded(Conditioned).eval(), example, timestep="t").gm
    batches = [
        [torch.randn(8, 8), torch.full((8,), int(t)), 0.01 * torch.randn(8, 6)] for t in KEYS
    ]
    model = quantize(gm, W8A8, batches, KEYS).gm
    # a hundred times what calibration saw
    far = torch.randn(4, 6)
    far += far.sign()  # in every sample
    given = [[torch.randn(4, 8), torch.full((4,), int(t)), far] for t in KEYS]
    for drawn, broken in (((), {"text", "both"}), (("text",), set())):
        found = {e.name: e for e in site_errors(gm, model, given, random_conditions=drawn)}
        assert {n for n, e in found.items() if e.broken} >= broken
        assert not drawn or not [n for n in ("text", "both") if found[n].broken]
        assert found["text"].pooled < 3  # clipped all the same
    assert found["text"].note.startswith("it reads a condition drawn at random")
    assert not found["first"].note
    model.get_submodule("text").weight_scale.mul_(2)
    found = {e.name: e for e in site_errors(gm, model, given, random_conditions=("text",))}
    assert found["text"].broken and not found["both"].broken


def test_ratios_are_judged_by_the_middle_between_right_and_off_by_two(sound):
    each = sound["conv_out"]
    for ratio, broken in ((OFF * 0.99, False), (OFF * 1.01, True), (1.01 / OFF, False)):
        assert dataclasses.replace(each, gain=ratio).broken is broken
    assert dataclasses.replace(each, gain=math.nan).broken
    assert dataclasses.replace(each, excess=10.1).broken
    assert not dataclasses.replace(each, excess=9.9).broken


# ------------------------------------------------------------------------------------- rewrites

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
def test_rewritten_layers_are_compared_whole(gm, rewrite):
    rewritten = REWRITES[rewrite](gm)
    plan = dict.fromkeys(names(rewritten), W8)
    model = quantize_layers(rewritten, plan=plan, ranges={}, timesteps=KEYS).gm
    x = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    found = site_errors(gm, model, [[x, KEYS]])
    assert [each.name for each in found] == names(gm)
    for each in found:
        # 8-bit weights of the layer alone: half a step of a grid of 255 on every weight
        assert 34 < each.pooled < 80 and each.gain == pytest.approx(1, abs=0.01)
        assert each.excess < 3 and not each.broken and not each.note
    model.get_submodule(names(rewritten)[-1]).weight_scale.mul_(2)
    found = site_errors(gm, model, [[x, KEYS]])
    assert [each.name for each in found if each.broken] == ["out"]


def test_layers_that_the_model_does_not_quantize_have_no_error(gm):
    plan = dict.fromkeys(names(gm), LayerConfig()) | {"out": W8}
    quantized = quantize_layers(gm, plan=plan, ranges={}, timesteps=KEYS).gm
    assert [part.name for part in find_parts(gm, quantized)] == ["out"]
    assert find_parts(gm, gm) == [] == site_errors(gm, gm, [[torch.randn(3, 8, 4, 4), KEYS]])
    other = graph_of(seeded(Mixed, seed=1).eval(), 8, 4, 4)
    assert [part.name for part in find_parts(other, quantized)] == ["out"]


def test_products_of_attention_are_measured_and_not_judged():
    found = errors(lossy("q-diffusion-w8a8"))
    for name in ("einsum", "einsum_1"):
        each = found[name]
        # 8 bits of each operand, half a step of a range that calibration saw, is about 1/255; a
        # value beyond that range is clipped (a wrong operand is off by 100 %)
        assert 28 < each.pooled < 80 and (each.excess, each.gain) == (0, 1) and not each.broken
