"""coverage: every parameter is counted where it ended up; what stays in floats is said aloud."""

import pytest
import torch
from torch import nn

from tests.passes.test_fold_weights import STEPS, example
from tfmq_fx import CoverageWarning, convert, prepare, report
from tfmq_fx.conversion.coverage import check_coverage
from tfmq_fx.ir.graph_pass import Declined


class OnlyPatched(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 3, 3, padding=1)

    def forward(self, x, t):
        return self.up(x, output_size=x.shape[2:]) * t[:, None, None, None]


def test_a_model_of_which_nothing_can_be_quantized_is_an_error_that_says_what_can_be_done():
    prepared = prepare(OnlyPatched().eval(), example(), config="w8a8-dynamic", timesteps=STEPS)
    with pytest.raises(ValueError, match=r"up \(it is called with an output size\).*config=\"fp\""):
        convert(prepared, progress=False)
    exact = prepare(OnlyPatched().eval(), example(), config="fp", timesteps=STEPS)
    assert report(convert(exact, progress=False)).weight_coverage == 0


class WideNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.gate = nn.LayerNorm((8, 8)), nn.Parameter(torch.ones(3, 8, 8))
        self.attention, self.mix = (
            nn.MultiheadAttention(8, 2, add_zero_attn=True),
            nn.Conv2d(3, 3, 3, padding=1),
        )
        self.idle = nn.Linear(5, 5)

    def forward(self, x, t):
        h = self.mix(self.norm(x) * self.gate)
        rows = h.flatten(0, 1)
        return (rows + self.attention(rows, rows, rows)[0]).view_as(h) + t[:, None, None, None]


def test_scales_with_two_dimensions_are_no_matrices_and_every_parameter_is_counted():
    net = WideNorm().eval()
    with pytest.warns(CoverageWarning, match=r"256 of 337 .*: attention"):
        model = convert(
            prepare(net, example(), config="w8a8-dynamic", timesteps=STEPS), progress=False
        )
    assert report(model).weight_coverage == pytest.approx(81 / 337)
    assert report(model).data["parameters"] == {
        "model": sum(p.numel() for p in net.parameters()),
        "quantized": 81,
        "float": 128 + 192 + 3 + 4 * 64 + 32,
        "tables": 0,
        "unused": 30,
        "constants": 0,
    }
    assert "30 unused; constants of the graph: 0" in str(report(model))


def test_a_small_part_that_stays_is_no_warning():
    check_coverage(1000, {"up": 100}, [])
    with pytest.warns(CoverageWarning, match=r"120 of 1120 weights .*: up \(why\)"):
        check_coverage(1000, {"up": 120}, [Declined("up", "why")])
    check_coverage(0, {}, [])  # a model without matrices
