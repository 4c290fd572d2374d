"""analysis: what could be done is told without doing it, on the meta device too."""

import json

import pytest
import torch

from tests.toys import ToyDiT, ToyUNet, cifar10_unet, seeded, tiny_unet2d
from tfmq_fx import ConfigError, analyze, fold_timesteps


@pytest.fixture(scope="module")
def found():
    return analyze(tiny_unet2d(), steps=20)


def test_parameters_are_divided_among_binding_times(found):
    data, model = found.data, tiny_unet2d()
    assert data["model"] == "UNet2DModel"
    assert data["parameters"] == sum(p.numel() for p in model.parameters())
    assert sum(row["parameters"] for row in data["bindings"].values()) == data["parameters"]
    layers = ("time_embedding", "time_emb_proj")
    named = model.named_parameters()
    temporal = sum(p.numel() for n, p in named if any(part in n for part in layers))
    assert data["bindings"]["t"]["parameters"] == data["block"]["parameters"] == temporal
    assert data["block"]["weight_bytes"] == 4 * temporal
    assert data["bindings"]["c"]["parameters"] == data["bindings"]["(t, c)"]["parameters"] == 0


def test_row_bytes_are_those_of_the_table_that_folding_makes(found):
    folded = fold_timesteps(tiny_unet2d(), 20)
    assert found.data["steps"] * found.data["block"]["row_bytes"] == folded.gm.temporal_table.nbytes


def test_it_works_on_the_meta_device(found):
    meta = analyze(tiny_unet2d().to("meta"), steps=20).data
    for key in ("model", "parameters", "nodes", "bindings", "block", "steps"):
        assert meta[key] == found.data[key], key


def test_large_models_are_analysed_without_memory():
    with torch.device("meta"):
        model = cifar10_unet(divide=1)
    data = analyze(model).data
    assert data["parameters"] == 35_746_307  # google/ddpm-cifar10-32
    assert data["bindings"]["t"]["parameters"] > 1_000_000


def test_the_text_and_the_data_can_be_kept(found):
    json.dumps(found.data)
    text = str(found)
    assert "binding time      nodes   parameters   share" in text
    assert f"{found.data['parameters']:,} parameters" in text
    for name, shape, _ in found.data["block"]["features"]:
        assert f"  {name} {tuple(shape)}" in text
    assert "for 20 steps in place of" in text


def test_conditions_have_a_binding_time_of_their_own():
    model = seeded(ToyDiT).eval()
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 4]))
    given = analyze(model, inputs, conditions=["y"]).data
    left_out = analyze(model, inputs).data
    assert given["bindings"]["c"]["parameters"] == model.label.weight.numel()
    assert given["bindings"]["(t, c)"]["parameters"] > 0
    assert left_out["bindings"]["c"]["parameters"] == 0
    total = [sum(r["parameters"] for r in d["bindings"].values()) for d in (given, left_out)]
    assert total[0] == total[1] == sum(p.numel() for p in model.parameters())


def test_nothing_is_changed_or_computed():
    model = seeded(ToyUNet)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    analyze(model, (torch.randn(2, 3, 8, 8, generator=torch.Generator()), torch.tensor([1, 2])))
    assert model.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_inputs_in_doubt_are_refused():
    with pytest.raises(ConfigError, match="example_inputs cannot be derived for ToyUNet"):
        analyze(seeded(ToyUNet))
    with pytest.raises(ConfigError, match="no input named 'tau'"):
        analyze(tiny_unet2d(), timestep="tau")
