"""NaN that arises inside a compiled model is not answered by ordinary numbers."""

import pytest
import torch

from tests.backends.codes import nets
from tests.backends.codes.nets import EIGHT, conv, net, norm
from tests.backends.cpu.cases import conv_arguments, needs_kernels, norm_arguments
from tfmq_fx.backends.cpu import kernels
from tfmq_fx.backends.cpu.autotune import untimed_choice
from tfmq_fx.backends.cpu.lower import lower
from tfmq_fx.backends.cpu.nans import mark_nans
from tfmq_fx.backends.inductor import compile_graph

pytestmark = needs_kernels


@pytest.mark.parametrize("at", [0, 5, 69])
def test_kernels_count_calls_that_make_a_code_of_nan(at):
    """Wherever it is: in the first vector, or in the rest of the last; NaN in floats is no loss."""
    arguments = norm_arguments(groups=0, width=70)
    before = kernels.cpu_nan_count()
    kernels.cpu_norm(**arguments)
    assert kernels.cpu_nan_count() == before
    arguments["x"][1, 2, 3, at] = float("nan")
    kernels.cpu_norm(**arguments)
    assert kernels.cpu_nan_count() == before + 1
    for requantize in (None, "row"):
        arguments, _ = conv_arguments(out=70, requantize=requantize)
        kernels.cpu_conv(**arguments)
        arguments["residual"][1, 2, 3, at] = float("nan")
        kernels.cpu_conv(**arguments)
        assert kernels.cpu_nan_count() == before + (1 if requantize is None else 2)


def test_infinity_is_the_largest_code_as_in_the_reference():
    before = kernels.cpu_nan_count()
    arguments = norm_arguments(groups=0, silu=False)
    arguments["x"][0, 0, 0, 0] = float("inf")
    assert kernels.cpu_norm(**arguments).max() == 250 and kernels.cpu_nan_count() == before


def overflowing(m, x, row):
    """Infinity over infinity, or 0 over 0, where x is not small, between layers."""
    power = torch.exp(200 * x)
    return m.b(m.silu(m.norm(x + power / power)))


@pytest.fixture
def quantized():
    layers = {"b": conv, "norm": norm, "silu": torch.nn.SiLU}
    return nets.quantized(nets.captured(net(overflowing, **layers)), EIGHT)


def inputs():
    """A batch that stays finite, and one whose third sample does not."""
    (x, t), *_ = nets.data()
    near = torch.zeros_like(x)
    far = near.clone()
    far[2] = 3 * x[2]
    return (near, t), (far, t)


def test_nan_that_arises_between_layers_is_answered(quantized, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda gm, **options: gm)
    near, far = inputs()
    run, lowered = compile_graph(quantized)
    with torch.no_grad():
        assert quantized(*far)[0][2].isnan().any() and far[0].isfinite().all()
        assert not lowered.gm(*far)[0].isnan().any()  # the fault, were nobody to look
        assert run(*far)[0].isnan().all()
        assert torch.equal(run(*near)[0], lowered.gm(*near)[0])


def test_results_that_show_it_are_left_alone(quantized):
    gm = lower(quantized, choose=untimed_choice).gm
    _, far = inputs()

    def part(*given):
        y = gm(*given)[0].clone()
        y[0] = float("nan")
        return (y, torch.arange(3))

    with torch.no_grad():
        assert not mark_nans(part, gm)(*far)[0][1:].isnan().any()
        whole, integers = mark_nans(lambda *given: (gm(*given)[0], torch.arange(3)), gm)(*far)
    assert whole.isnan().all() and integers.tolist() == [0, 1, 2]


def test_a_graph_without_our_kernels_runs_as_it_is(quantized):
    assert mark_nans(quantized, quantized) is quantized
