"""The group norm kernels, interpreted on the CPU, against the reference in plain torch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tfmq_fx.backends.cuda.norm import group_norm_quantize_reference, group_norm_quantize_triton


def arguments(
    *,
    batch=2,
    size=(5, 7),
    groups=4,
    width=3,
    affine=True,
    modulated=True,
    silu=True,
    pads=(1, 1, 1, 1),
    per_sample=True,
    runs=1,
    dtype=torch.int8,
    mean=0.5,
    seed=0,
):
    """Arguments of `group_norm_quantize_triton` as a dict."""
    generator = torch.Generator().manual_seed(seed)
    channels = groups * width

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    cut = channels // 3 if runs == 2 else channels
    sizes = [cut, channels - cut] if runs == 2 else [channels]
    scale = 3.0 / (448 if dtype != torch.int8 else 128)
    return {
        "x": normal(batch, *size, channels) * 2 + mean,
        "groups": groups,
        "weight": normal(channels) if affine else None,
        "bias": normal(channels) if affine else None,
        "eps": 1e-5,
        "factor": 1 + 0.1 * normal(batch, channels) if modulated else None,
        "shift": normal(batch, channels) if modulated else None,
        "silu": silu,
        "scales": [
            scale * (1 + torch.rand(batch if per_sample else 1, generator=generator)) for _ in sizes
        ],
        "zeros": [40, 90][: len(sizes)] if dtype == torch.int8 else [0] * len(sizes),
        "sizes": sizes,
        "levels": 255,
        "pads": list(pads),
        "dtype": dtype,
    }


@settings(max_examples=40)
@given(
    st.fixed_dictionaries(
        {
            "batch": st.integers(1, 3),
            "size": st.tuples(st.integers(1, 20), st.integers(1, 20)),
            "groups": st.sampled_from([1, 2, 8]),
            "width": st.integers(2, 12),
            "affine": st.booleans(),
            "modulated": st.booleans(),
            "silu": st.booleans(),
            "pads": st.sampled_from([(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 2, 3)]),
            "per_sample": st.booleans(),
            "runs": st.integers(1, 2),
            "seed": st.integers(0, 99),
        }
    )
)
def test_random_norms_give_the_reference_codes(drawn):
    given = arguments(**drawn)
    found, expected = group_norm_quantize_triton(**given), group_norm_quantize_reference(**given)
    apart = (found.short() - expected.short()).abs()
    # float sums in another order: a value next to the middle of two codes may take the other one
    assert found.shape == expected.shape and apart.max() <= 1
    assert (apart > 0).float().mean() < 2e-3 or (apart > 0).sum() <= 2


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_statistics_do_not_cancel(mean):
    """Many chunks of pixels, and a mean far above the deviation, against float64."""
    given = arguments(size=(24, 30), mean=mean, silu=False, modulated=False, pads=(0, 0, 0, 0))
    found = group_norm_quantize_triton(**given).short()
    images, (scale,) = given["x"].double().permute(0, 3, 1, 2), given["scales"]
    weight, bias = given["weight"].double(), given["bias"].double()
    normed = F.group_norm(images, given["groups"], weight, bias, given["eps"])
    codes = (normed.permute(0, 2, 3, 1) / scale.double()[:, None, None, None]).round() + 40
    expected = codes.clamp(0, 255).short() - 128
    apart = (found - expected).abs()
    # a value of 1000 has an error of 2**-14, of a normed deviation of 1/2 each 2**-24 * 500: both
    # below 1e-4, of codes 0.02 wide: one in 200 lies that close to a boundary
    assert apart.max() <= 1 and (apart > 0).float().mean() < (2e-2 if mean else 1e-4)


def test_fp8_values_are_the_nearest():
    given = arguments(dtype=torch.float8_e4m3fn)
    found, expected = group_norm_quantize_triton(**given), group_norm_quantize_reference(**given)
    found, expected = found.float(), expected.float()
    # as in test_conv: the interpreter's own rounding to powers of two and subnormals
    carried = (expected.abs().log2() % 1 == 0) | (expected.abs() < 2**-6)
    assert (found == expected)[~carried].float().mean() > 0.99
    assert (found[:, 0] == 0).all() and (found[:, :, -1] == 0).all()  # borders


def test_borders_hold_the_code_of_zero():
    given = arguments(runs=2, pads=(2, 0, 1, 0))
    codes = group_norm_quantize_triton(**given)
    cut = given["sizes"][0]
    assert (codes[:, 0, :, :cut] == 40 - 128).all() and (codes[:, :, :2, cut:] == 90 - 128).all()
