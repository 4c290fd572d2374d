"""Every recipe converts on the device, learning and measuring included."""

import copy

import pytest
import torch

from tests.conversion.test_recipes import short
from tests.gpu.models import DEVICE
from tests.test_api import TIMES, data
from tests.toys import ToyUNet, seeded
from tfmq_fx import PRESETS, calibrate, convert, fold_timesteps, prepare, refresh, report, verify
from tfmq_fx.core.presets import RECIPES, resolve
from tfmq_fx.quant.sqnr import sqnr

# Those that sample again need a scheduler; their parts are in the others.
NAMES = [name for name in PRESETS if not resolve(name).reconstruction.rounds and name != "fp"]
NAMES += [f"{name}-w4a6" for name in RECIPES if not resolve(name).reconstruction.rounds]


def made(device, name):
    """The toy on a device, and converted there."""
    model = seeded(ToyUNet).eval().to(device)
    batches = [tuple(v.to(device) for v in pair) for seed in (0, 1) for pair in data(8, seed=seed)]
    prepared = prepare(model, batches[0], timesteps=TIMES, config=short(resolve(name)))
    calibrate(prepared, batches, progress=False)
    return model, convert(prepared, progress=False)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_as_good_as_on_the_cpu(name):
    model, done = made(DEVICE, name)
    _, there = made("cpu", name)
    assert {t.device.type for t in done.tensors()} == {DEVICE}
    assert report(done).weight_coverage == report(there).weight_coverage
    assert report(done).activation_coverage == report(there).activation_coverage
    wanted, here, reference = [], [], []
    for x, t in data(8, seed=5):
        given = x.to(DEVICE), t.to(DEVICE)
        wanted.append(model(*given).cpu())
        here.append(done(*given).cpu())
        reference.append(there(x, t))
    wanted, here, reference = (torch.cat(parts) for parts in (wanted, here, reference))
    # Learnt roundings part where sums of floats do: as good, not the same.
    assert sqnr(wanted, here) >= sqnr(wanted, reference) - 2


@pytest.mark.parametrize("name", ["w4a8", "fp8"])
def test_refreshing_gives_the_same_bits(name):
    model, done = made(DEVICE, name)
    again = refresh(done, model, progress=False)
    before, after = done.gm.state_dict(), again.gm.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_refreshing_follows_other_weights_and_timesteps():
    model, done = made(DEVICE, "w8a8")
    old = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.mul_(1.05)
    new = refresh(done, model, progress=False)
    assert {t.device.type for t in new.tensors()} == {DEVICE}
    x, t = (value.to(DEVICE) for value in data(8, seed=6)[1])
    assert sqnr(model(x, t), new(x, t)) > sqnr(model(x, t), old(x, t)) + 3
    more = refresh(new, model, timesteps=[0, 250, 500, 999], progress=False)
    assert sqnr(model(x, t), more(x, t)) > sqnr(model(x, t), old(x, t)) + 3
    assert bool(more(x, torch.full_like(t, 500)).isfinite().all())


def test_verification_runs_on_the_device():
    model, done = made(DEVICE, "w8a8")
    found = verify(model, done)
    assert found.ok and not found.exact and 20 < found.pooled < 60, str(found)
    assert set(found.steps) == set(TIMES)
    folded = fold_timesteps(model, TIMES, tuple(v.to(DEVICE) for v in data(8)[0]))
    proved = verify(model, folded)
    assert proved.exact and proved.equal and proved.ok, str(proved)
