"""zoo: published sizes, and small models whose every input has an effect."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests import zoo

NAMES = list(zoo.ENTRIES)


def flat(output):
    """Every number of an output, as one row."""
    return torch.cat([leaf.flatten().float() for leaf in tree_leaves(output)])


def run(model, inputs):
    with torch.no_grad():
        return flat(model(**inputs, return_dict=False))


def test_every_configuration_is_used():
    stored = {path.stem for path in zoo.CONFIGS.glob("*.json")}
    assert stored == {entry.config for entry in zoo.ENTRIES.values()}


@pytest.mark.parametrize("name", NAMES)
def test_full_models_have_the_published_size(name):
    model = zoo.model(name, full=True, device="meta")
    assert all(p.is_meta for p in model.parameters())
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    published = zoo.ENTRIES[name].millions
    assert millions == pytest.approx(published, abs=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_full_models_take_the_derived_inputs(name):
    model = zoo.model(name, full=True, device="meta")
    inputs = zoo.inputs(name, model)
    assert all(leaf.is_meta for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    assert run(model, inputs).numel() > 0


@pytest.mark.parametrize("name", NAMES)
def test_small_models_run(name):
    model = zoo.model(name)
    assert not model.training and all(p.any() for p in model.parameters())
    assert 2e5 < sum(p.numel() for p in model.parameters()) < 8e6
    for scale in (1, 2):
        inputs = zoo.inputs(name, model, scale=scale)
        output = run(model, inputs)
        assert output.isfinite().all() and output.std() > 0.01
    half = zoo.model(name, dtype=torch.bfloat16)
    output = run(half, zoo.inputs(name, half))
    assert output.isfinite().all() and output.std() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_timestep_and_conditions_have_an_effect(name):
    model = zoo.model(name)
    inputs = zoo.inputs(name, model)
    before = run(model, inputs)
    (timestep,) = {"timestep", "t"} & set(inputs)
    for path in (timestep, *zoo.ENTRIES[name].conditions):
        changed = zoo.inputs(name, model)
        value = zoo.at(changed, path)
        if value.is_floating_point():
            value.mul_(0.5).add_(0.125)
        else:
            value.copy_((value + 1) % 4)
        assert not torch.equal(run(model, changed), before), path


def test_models_are_repeatable():
    first, second = zoo.model("dit-xl-2"), zoo.model("dit-xl-2")
    random = torch.get_rng_state()
    zoo.model("dit-xl-2")
    assert torch.equal(random, torch.get_rng_state())
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_extra_inputs_have_an_effect():
    model = zoo.model("sd15")
    before = run(model, zoo.inputs("sd15", model))
    for name, same in (("sd15-masked", False), ("sd15-controlled", False), ("sd15-scaled", True)):
        assert torch.equal(run(model, zoo.inputs(name, model)), before) is same, name
