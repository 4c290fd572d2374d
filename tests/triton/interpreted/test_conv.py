"""The convolution kernel, interpreted on the CPU, against the reference in plain torch."""

import pytest
import torch
from hypothesis import given, settings

from tests.triton.cases import conv_arguments, convolutions
from tfmq_fx.backends.codes.problem import Tile
from tfmq_fx.backends.cuda.conv import conv2d_reference, conv2d_triton
from tfmq_fx.core.errors import BackendError


def both(**settings):
    arguments = conv_arguments(**settings)
    return conv2d_triton(**arguments), conv2d_reference(**arguments)


def bound(settings):
    """How far float32 sums may lie from exact ones: integers are summed exactly; of fp8, terms of
    a few hundred values are added in float32, each sum rounded by 2**-24 of its size."""
    if settings.get("format") != "fp8":
        return 0.0
    arguments = conv_arguments(**settings)
    terms = sum(
        w[0].numel() * float(x.float().abs().max() * w.float().abs().max() * s.max() * u.max())
        for x, w, s, u in zip(
            arguments["xs"],
            arguments["weights"],
            arguments["scales"],
            arguments["weight_scales"],
            strict=True,
        )
    )
    depth = sum(w[0].numel() for w in arguments["weights"])
    return depth * 2**-24 * terms


@settings(max_examples=80)
@given(convolutions())
def test_random_convolutions_equal_the_reference(drawn):
    found, expected = both(**drawn)
    if drawn["format"] == "fp8":
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=bound(drawn))
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_results_are_requantized_to_the_same_codes(format):
    found, expected = both(format=format, requantize=True, channels=(40, 20))
    assert found.dtype == torch.int8 and torch.equal(found, expected)
    assert len(found.unique()) > 30  # not all clamped


def test_fp8_results_are_requantized_to_the_same_values():
    found, expected = both(format="fp8", requantize=True)
    assert found.dtype == torch.float8_e4m3fn
    # Triton's interpreter loses the carry of a mantissa that rounds up to a power of two, and
    # rounds subnormals down to 0; the rest is exact up to sums that lie next to a boundary
    found, expected = found.float(), expected.float()
    carried = (expected.abs().log2() % 1 == 0) | (expected.abs() < 2**-6)
    same = found == expected
    assert bool((same | carried).float().mean() > 0.995)
    assert same[~carried].float().mean() > 0.99 and (~carried).sum() > 100


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_programs_that_share_a_sum_give_the_same(format):
    tile = Tile(16, 16, 64, 2, 3, 4, 2)
    settings = {"format": format, "channels": (150,), "tile": tile, "half": 32}
    found, expected = both(**settings)
    if format == "fp8":
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=bound(settings))
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("tile", [Tile(32, 32, 64, 1, 1, 4, 2), Tile(16, 32, 128, 8, 1, 2, 3)])
def test_sides_that_tiles_divide_need_no_masks(tile):
    found, expected = both(channels=(128,), out_channels=64, tile=tile)
    assert torch.equal(found, expected)


def test_segments_may_be_packed_in_runs_of_their_own():
    wide, narrow = (
        conv_arguments(format="int4", half=half, channels=(n,), seed=n)
        for half, n in ((64, 128), (32, 64))
    )
    lists = ("xs", "weights", "zeros", "weight_scales", "offsets", "scales", "halves")
    merged = {**wide, **{key: wide[key] + narrow[key] for key in lists}}
    assert torch.equal(conv2d_triton(**merged), conv2d_reference(**merged))


@pytest.mark.parametrize("ranges", [("all", "sample"), ("sample", "all"), ("row", "sample")])
def test_segments_may_have_ranges_of_their_own(ranges):
    arguments = conv_arguments(channels=(20, 30), ranges=ranges[0])
    arguments["scales"][1] = conv_arguments(ranges=ranges[1], seed=1)["scales"][0]
    assert len(arguments["scales"][0]) != len(arguments["scales"][1])
    assert torch.equal(conv2d_triton(**arguments), conv2d_reference(**arguments))


def test_single_pixels_may_have_any_stride():
    arguments = conv_arguments(size=(1, 1), taps=(1, 1), channels=(20,), batch=3)
    odd = arguments["xs"][0].as_strided((3, 1, 1, 20), (20, 1, 1, 1))
    expected = conv2d_reference(**arguments)
    assert torch.equal(conv2d_triton(**{**arguments, "xs": [odd]}), expected)


def test_other_layouts_and_dtypes_are_refused():
    arguments = conv_arguments(channels=(8,))
    x = arguments["xs"][0]
    for wrong, message in (
        (x.transpose(1, 2), "pixels evenly apart"),
        (x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), "channels last"),
        (x.float(), "got torch.float32"),
    ):
        with pytest.raises(BackendError, match=message):
            conv2d_triton(**{**arguments, "xs": [wrong]})
    two = conv_arguments(channels=(8, 8), tile=Tile(16, 16, 32, 2, 2, 4, 2))
    with pytest.raises(BackendError, match="split is 2"):
        conv2d_triton(**two)


def test_every_element_is_written_and_nothing_else():
    arguments = conv_arguments(channels=(33,), out_channels=17, batch=3)
    first = conv2d_triton(**arguments)
    assert torch.equal(conv2d_triton(**arguments), first)
    assert torch.equal(conv_arguments(channels=(33,), out_channels=17, batch=3)["xs"][0],
                       arguments["xs"][0])  # fmt: skip
