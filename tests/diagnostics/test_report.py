"""report: what was done, layer by layer and feature by feature, as data and as text."""

import json

import pytest
import torch
from torch import nn

from tests import toys
from tests.capture.test_export_route import Scripted
from tests.passes.test_merge_duplicates import Repeats
from tests.test_api import TIMES, calibrated, data, fast
from tests.toys import ToyUNet, seeded
from tfmq_fx import ConfigError, LayerConfig, compile, convert, fold_timesteps, prepare, report
from tfmq_fx.conversion.records import pass_record
from tfmq_fx.diagnostics.report import Report
from tfmq_fx.ir.graph_pass import Declined, Rewrite
from tfmq_fx.quant.quant_layer import QuantLayer


@pytest.fixture(scope="module")
def toy():
    return seeded(ToyUNet).eval()


@pytest.fixture(scope="module")
def model(toy):
    overrides = {"smooth": LayerConfig()}
    return convert(calibrated(toy, 8, fast("w4a8"), overrides=overrides), progress=False)


def test_data_is_json_ready_and_complete(model):
    facts = report(model).data
    assert json.loads(json.dumps(facts)) == facts
    assert facts["recipe"] == "w4a8" and facts["timesteps"] == "3 from 0 to 999"
    assert facts["bytes"] == model.nbytes() < facts["float_bytes"]
    assert facts["capture"]["nodes"] > 0 and facts["declined"] == []


def test_every_layer_is_listed_as_it_is(model):
    sites = report(model).data["sites"]
    layers = {n: m for n, m in model.gm.named_modules() if isinstance(m, QuantLayer)}
    assert set(sites) == {*layers, "smooth"}
    for name, layer in layers.items():
        site = sites[name]
        assert site["kind"] == type(layer).__name__
        assert (site["weight_bits"], site["act_bits"]) == (layer.weight_bits, layer.act_bits)
        assert site["ranges"] == "per timestep" and site["interpolated"] == 0
        assert site["bytes"] == sum(b.nbytes for b in layer.buffers())
        assert site["weights"] == layer.weight.numel()
    assert sites["smooth"] == {
        "kind": "Conv2d",
        "weights": 16 * 16 * 9,
        "weight_bits": None,
        "weight_format": "float",
        "weight_groups": 1,
        "act_bits": None,
        "act_format": "float",
        "reference_only": None,
        "ranges": "none",
        "interpolated": 0,
        "bytes": 4 * (16 * 16 * 9 + 16),
    }


def test_coverage_is_by_weights_and_by_layers(model):
    facts = report(model)
    sites = facts.data["sites"].values()
    total = sum(s["weights"] for s in sites)
    assert facts.weight_coverage == pytest.approx(1 - 16 * 16 * 9 / total, abs=1e-12)
    assert facts.activation_coverage == (len(sites) - 1) / len(sites)
    empty = Report({"sites": {}})
    assert empty.weight_coverage == empty.activation_coverage == 0.0


def test_the_text_says_what_the_data_holds(model):
    facts = report(model)
    text, lines = str(facts), str(facts).splitlines()
    assert lines[0].startswith("recipe w4a8: ") and "x smaller)" in lines[0]
    assert "timesteps: 3 from 0 to 999" in lines
    share = f"{100 * facts.weight_coverage:.1f} % of weights"
    assert any(share in line and line.startswith("coverage: ") for line in lines)
    for name in facts.data["sites"]:
        assert f"  {name}: " in text
    assert "  smooth: Conv2d float / float / none / " in text
    assert "  conv_in: QuantConv2d 8 / 16 / per timestep / " in text
    for name, feature in facts.data["temporal"]["features"].items():
        assert f"  {name}: {feature['chosen']} (error " in text
    for done in facts.data["passes"]:
        assert f"  {done['name']}: {done['changed']} changed" in text


def test_what_is_left_alone_is_told_with_the_reason():
    class Resized(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Conv2d(3, 4, 1)
            self.leave = nn.ConvTranspose2d(4, 3, 1)

        def forward(self, x, t):
            return self.leave(self.enter(x) * t[:, None, None, None], output_size=x.shape[2:])

    prepared = prepare(seeded(Resized).eval(), data(8)[0], timesteps=TIMES, config="fp")
    facts = report(convert(prepared, progress=False))
    assert facts.data["declined"] == [["leave", "it is called with an output size"]]
    assert "  left in floating point: leave: it is called with an output size" in str(facts)


def test_an_exact_model_is_reported_too(toy):
    folded = fold_timesteps(toy, [0.5, 0.25], (torch.randn(2, 3, 8, 8), torch.rand(2)))
    facts = report(folded)
    assert facts.weight_coverage == facts.activation_coverage == 0.0
    assert facts.data["timesteps"] == "2 from 0.25 to 0.5"
    changed = {p["name"]: p["changed"] for p in facts.data["passes"]}
    assert changed == {"fold_timesteps": 6, "quantize_layers": 0}
    assert "6 features" in str(facts) and "(shared: time_mlp.0, time_mlp.2" in str(facts)


def test_a_compiled_model_has_the_report_of_its_converted_one(model):
    assert report(compile(model, "eager")).data["sites"] == report(model).data["sites"]


def test_other_models_are_refused(toy):
    prepared = prepare(toy, data(8)[0])
    for wrong in (toy, prepared):
        kind = type(wrong).__name__
        with pytest.raises(ConfigError, match=rf"report\(\) takes a converted model, not a {kind}"):
            report(wrong)


def test_passes_are_recorded_with_what_they_declined():
    gm = torch.fx.symbolic_trace(nn.Identity())
    rewrite = Rewrite(gm, 2, [Declined("a.b", "too wide")], {"x": 1}, name="round", seconds=1.23456)
    assert pass_record(rewrite) == {
        "name": "round",
        "changed": 2,
        "seconds": 1.235,
        "declined": [["a.b", "too wide"]],
        "details": {"x": 1},
    }


def test_the_route_and_merged_layers_are_told():
    exported = toys.seeded(Scripted).eval()
    text = str(report(fold_timesteps(exported, 3, (torch.randn(2, 4), torch.tensor([0, 1])))))
    assert "captured by export in" in text
    assert "\n  captured by torch.export, since the model (test_export_route.py:" in text
    repeats = Repeats().eval()
    text = str(report(fold_timesteps(repeats, 3, (torch.randn(2, 8), torch.tensor([0, 1])))))
    assert "merged with equal ones: 6 layers (embeds.1.0 with embeds.0.0, ...)" in text
