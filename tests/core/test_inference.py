"""inference: what is called in inference mode, or made there, is prepared and learnt like any."""

import copy

import pytest
import torch

import tfmq_fx
from tests.test_entry_points import Net
from tfmq_fx.core.inference import ordinary, outside_inference_mode


def made():
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(2, 2, 4, 4), torch.tensor([9, 5]))


def converted(net, inputs, config):
    prepared = tfmq_fx.prepare(net, inputs, timesteps=[5, 9], config=config)
    for step in (5, 9):
        prepared(inputs[0], step)
    return tfmq_fx.convert(prepared, progress=False)


@pytest.fixture(scope="module")
def recipe():
    """Second-order rounding, and a few steps of learning for blocks and the temporal block."""
    return tfmq_fx.Config(
        layers=tfmq_fx.LayerConfig(weights=tfmq_fx.WeightSpec(bits=4)),
        temporal=tfmq_fx.TemporalSpec(mode="tib", tiar_iters=2),
        reconstruction=tfmq_fx.ReconstructionSpec(iters=2),
    )


def test_inside_made_there_and_neither_give_the_same_model(recipe, tmp_path):
    expected = converted(*made(), recipe).state_dict()
    with torch.inference_mode():
        net, inputs = made()
        inside = converted(net, inputs, recipe)
    outside = converted(net, inputs, recipe)
    for found in (inside, outside):
        state = found.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in state.items())
        assert not any(value.is_inference() for value in state.values())
    assert all(value.is_inference() for value in net.parameters())  # it stays as it was
    with torch.inference_mode():
        tfmq_fx.save(inside, tmp_path / "a")
        loaded = tfmq_fx.load(tmp_path / "a")
        answers = [model(inputs[0], 9) for model in (inside, loaded, copy.deepcopy(outside))]
    assert all(torch.equal(answers[0], other) for other in answers)


def test_the_mode_of_the_caller_stays():
    seen = []

    @outside_inference_mode
    def look():
        seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    with torch.inference_mode():
        look()
        assert torch.is_inference_mode_enabled()
    with torch.no_grad():
        look()
        assert not torch.is_grad_enabled()
    assert seen == [(False, True), (False, False)]


def test_a_tensor_made_there_is_copied_and_others_are_not():
    with torch.inference_mode():
        there = torch.ones(2)
    here = torch.ones(2, requires_grad=True)
    assert not ordinary(there).is_inference() and torch.equal(ordinary(there), there)
    assert ordinary(here).data_ptr() == here.data_ptr() and not ordinary(here).requires_grad
