"""outside: tensors of closures are watched, and refreshing refuses what no graph follows."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.core.test_module_overrides import Net, check_answers, example, low_rank, quantized
from tfmq_fx import CoverageWarning, StaleError, refresh, report
from tfmq_fx.capture.outside_tensors import outside_parameters
from tfmq_fx.serialization.staleness import OutsideTensors


def test_weights_of_foreign_modules_cannot_be_made_anew():
    net = Net().eval()
    up = low_rank(net)
    with pytest.warns(CoverageWarning):
        model = quantized(net)
    with pytest.raises(ValueError, match=r"no parts of it\): prepare and convert the source anew"):
        refresh(model, net, progress=False)
    with torch.no_grad():
        up.mul_(2)
    with pytest.raises(ValueError, match="changed since"):
        refresh(model, net, progress=False)


@torch.no_grad()
def test_constants_that_a_function_makes_of_a_parameter_are_watched_and_counted():
    net = Net().eval()
    weight = net.middle.weight
    net.middle.forward = lambda h: F.conv2d(h, (weight - weight.mean()) / weight.std(), padding=1)
    with pytest.warns(CoverageWarning, match="middle"):
        model = quantized(net)
    check_answers(net, model)
    counts = report(model).data["parameters"]
    assert counts["float"] >= 2304 <= counts["constants"]
    weight.mul_(1.5)[0].add_(1)
    with pytest.raises(StaleError, match=r"middle\.weight"):
        model(*example(1))
    with pytest.raises(ValueError, match=r"middle\.weight: its code computes constants"):
        refresh(model, net, progress=False)


def test_a_tensor_that_is_gone_cannot_change_and_one_that_was_written_to_does():
    kept, gone = torch.ones(3), torch.ones(3)
    seen = OutsideTensors({"kept": weakref.ref(kept), "gone": weakref.ref(gone)})
    del gone
    assert seen.changed() == []
    kept.add_(0)  # written to, and the same
    assert seen.changed(contents=False) == []
    kept.add_(1)
    assert seen.changed(contents=False) == ["kept"]
    with pytest.raises(StaleError, match="kept: a tensor that the model's code reads from outside"):
        seen.check(contents=False)
    parameter = nn.Parameter(kept)
    assert outside_parameters({"a": weakref.ref(parameter), "b": weakref.ref(kept)}) == ["a"]
