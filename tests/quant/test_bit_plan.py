"""bit_plan: a plan adds up, prints, is edited, kept and solved again; and says what cannot be."""

import json
import math
import os

import pytest

from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.layer_config import ActivationSpec, LayerConfig, WeightSpec
from tfmq_fx.quant.bit_plan import BitPlan, Option, SiteBits

NAN = math.nan


def site(weights, loud, *, timed=False):
    """A layer whose noise falls by 4 with each bit, at the first of two steps; the other is not
    seen."""
    options = [
        Option(bits, weights * bits // 8, 1.0 * timed, (loud * 4.0 ** (2 - bits), NAN))
        for bits in (2, 4, 8)
    ]
    if timed:
        options.append(Option(None, weights * 4, 3.0, (0.0, NAN)))
    return SiteBits(weights, tuple(options), 4)


def plan(*, timed=False):
    sites = {"a.conv": site(800, 0.1, timed=timed), "b.conv": site(800, 1e-4, timed=timed)}
    return BitPlan((5.0, 9.0), sites, (1e-5, NAN), 100, 10_000, "the recipe")


def bits(given):
    return {name: site.chosen for name, site in given.sites.items()}


def test_it_adds_up():
    p = plan(timed=True)
    assert p.bytes == 100 + 2 * 400 and p.micros == 2.0
    wanted = -10 * math.log10(1e-5 + 0.1 / 16 + 1e-4 / 16)
    assert p.sqnr_by_step[0] == pytest.approx(wanted) and math.isnan(p.sqnr_by_step[1])
    assert p.sqnr == pytest.approx(wanted)


def test_bits_go_where_the_noise_is():
    p = plan().within(100 + 800 + 200)
    assert bits(p) == {"a.conv": 8, "b.conv": 2} and p.bytes == 1100
    assert bits(p.within("0.17x")) == {"a.conv": 8, "b.conv": 8}
    assert bits(p.within(500)) == {"a.conv": 2, "b.conv": 2}
    assert bits(plan()) == {"a.conv": 4, "b.conv": 4}  # a value: never changed


def test_time_leaves_what_it_can_in_floating_point():
    p = plan(timed=True)
    assert bits(p.within("6us")) == {"a.conv": None, "b.conv": None}
    assert bits(p.within("4us")) == {"a.conv": None, "b.conv": 8}
    assert bits(p.within("0.34x time")) == {"a.conv": 8, "b.conv": 8}
    assert bits(p.within(("6us", 1300))) == {"a.conv": 8, "b.conv": 4}


def test_what_cannot_be_met_says_the_least_that_can():
    with pytest.raises(
        ConfigError, match=r"'0.04x' cannot be met: the least is 500 bytes \(0.050x"
    ):
        plan().within("0.04x")
    with pytest.raises(ConfigError, match=r"the least time is 0.002 ms \(0.333x time\)"):
        plan(timed=True).within("1us")
    with pytest.raises(ConfigError, match="were not timed"):
        plan().within("1us")


def test_editing():
    p = plan().with_bits({"*": 2, "b.*": 8})
    assert bits(p) == {"a.conv": 2, "b.conv": 8} and p.budget == "edited"
    with pytest.raises(ConfigError, match=r"'c.\*' matches no planned layer; they are a.conv, b.c"):
        p.with_bits({"c.*": 4})
    with pytest.raises(ConfigError, match=r"a.conv: 3 bits was not measured; choose among 2 bits"):
        p.with_bits({"a.conv": 3})
    with pytest.raises(ConfigError, match="float was not measured"):
        p.with_bits({"a.conv": None})


def test_it_reads_as_a_table():
    text = str(plan(timed=True).with_bits({"a.conv": None}))
    assert "bit plan for edited: 3700 bytes (0.370x of floating point)" in text
    assert "50.0 % 4 bits, 50.0 % float" in text and "planned layers: 0.004 ms a call" in text
    assert "  b.conv: 800, 4 bits (2 40.0, 4 52.0, 8 76.1, float exact)" in text


def test_it_is_kept_on_disk(tmp_path):
    p = plan(timed=True).within("4us")
    p.save(tmp_path / "plan.json")
    again = BitPlan.load(tmp_path / "plan.json")
    assert str(again) == str(p) and bits(again.within("6us")) == bits(p.within("6us"))
    data = json.loads((tmp_path / "plan.json").read_text())
    data["sites"]["a.conv"]["chosen"] = 2  # by hand
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert bits(BitPlan.load(tmp_path / "plan.json"))["a.conv"] == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sites": {"a": {}}}', None])
def test_what_is_no_plan(tmp_path, text):
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ConfigError, match="no bit plan"):
        BitPlan.load(tmp_path / "plan.json")


def test_a_choice_that_was_not_measured_is_no_plan():
    data = plan().to_dict()
    data["sites"]["a.conv"]["chosen"] = 7
    with pytest.raises(ConfigError, match="no bit plan"):
        BitPlan.from_dict(data)


def test_layers_of_the_recipe_get_its_bits():
    eight = LayerConfig(weights=WeightSpec(bits=8), activations=ActivationSpec(bits=6))
    made = (
        plan(timed=True)
        .with_bits({"b.conv": None})
        .layers({"a.conv": eight, "b.conv": eight, "c": eight})
    )
    assert made["a.conv"].weights.bits == 4 and made["a.conv"].activations == eight.activations
    assert made["b.conv"] == LayerConfig() and made["c"] == eight
    with pytest.raises(ConfigError, match=r"of another model or recipe: it has a layer 'b\.conv'"):
        plan().layers({"a.conv": eight})
    with pytest.raises(ConfigError, match=r"quantizes 'a\.conv', which this recipe does not"):
        plan().layers({"a.conv": LayerConfig(), "b.conv": eight})


@pytest.mark.parametrize(
    "change",
    [
        {"sites": {"a": {"weights": 1, "options": [], "chosen": 8}}},
        {"sites": {"a": {"weights": "x", "options": [], "chosen": None}}},
        {"rest": [0.1, 0.2], "sites": {"a": {"weights": 1, "chosen": 8, "options": [
            {"bits": 8, "bytes": 1, "micros": 0, "noise": []}]}}},
        {"rest": [0.1], "sites": {"a": {"weights": 1, "chosen": 8, "options": [
            {"bits": 8, "bytes": 1, "micros": 0, "noise": [-(10**9)]}]}}},
        {"timesteps": ["a"]},
        {"fixed_bytes": None},
    ],
)  # fmt: skip
def test_damaged_plans_are_named(change):
    whole = {"timesteps": [1], "sites": {}, "rest": [0.1], "fixed_bytes": 1, "float_bytes": 1}
    BitPlan.from_dict({**whole, "budget": "x"})
    with pytest.raises(ConfigError, match="this is no bit plan"):
        BitPlan.from_dict({**whole, "budget": "x", **change})


def test_a_pipe_is_no_plan(tmp_path):
    os.mkfifo(tmp_path / "plan.json")
    with pytest.raises(ConfigError, match=r"no bit plan that can be read: .*is a pipe"):
        BitPlan.load(tmp_path / "plan.json")
