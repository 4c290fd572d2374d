"""The default dtype of torch is the user's: what we make is the same under any."""

import dataclasses

import pytest
import torch

from tests.adapters import Denoiser
from tests.toys import seeded
from tfmq_fx import PRESETS, bind_request, calibrate, compile, convert, load, prepare, refresh, save
from tfmq_fx.quant.quant_layer import QuantLayer

STEPS = [0.25, 500.5, 998.25]  # no half precision holds the last two


class Wave(Denoiser):
    """Asks for float32 where the default would count."""

    def forward(self, x, t):
        rates = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float32)
        angles = t[:, None] * rates
        own = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        return self.leave(torch.tanh(self.enter(x) + own))


def short(recipe):
    """The recipe with as few steps of learning as show what learning makes."""
    config = PRESETS[recipe]
    temporal = dataclasses.replace(config.temporal, tiar_iters=min(2, config.temporal.tiar_iters))
    spec = config.reconstruction
    learning = dataclasses.replace(spec, iters=min(2, spec.iters))
    return dataclasses.replace(config, temporal=temporal, reconstruction=learning)


def made(source, recipe, folder):
    """Keys, scales and outputs along the whole way."""
    draw = torch.Generator().manual_seed(0)
    data = [
        (
            torch.randn(4, 4, dtype=torch.float32, generator=draw),
            torch.full((4,), step, dtype=torch.float32),
        )
        for step in STEPS
    ]
    x = data[1][0]
    prepared = prepare(source, data[1], config=recipe)  # timesteps: those that calibration visits
    model = convert(calibrate(prepared, data, progress=False), progress=False)
    given = convert(
        calibrate(prepare(source, data[1], config=recipe, timesteps=STEPS), data, progress=False),
        progress=False,
    )
    save(model, folder, calibration=True)
    loaded = load(folder)
    fresh = refresh(loaded, source, timesteps=[*STEPS, 3.5], progress=False)
    bound = bind_request(loaded, STEPS)
    found = [model, given, loaded, fresh, bound, compile(model, "eager")]
    with torch.no_grad():
        outputs = [each(x, 500.5) for each in found]
    layers = [m for each in (model, fresh) for m in each.gm.modules() if isinstance(m, QuantLayer)]
    kept = [buffer for layer in layers for buffer in layer.buffers()]
    scales = [b for _, b in fresh.gm.named_buffers(recurse=False)]
    return [*(each.timesteps for each in found[:4]), *outputs, *kept, *scales]


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic"])
def test_everything_is_the_same_under_any_default(recipe, tmp_path):
    source = seeded(Wave).eval()
    config = short(recipe)
    expected = made(source, config, tmp_path / "float32")
    assert expected[0].tolist() == STEPS and expected[0].dtype == torch.float64
    for default in (torch.bfloat16, torch.float16, torch.float64):
        torch.set_default_dtype(default)
        try:
            found = made(source, config, tmp_path / str(default))
        finally:
            torch.set_default_dtype(torch.float32)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), default
