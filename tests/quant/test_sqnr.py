"""noise: energies sample by sample, and their ratios as `sqnr.sqnr` has them."""

import math

import pytest
import torch

from tfmq_fx.quant.sqnr import decibels, energies, pooled, sqnr


def test_energies_are_sums_of_squares_of_each_sample():
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 5.0], [6.0, 0.0]])
    found = expected + torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    for samples, sums in (
        (4, [[5, 25, 25, 36], [1, 0, 4, 0]]),
        (2, [[30, 61], [1, 4]]),
        (3, [[91 / 3] * 3, [5 / 3] * 3]),  # what is not divided among samples counts for all alike
    ):
        wanted = torch.tensor(sums, dtype=torch.float64)
        # a root and its square: two roundings of float64
        torch.testing.assert_close(
            energies(expected, found, samples), wanted, rtol=1e-15 * 4, atol=0
        )
    assert energies(torch.tensor(3.0), torch.tensor(2.0), 1).tolist() == [[9], [1]]
    assert energies(expected.half(), found.half(), 4).dtype == torch.float64


def test_decibels_are_those_of_metrics():
    expected = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    found = expected + 0.01 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    energy = energies(expected, found, 3)
    for value, a, b in zip(decibels(energy), expected, found, strict=True):
        assert float(value) == pytest.approx(sqnr(a, b), abs=1e-5)  # float32 differences
    assert pooled(energy) == pytest.approx(sqnr(expected, found), abs=1e-5)


def test_ends_of_the_scale():
    energy = torch.tensor(
        [[1.0, 0.0, 0.0, math.nan, math.nan, 4.0], [0.0, 0.0, 1.0, 0.0, 1.0, math.nan]]
    )
    found = decibels(energy.double()).tolist()
    assert found[:3] == [math.inf, math.inf, -math.inf]
    assert all(math.isnan(value) for value in found[3:])
    # neither square fits float64's smaller relative, float32
    tiny = torch.tensor([1e-30])
    assert pooled(energies(tiny, tiny * 1.1, 1)) == pytest.approx(20, abs=1e-3)
