"""Codes of group norms on the CPU: those of the reference, for images and for rows of places."""

import pytest
import torch

from tests.backends.cpu.cases import needs_kernels
from tfmq_fx.backends.cpu import norm_codes as cpu
from tfmq_fx.backends.cuda import norm as cuda
from tfmq_fx.core.errors import BackendError


def arguments(shape, dtype):
    """Arguments of `norm_codes`; the modulation lies apart in memory."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    batch, channels = shape[:2]
    factor, shift = torch.randn(batch, 2 * channels, generator=generator).chunk(2, 1)
    places = (batch, channels, *[1] * (len(shape) - 2))
    weight, bias = torch.rand(2, channels, generator=generator)
    norm = (4, weight, bias, 1e-5)
    scales = [torch.full((batch,), 0.03)]
    modulation = (factor.reshape(places), shift.reshape(places), True)
    return x, *norm, *modulation, scales, [40], [channels], 250, (0, 0, 0, 0), dtype


@needs_kernels
@pytest.mark.parametrize("shape", [(2, 16, 5, 7), (2, 16, 35)])
def test_codes_are_those_of_the_reference(shape):
    found = cpu.norm_codes(*arguments(shape, torch.uint8))
    expected = cuda.norm_codes(*arguments(shape, torch.int8))
    assert found.dtype == torch.uint8 and found.shape == expected.shape
    apart = (found.int() - (expected.int() + 128)).abs()
    assert apart.max() <= 1 and apart.float().mean() < 0.01  # sums are added in another order


def test_codes_of_another_dtype_are_refused():
    with pytest.raises(BackendError, match=r"codes in torch\.uint8, not in torch\.int8"):
        cpu.norm_codes(*arguments((2, 16, 5, 7), torch.int8))
