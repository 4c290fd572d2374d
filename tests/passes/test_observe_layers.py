"""observe_layers: outputs stay as they are, and every layer's input is seen under its own name."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.ir.test_sites import graph_of
from tests.strategies import captured_graphs, draw_inputs
from tests.toys import SharedTwice, ToyUNet, seeded
from tfmq_fx.calibration.observers import RangeObserver
from tfmq_fx.core.errors import CalibrationError, GraphError
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.ir.sites import find_sites
from tfmq_fx.passes.observe_layers import observe_layers, observer_name

PATHS = st.lists(st.text("ad_", min_size=1, max_size=4), min_size=1, max_size=3).map(".".join)


@example(a="a_.b", b="a._b")
@given(a=PATHS, b=PATHS)
def test_observers_of_two_layers_never_share_a_name(a, b):
    assert (observer_name(a) == observer_name(b)) == (a == b)


@settings(deadline=None, max_examples=15)
@given(gm=captured_graphs(), seed=st.integers(0, 99))
def test_observing_changes_no_output_and_sees_every_layer(gm, seed):
    done = observe_layers(gm)
    sites, _ = find_sites(gm)
    assert done.changed == len(sites) and stage_of(done.gm) is Stage.OBSERVED
    inputs = draw_inputs(gm, 3, seed)
    with torch.no_grad():
        for found, expected in zip(done.gm(*inputs.values()), gm(*inputs.values()), strict=True):
            assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    for site in sites:
        observer = done.gm.get_submodule(observer_name(site.name))
        assert isinstance(observer, RangeObserver) and observer.site == site.name
        assert set(observer.seen) == set(inputs["t"].double().tolist())
    assert not any("observers" in name for name, _ in gm.named_modules())
    with pytest.raises(GraphError, match="expected a captured graph"):
        observe_layers(done.gm)


def test_the_range_is_that_of_the_layers_input():
    gm = graph_of(seeded(ToyUNet).eval(), 3, 8, 8)
    done = observe_layers(gm).gm
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 9])
    with torch.no_grad():
        done(x, t)
    found = done.get_submodule(observer_name("conv_in")).ranges(t)
    assert found.low.tolist() == x.flatten(1).amin(1).tolist()
    assert found.high.tolist() == x.flatten(1).amax(1).tolist()


def test_a_layer_called_several_times_has_one_observer():
    gm = graph_of(seeded(SharedTwice).eval(), 4)
    done = observe_layers(gm)
    assert done.changed == 1
    observers = [m for m in done.gm.modules() if isinstance(m, RangeObserver)]
    assert len(observers) == 1
    with torch.no_grad():
        done.gm(torch.full((1, 4), 9.0), torch.tensor([1]))
    low, high = observers[0].seen[1]
    assert high == 9.0 and low < 0  # the first call's input, and what tanh made


def test_nan_names_the_layer_it_reaches_first():
    gm = graph_of(seeded(ToyUNet).eval(), 3, 8, 8)
    x = torch.randn(1, 3, 8, 8)
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="the input of conv_in holds NaN"), torch.no_grad():
        observe_layers(gm).gm(x, torch.tensor([1]))
