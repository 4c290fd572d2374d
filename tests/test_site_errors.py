"""site_errors: sound layers are found sound at any recipe, and each planted fault where it is."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from tests.converted import KEYS, captured, examples, lossy, spoil, toy
from tests.passes.test_quantize_layers import W8A8, quantize
from tests.test_api import calibrated, fast
from tests.toys import seeded
from tfmq_fx import ActivationSpec, LayerConfig, WeightSpec, convert
from tfmq_fx.capture import capture
from tfmq_fx.metrics import sqnr
from tfmq_fx.site_errors import OFF, site_errors

LAYERS = 21


def errors(model, **options):
    found = site_errors(captured(), model.gm, examples(model), KEYS, **options)
    return {each.part.name: each for each in found}


@pytest.fixture(scope="module")
def sound():
    return errors(lossy())


def figures(error):
    """All that must not change where nothing else does."""
    return (error.found.tolist(), error.pooled, error.excess, error.weight_ratio)


@pytest.mark.parametrize(
    "config", ["w8a8", "best-w4a6", "q-diffusion-w8a8", "fp8", "w8a8-dynamic", "fp8-dynamic"]
)
def test_sound_layers_are_found_sound(config):
    found = errors(lossy(config))
    products = ["einsum", "einsum_1"] if config.startswith("q-diffusion") else []
    # the time embedding of q-diffusion is quantized like the rest
    assert len(found) == LAYERS + len(products) + (8 if products else 0)
    assert not [name for name, each in found.items() if each.broken]
    assert all(each.rebuilt and not each.note for n, each in found.items() if n not in products)
    assert all(15 < each.pooled < 60 for each in found.values())


def test_figures_are_those_of_the_layer_alone(sound):
    each = sound["down2.conv2"]
    assert each.found.shape == (24,)  # 8 draws of 3 timesteps
    assert each.found.min() <= each.pooled <= each.found.max()
    assert each.worst == int(each.found.argmin())
    gm, batches = captured(), examples(lossy())
    expected, found = [], []
    with torch.no_grad():
        for values in batches:
            env = {}

            class Record(torch.fx.Interpreter):
                def run_node(self, node):
                    env[node] = super().run_node(node)  # noqa: B023
                    return env[node]  # noqa: B023

            Record(gm).run(*values)
            expected.append(env[each.part.target])
            found.append(each.part.part(*(env[node] for node in each.part.given))[0])
    # float32 differences of the two ways to sum
    assert each.pooled == pytest.approx(sqnr(torch.cat(expected), torch.cat(found)), abs=1e-4)


@pytest.mark.parametrize("factor", [2.0, 0.5])
@pytest.mark.parametrize("site", ["conv_in", "down2.conv1", "attention.qkv", "up1.skip"])
def test_a_weight_scale_off_by_two_is_broken_and_no_other(sound, site, factor):
    model = copy.deepcopy(lossy())
    spoil(model, site, "weight", factor)
    found = errors(model)
    assert [name for name, each in found.items() if each.broken] == [site]
    assert found[site].weight_ratio == pytest.approx(factor, rel=0.05)
    assert f"its weight is {found[site].weight_ratio:.2g} times the reference's" in (
        found[site].remarks
    )
    others = [name for name in found if name != site]
    assert [figures(found[n]) for n in others] == [figures(sound[n]) for n in others]


@pytest.mark.parametrize("factor", [2.0, 0.5])
@pytest.mark.parametrize("site", ["conv_in", "down2.conv1", "attention.qkv"])
def test_an_input_scale_off_by_two_stands_out(sound, site, factor):
    model = copy.deepcopy(lossy())
    spoil(model, site, "input", factor)
    found = errors(model)
    assert found[site].suspect or found[site].broken
    ratio = found[site].input_ratio / sound[site].input_ratio
    # the median of the layers moves a little with one of them
    assert ratio == pytest.approx(factor, rel=0.1)
    assert not [n for n, each in found.items() if n != site and (each.broken or each.suspect)]


@pytest.mark.parametrize("config", ["best-w4a6", "q-diffusion-w8a8"])
@pytest.mark.parametrize("what", ["weight", "input"])
def test_faults_are_found_in_rewritten_and_in_static_layers(config, what):
    site = "up2.conv1"  # split at its concatenation, and with a branch, in "best"
    model = copy.deepcopy(lossy(config))
    spoil(model, site, what, 2.0)
    found = errors(model)
    assert found[site].broken if what == "weight" else found[site].suspect
    ranks = sorted(found, key=lambda n: -abs(math.log(found[n].input_ratio)))
    assert what == "weight" or ranks[0] == site


def test_a_range_that_clips_everything_is_broken(sound):
    model = copy.deepcopy(lossy())
    spoil(model, "conv_out", "input", 1 / 16)
    found = errors(model)
    assert [name for name, each in found.items() if each.broken] == ["conv_out"]
    assert found["conv_out"].input_excess > 10 > sound["conv_out"].input_excess


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bias_that_is_not_finite_is_broken(value):
    model = copy.deepcopy(lossy())
    model.gm.get_submodule("conv_out").bias[0] = value
    found = errors(model)
    assert [name for name, each in found.items() if each.broken] == ["conv_out"]
    assert found["conv_out"].excess == math.inf


def test_a_part_that_does_not_give_the_layers_value_is_told_apart():
    model = copy.deepcopy(lossy())
    (node,) = [n for n in model.gm.graph.nodes if n.target == "conv_out"]
    with model.gm.graph.inserting_before(node):
        doubled = model.gm.graph.call_function(torch.mul, (node.args[0], 2.0))
    node.args = (doubled, *node.args[1:])
    model.gm.recompile()
    each = errors(model)["conv_out"]
    assert each.pooled < 3 and not each.rebuilt
    assert each.remarks == [
        "no fix can be built: the reference's weight does not give its output here"
    ]


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
    given = [[torch.randn(4, 8), torch.full((4,), int(t)), torch.randn(4, 6)] for t in KEYS]
    for drawn, broken in (((), {"text", "both"}), (("text",), set())):
        found = {e.part.name: e for e in site_errors(gm, model, given, KEYS, drawn=drawn)}
        assert {n for n, e in found.items() if e.broken} >= broken
        assert not drawn or not [n for n in ("text", "both") if found[n].broken]
        assert found["text"].pooled < 3  # clipped all the same
    assert found["text"].note.startswith("it reads a condition drawn at random")
    assert not found["first"].note
    model.get_submodule("text").weight_scale.mul_(2)
    found = {e.part.name: e for e in site_errors(gm, model, given, KEYS, drawn=("text",))}
    assert found["text"].broken and not found["both"].broken


def test_ratios_are_judged_by_the_middle_between_right_and_off_by_two(sound):
    each = sound["conv_out"]
    for ratio, broken in ((OFF * 0.99, False), (OFF * 1.01, True), (1.01 / OFF, False)):
        assert dataclasses.replace(each, weight_ratio=ratio).broken is broken
        assert dataclasses.replace(each, input_ratio=ratio).suspect is broken
    assert dataclasses.replace(each, weight_ratio=math.nan).broken
    assert dataclasses.replace(each, excess=10.1).broken
    assert dataclasses.replace(each, input_excess=10.1).broken
