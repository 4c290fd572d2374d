"""layer_times: what a trial measured is added up over calls; what cannot be timed is modelled."""

import functools

import pytest
import torch
from torch import nn

from tests.test_api import TIMES, data, fast
from tests.toys import ToyUNet, seeded
from tfmq_fx import calibrate, convert, prepare
from tfmq_fx.backends.codes.choice import Choice
from tfmq_fx.backends.codes.problem import Tile
from tfmq_fx.backends.layer_times import LayerTime, chooser, layer_time
from tfmq_fx.ir.sites import find_sites
from tfmq_fx.quant.quant_layer import QuantLayer


@functools.cache
def sites(name="w8a8"):
    prepared = prepare(
        seeded(ToyUNet).eval(), data(8)[0], timesteps=TIMES, config=fast(name, mode="table")
    )
    model = convert(calibrate(prepared, data(8), progress=False), progress=False)
    return {s.name: s for s in find_sites(model.gm)[0] if isinstance(s.layer, QuantLayer)}


def choose(problem, dtype):
    """A trial in which float takes as long as there are channels, and integers a third."""
    width = float(problem.channels)
    return Choice("cpu", Tile(), {"float": width, "cpu": width / 3, "onednn": width / 2})


def timed(site, chooser=choose):
    return layer_time(site.layer, site.nodes, chooser)


def test_the_fastest_kernel_is_what_integers_take():
    site = next(s for s in sites().values() if s.layer.act_bits == 8)
    width = site.layer.weight_shape[1]
    assert timed(site) == LayerTime(width / 3, width, True)


def test_calls_add_up():
    site = next(s for s in sites().values() if s.layer.act_bits == 8)
    twice = layer_time(site.layer, site.nodes * 2, choose)
    assert twice == LayerTime(2 * timed(site).integer, 2 * timed(site).floating, True)


def test_what_no_integer_kernel_runs_takes_what_floats_take():
    site = next(s for s in sites().values() if s.layer.act_bits == 16)
    assert timed(site).integer == timed(site).floating == site.layer.weight_shape[1]


def test_what_cannot_be_timed_follows_from_its_multiply_adds():
    found = {name: timed(site, None) for name, site in sites().items()}
    assert not any(time.measured for time in found.values())
    for name, site in sites().items():
        out = site.nodes[0].meta["val"].shape[1:].numel() * 4  # the example's batch
        work = out * torch.Size(site.layer.weight_shape[1:]).numel()
        assert found[name].floating == pytest.approx(work / 2e5)
    eight = next(s.name for s in sites().values() if s.layer.act_bits == 8)
    assert found[eight].integer == pytest.approx(found[eight].floating / 2)


def test_a_real_trial_on_this_machine():
    site = next(s for s in sites().values() if s.layer.act_bits == 8)
    found = timed(site, chooser(torch.device("cpu")))
    assert found.measured and found.integer > 0 and found.floating > 0
    assert chooser(torch.device("meta")) is None


def test_grouped_convolutions_are_not_timed_as_if_they_were_whole():
    site = next(s for s in sites().values() if s.layer.weight_shape[2:])
    layer = type(site.layer).from_float(
        nn.Conv2d(8, 8, 3, padding=1, groups=4), weight_bits=8, act_bits=8, per_timestep=False
    )
    assert not layer_time(layer, site.nodes, choose).measured
