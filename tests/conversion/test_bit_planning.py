"""planning: convert under a budget keeps it, pays, replays, and measures what it says."""

import dataclasses
import functools

import pytest
import torch

from tests.test_api import TIMES, calibrated, data, fast
from tests.toys import ToyUNet, seeded
from tfmq_fx import ConfigError, LayerConfig, ReconstructionSpec, WeightSpec, convert, load, save
from tfmq_fx.conversion.sensitivity import measure
from tfmq_fx.core.layer_config import ActivationSpec
from tfmq_fx.diagnostics.report import report
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.quant.sqnr import sqnr


def nearest(name="w4a8"):
    spec = ReconstructionSpec(rounding="nearest")
    return dataclasses.replace(fast(name, mode="table"), reconstruction=spec)


@functools.cache
def prepared():
    return calibrated(seeded(ToyUNet).eval(), 8, nearest())


@functools.cache
def uniform():
    return convert(prepared(), progress=False)


@functools.cache
def planned(budget):
    return convert(prepared(), budget=budget, progress=False)


def noise(model):
    """Output SQNR in dB over all timesteps."""
    exact = seeded(ToyUNet).eval()
    with torch.no_grad():
        pairs = [(exact(*inputs), model(*inputs)) for inputs in data(8)]
    return sqnr(*(torch.cat(side) for side in zip(*pairs, strict=True)))


def bits(model):
    layers = dict(model.gm.named_modules())
    return {n: m.weight_bits for n, m in layers.items() if isinstance(m, QuantLayer)}


def test_at_the_bytes_of_uniform_bits_it_is_better():
    budget = uniform().nbytes()
    model = planned(budget)
    assert model.nbytes() <= budget and model.bit_plan.bytes == model.nbytes()
    assert noise(model) > noise(uniform()) + 1
    assert len(set(bits(model).values())) > 1
    assert "bits chosen for" in str(report(model))


def test_noises_add_up_to_what_the_model_shows():
    # to 1 dB: noises of layers are nearly independent, and each was measured alone
    model = planned(uniform().nbytes())
    judged = measured_again(model)
    for wanted, found in zip(model.bit_plan.sqnr_by_step, judged, strict=True):
        assert abs(wanted - found) < 1.0


def measured_again(model):
    """Output SQNR in dB at each timestep on the samples that the plan was measured on."""
    given = prepared()
    chunks = given.cache.chunks(64, batched=given.batched(), batch_size=64, seed=0)
    place = given.call.timestep_position
    exact, found = seeded(ToyUNet).eval(), []
    for step in TIMES:
        rows = [[x[chunk[place] == step] for x in chunk] for chunk in chunks]
        with torch.no_grad():
            pairs = [(exact(*each), model(*each)) for each in rows]
        found.append(sqnr(*(torch.cat(side) for side in zip(*pairs, strict=True))))
    return found


def test_a_plan_replays_to_the_same_bits(tmp_path):
    model = planned(uniform().nbytes())
    again = convert(prepared(), bits=model.bit_plan, progress=False)
    left, right = model.gm.state_dict(), again.gm.state_dict()
    assert all(torch.equal(value, right[name]) for name, value in left.items())
    save(model, tmp_path / "model")
    assert str(load(tmp_path / "model").bit_plan) == str(model.bit_plan)


def test_an_edited_plan_is_obeyed():
    plan = planned(uniform().nbytes()).bit_plan
    name = next(iter(plan.sites))
    model = convert(prepared(), bits=plan.with_bits({name: 3}), progress=False)
    assert bits(model)[name] == 3 and model.bit_plan.budget == "edited"


def test_without_a_budget_there_is_no_plan():
    assert uniform().bit_plan is None


def test_overrides_keep_their_bits():
    eight = LayerConfig(weights=WeightSpec(bits=8), activations=ActivationSpec())
    given = calibrated(seeded(ToyUNet).eval(), 8, nearest(), overrides={"*conv1*": eight})
    model = convert(given, budget="0.25x", progress=False)
    pinned = {name: b for name, b in bits(model).items() if "conv1" in name}
    assert pinned and set(pinned.values()) == {8}
    assert not set(pinned) & set(model.bit_plan.sites)


def test_a_budget_of_time_measures_layers():
    model = convert(prepared(), budget="0.9x time", progress=False)
    plan = model.bit_plan
    options = [option for site in plan.sites.values() for option in site.options]
    assert all(option.micros > 0 for option in options) and plan.micros > 0
    assert any(option.bits is None and set(option.noise) == {0.0} for option in options)
    loose = plan.within("100s")
    assert {site.chosen for site in loose.sites.values()} == {None}
    assert not bits(convert(prepared(), bits=loose, progress=False))


def test_what_cannot_be_is_said_before_the_long_work(monkeypatch):
    plan = planned(uniform().nbytes()).bit_plan
    monkeypatch.setattr("tfmq_fx.conversion.bit_planning.measure", lambda *args, **options: 1 / 0)
    with pytest.raises(ConfigError, match=r"budget '0.01x' cannot be met: the least is \d+ bytes"):
        convert(prepared(), budget="0.01x", progress=False)
    with pytest.raises(ConfigError, match="is not understood; give a number of bytes"):
        convert(prepared(), budget="small", progress=False)
    with pytest.raises(ConfigError, match="a budget or bits=, the plan to replay, not both"):
        convert(prepared(), budget="0.3x", bits=plan, progress=False)
    with pytest.raises(ConfigError, match="has no layer with integer weights"):
        convert(calibrated(seeded(ToyUNet).eval(), 8, fast("fp")), budget="0.3x", progress=False)


def test_second_order_rounding_and_checkpoints_go_with_plans(tmp_path):
    config = fast("w4a8", mode="table")
    few = LayerConfig(weights=WeightSpec(bits=4, search=2), activations=ActivationSpec())
    config = dataclasses.replace(config, layers=few)
    given = calibrated(seeded(ToyUNet).eval(), 8, config)
    model = convert(given, budget="0.2x", checkpoint=tmp_path / "kept", progress=False)
    files = {path.name for path in (tmp_path / "kept").iterdir()}
    again = convert(given, budget="0.2x", checkpoint=tmp_path / "kept", progress=False)
    left, right = model.gm.state_dict(), again.gm.state_dict()
    assert all(torch.equal(value, right[name]) for name, value in left.items())
    assert {path.name for path in (tmp_path / "kept").iterdir()} == files
    other = convert(given, budget="0.18x", checkpoint=tmp_path / "kept", progress=False)
    assert other.nbytes() < model.nbytes()  # what was measured serves, what was rounded does not


def test_each_layer_is_tried_alone():
    # the noise of one option is that of the float model with this layer alone quantized
    given, model = prepared(), uniform()
    reference = given.gm
    name = next(n for n, m in model.gm.named_modules() if isinstance(m, QuantLayer))
    layer = model.gm.get_submodule(name)
    chunks = given.cache.chunks(6, batched=given.batched(), batch_size=4, seed=0)
    found = measure(
        model.gm,
        reference=reference,
        names=[name],
        options=lambda site, walk: [layer],
        chunks=chunks,
        timesteps=torch.tensor(TIMES),
    )
    layers = {n: m for n, m in model.gm.named_modules() if isinstance(m, QuantLayer)}
    rest = measure(
        model.gm,
        reference=reference,
        names=list(layers),
        options=lambda site, walk: [layers[site.name]],
        chunks=chunks,
        timesteps=torch.tensor(TIMES),
    )
    assert set(found.noise) == {name} and found.noise[name].shape == (1, len(TIMES))
    assert bool((found.noise[name] > 0).all())
    assert found.rest.gt(found.noise[name][0] / 100).all()  # the other layers are still there
    # nothing else is lossy here: tables are exact (to reassociation at batch sizes above 1)
    assert float(rest.rest.max()) < 1e-10
