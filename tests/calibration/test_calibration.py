"""calibration: what it saw reaches conversion, in batches that the model takes."""

import dataclasses

import pytest
import torch

import tfmq_fx
from tests.test_entry_points import Net
from tfmq_fx import CalibrationError, Config, ConfigError, LayerConfig, TemporalSpec, WeightSpec
from tfmq_fx.core.config import ReconstructionSpec
from tfmq_fx.core.layer_config import ActivationSpec
from tfmq_fx.core.presets import resolve
from tfmq_fx.diagnostics.feature_errors import temporal_errors

STEPS = (5, 9, 30)


def prepared_for(batch, config, **options):
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(batch, 2, 4, 4)
    inputs = (x, torch.full((batch,), 9))
    return net, x, tfmq_fx.prepare(net, inputs, timesteps=STEPS, config=config, **options)


def short(name):
    """A recipe with two steps of learning."""
    recipe = resolve(name)
    spec = dataclasses.replace(recipe.reconstruction, iters=min(2, recipe.reconstruction.iters))
    temporal = dataclasses.replace(recipe.temporal, mode="tib", tiar_iters=2)
    return dataclasses.replace(recipe, reconstruction=spec, temporal=temporal)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["w8a8", "best-w4a6", "ptqd-w4a8"])
def test_a_model_of_one_batch_size_is_only_called_at_that(batch, name):
    net, x, prepared = prepared_for(batch, short(name), dynamic=())
    assert prepared.fixed_batch == batch
    sizes = []
    prepared.observed.register_forward_hook(lambda *a: sizes.append(len(a[1][0])))
    for step in STEPS:
        prepared(x, step)
    model = tfmq_fx.convert(prepared, progress=False)
    assert set(sizes) == {batch}
    with torch.no_grad():
        for step in STEPS:
            expected, found = net(x, torch.full((batch,), step)), model(x, step)
            assert found.shape == expected.shape
            # 4-bit weights of three small layers: about 25 dB
            assert float((found - expected).norm() / expected.norm()) < 0.2


class Steps:
    """As much of a scheduler as sampling needs."""

    init_noise_sigma = 1.0

    def set_timesteps(self, count, device=None):
        self.timesteps = torch.tensor(STEPS[::-1])

    def scale_model_input(self, sample, timestep=None):
        return sample

    def step(self, output, t, sample, **_):
        return (sample - 0.1 * output,)


def test_sampling_takes_the_one_batch_size_or_says_which():
    _, _, prepared = prepared_for(3, "w8a8", dynamic=())
    tfmq_fx.calibrate(prepared, (Steps(), (2, 4, 4)), num_inference_steps=3, progress=False)
    assert prepared.cache.visits == dict.fromkeys(STEPS[::-1], 66)  # 64, up to whole batches
    for wrong in ({"batch_size": 2}, {"samples": 4}):
        with pytest.raises(ConfigError, match=r"batches of 3 alone: .* batch_size=3 and samples a"):
            tfmq_fx.calibrate(prepared, (Steps(), (2, 4, 4)), progress=False, **wrong)


@pytest.mark.parametrize("iters", [0, 3])
def test_the_report_tells_the_temporal_error_of_what_ships(iters):
    """Later passes round the block anew where it is not learnt as a whole."""
    weights = WeightSpec(bits=3)
    recipe = Config(
        layers=LayerConfig(weights=weights, activations=ActivationSpec()),
        temporal=TemporalSpec(mode="tib", tiar_iters=0),
        reconstruction=ReconstructionSpec(iters=iters, learning_rate=0.1),
    )
    _, x, prepared = prepared_for(4, recipe)
    for step in STEPS:
        prepared(x, step)
    model = tfmq_fx.convert(prepared, progress=False)
    names, errors = temporal_errors(prepared.gm, model.gm, model.timesteps)
    assert names
    for name, expected in zip(names, errors.mean(1).tolist(), strict=True):
        found = model.record["temporal"]["features"][name]
        assert found["error"] == pytest.approx(expected, rel=1e-5)  # sums in another order
        weighed = found["candidates"]["tib"]["error"]
        assert weighed != found["error"]
        line = (
            f"{name}: tib (error {found['error']:.2g} after later passes, chosen at {weighed:.2g}"
        )
        assert line in str(tfmq_fx.report(model))


def test_the_report_says_where_calibration_gave_fewer_samples_than_the_recipe_takes():
    _, x, prepared = prepared_for(4, "w4a8")
    for step in STEPS:
        prepared(x, step)
    text = str(tfmq_fx.report(tfmq_fx.convert(prepared, progress=False)))
    assert "calibration gave 12 samples, where the recipe takes up to 640" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", ["w8a8", "w4a8", "best-w4a6"])
def test_numbers_that_are_none_name_the_layer(value, config):
    _, x, prepared = prepared_for(2, config)
    x[1, 0, 0, 0] = value
    with pytest.raises(CalibrationError, match="the input of a holds NaN or Inf at timestep 9"):
        tfmq_fx.calibrate(prepared, [(x, 9)], progress=False)


def test_settings_that_the_source_brings_are_refused_even_at_their_usual_values():
    _, x, prepared = prepared_for(2, "w8a8")
    for name, usual in {
        "num_inference_steps": 50,
        "samples": 64,
        "batch_size": 32,
        "seed": 0,
    }.items():
        with pytest.raises(ConfigError, match=f"leave out {name}={usual}: an iterable brings"):
            tfmq_fx.calibrate(prepared, [(x, 9)], progress=False, **{name: usual})
    assert not prepared.cache.visits
    tfmq_fx.calibrate(prepared, [(x, 9)], progress=False)
    assert prepared.cache.visits == {9: 2}
