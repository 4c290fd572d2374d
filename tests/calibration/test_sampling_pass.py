"""pipelines: example inputs, the timestep among them, finite sets, and denoisers put in place."""

import types

import pytest
import torch
from torch import nn

from tests.toys import tiny_unet2d
from tfmq_fx.calibration.sampling_pass import sampling_pass, takes_batch_size, with_denoiser
from tfmq_fx.capture.inputs import find_timestep, named_inputs
from tfmq_fx.capture.model_checks import forward_parameters
from tfmq_fx.core.errors import ConfigError


class Takes(nn.Module):
    def __init__(self, **config):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        if config:
            self.config = types.SimpleNamespace(**config)

    def forward(self, sample, timestep, *, scale=1.0, **more):
        return sample


def test_parameters_that_can_be_named():
    assert forward_parameters(Takes()) == ["sample", "timestep", "scale"]


def test_given_inputs_are_named():
    x, t = torch.zeros(2, 2), torch.zeros(2)
    model = Takes()
    for given in ((x, t), [x, t], {"sample": x, "timestep": t}):
        found = named_inputs(model, given)
        assert list(found) == ["sample", "timestep"]
        assert found["sample"] is x and found["timestep"] is t
    mapping = {"sample": x}
    assert named_inputs(model, mapping) is not mapping


@pytest.mark.parametrize("size, shape", [(16, (2, 3, 16, 16)), ((8, 12), (2, 3, 8, 12))])
def test_inputs_are_derived_from_a_config(size, shape):
    found = named_inputs(Takes(in_channels=3, sample_size=size), None)
    assert found["sample"].shape == shape and found["timestep"].tolist() == [1, 1]
    again = named_inputs(Takes(in_channels=3, sample_size=size), None)
    assert torch.equal(found["sample"], again["sample"])


def test_derived_inputs_follow_the_model():
    assert named_inputs(tiny_unet2d().half(), None)["sample"].dtype == torch.float16
    assert named_inputs(tiny_unet2d().to("meta"), None)["sample"].is_meta
    model = tiny_unet2d()
    random = torch.get_rng_state()
    named_inputs(model, None)
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(
    "model, given, message",
    [
        (Takes(), None, "derived for Takes: neither its config nor a rule says what 'sample' is"),
        (Takes(in_channels=3), None, "Pass example_inputs="),
        (nn.Linear(2, 2), None, "cannot be derived for Linear"),
        (Takes(), torch.zeros(2), "must be a tuple or a dict, not one tensor"),
        (Takes(), 3, "must be a tuple or a dict, not int"),
        (Takes(), (1, 2, 3, 4), r"4 example_inputs given, but Takes.forward takes 3: sample, time"),
        (lambda x: x, (1,), "the model must be a torch.nn.Module, got function"),
    ],
)
def test_inputs_that_cannot_be_used_are_refused(model, given, message):
    with pytest.raises(ConfigError, match=message):
        named_inputs(model, given)


@pytest.mark.parametrize(
    "inputs, name, expected",
    [
        ({"x": torch.zeros(2, 3), "t": torch.zeros(2)}, None, "t"),
        ({"x": torch.zeros(2, 3), "time_cond": torch.zeros(2)}, None, "time_cond"),
        ({"x": torch.zeros(2, 3), "noise": 0.5}, None, "noise"),
        ({"x": torch.zeros(2, 3), "sigma": torch.zeros(())}, None, "sigma"),
        ({"x": torch.zeros(2, 3), "flag": True, "sigma": torch.zeros(2)}, None, "sigma"),
        ({"t": torch.zeros(2), "timestep": torch.zeros(2)}, "t", "t"),
        ({"x": torch.zeros(2), "y": torch.zeros(2)}, "y", "y"),
    ],
)
def test_the_timestep_is_found_by_name_or_by_form(inputs, name, expected):
    assert find_timestep(inputs, name) == expected


@pytest.mark.parametrize(
    "inputs, name, message",
    [
        ({"x": 1, "t": 2, "timestep": 3}, None, "candidates are t, timestep. Pass timestep=<name>"),
        ({"a": torch.zeros(2), "b": 1.0}, None, "candidates are a, b"),
        ({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, None, "candidates are a, b"),
        ({"x": 1, "t": 2}, "tau", "no input named 'tau'; the example inputs are x, t"),
    ],
)
def test_candidates_in_doubt_are_listed(inputs, name, message):
    with pytest.raises(ConfigError, match=message):
        find_timestep(inputs, name)


class Pipeline:
    def __init__(self, unet, scheduler, checked=True):
        self.components = {"unet": unet, "scheduler": scheduler}
        self.config = {"unet": "a class", "checked": checked}

    def __call__(self, prompt, steps=3):
        return prompt


def test_a_pipeline_is_copied_with_another_denoiser():
    unet, other = nn.Linear(1, 1), nn.Linear(1, 1)
    pipeline = Pipeline(unet, "scheduler")
    found = with_denoiser(pipeline, unet, other)
    assert type(found) is Pipeline
    assert found.components == {"unet": other, "scheduler": "scheduler"}
    assert pipeline.components["unet"] is unet
    with pytest.raises(ConfigError, match=r"component of this Pipeline \(components: unet, sched"):
        with_denoiser(pipeline, other, unet)


def test_the_copy_has_the_settings_and_a_scheduler_of_its_own():
    unet, scheduler = nn.Linear(1, 1), types.SimpleNamespace(timesteps=[3])
    pipeline = Pipeline(unet, scheduler, checked=False)
    found = with_denoiser(pipeline, unet, nn.Linear(1, 1))
    assert found.config["checked"] is False
    found.components["scheduler"].timesteps.append(4)
    assert pipeline.components["scheduler"] is scheduler and scheduler.timesteps == [3]


def test_pipelines_that_are_told_how_many_samples_to_draw():
    class Unconditional(Pipeline):
        def __call__(self, batch_size=1):
            return batch_size

    assert takes_batch_size(Unconditional(None, None)) and not takes_batch_size(Pipeline(1, 2))


def test_each_batch_has_random_numbers_of_its_own():
    drawn = []

    class Noisy(Pipeline):
        def set_progress_bar_config(self, **options):
            pass

        def __call__(self, batch_size, num_inference_steps, generator):
            drawn.append(torch.rand(batch_size, generator=generator).tolist())

    unet = nn.Linear(1, 1)
    pipeline = Noisy(unet, "scheduler")

    def found(seed, samples):
        drawn.clear()
        settings = {"num_inference_steps": 1, "samples": samples, "batch_size": 2, "seed": seed}
        sampling = sampling_pass(pipeline, (), {}, original=unet, settings=settings, progress=False)
        sampling.run(nn.Linear(1, 1))
        return [*drawn]

    first, *others = found(3, 5)
    assert first == torch.rand(2, generator=torch.Generator().manual_seed(3)).tolist()
    assert [len(each) for each in others] == [2, 1] and first[0] != others[0][0] != others[1][0]
    assert found(3, 4) == [first, others[0]] and found(4, 5)[0] not in (first, *others)
