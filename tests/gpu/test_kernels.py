"""The Triton kernels on the device against the reference in plain torch on the CPU."""

import random

import pytest
import torch

from tests.gpu.models import DEVICE
from tests.triton.cases import conv_arguments
from tests.triton.interpreted.test_norm import arguments as norm_arguments
from tfmq_fx.backends.codes.problem import Problem, Tile
from tfmq_fx.backends.cuda.autotune import arguments as operands
from tfmq_fx.backends.cuda.conv import conv2d, conv2d_reference
from tfmq_fx.backends.cuda.norm import group_norm_quantize, group_norm_quantize_reference
from tfmq_fx.backends.cuda.tiles import candidates
from tfmq_fx.quant.affine import FP8

pytestmark = pytest.mark.usefixtures("kernels")
FORMATS = ("int8", "fp8", "int4")


def on_device(value):
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    return [on_device(v) for v in value] if isinstance(value, list) else value


def placed(x):
    """x on the device, a slice of what it is a slice of."""
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(DEVICE)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


def both(given):
    """What the kernel gives, on the CPU, and what it should."""
    here = {key: on_device(value) for key, value in given.items()}
    here["xs"] = [placed(x) for x in given["xs"]]
    found = conv2d(**here)
    assert found.device.type == DEVICE and found.dtype == given["dtype"]
    return found.cpu(), conv2d_reference(**given)


def check(given):
    """Integers are summed exactly. What follows is a handful of float32 operations on values no
    larger than these, which the device may fuse: each rounds by 2^-24 of them. The tensor cores of
    Hopper keep 14 bits of a sum of fp8 products while they add 32 terms to it."""
    found, expected = both(given)
    assert found.shape == expected.shape
    added = [given[key] for key in ("bias", "row", "residual") if given[key] is not None]
    size = float(expected.abs().max()) + sum(float(value.abs().max()) for value in added)
    is_float = given["xs"][0].dtype == FP8
    if not is_float and not added and len(given["xs"]) == 1:
        assert torch.equal(found, expected)
    elif not is_float:
        assert (found - expected).abs().max() <= 8 * 2**-24 * 2 * size
    else:
        depth = sum(w[0].numel() for w in given["weights"])
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error <= 2 * (2**-13 * (1 + depth / 32)) + 1e-5


def drawn(seed):
    """Settings of `conv_arguments`: every format, geometry and epilogue."""
    pick = random.Random(seed)
    taps = pick.choice([(1, 1), (3, 3), (3, 3), (2, 3), (1, 5)])
    dilation = pick.choice([(1, 1), (1, 1), (2, 1), (2, 2)])
    least = [d * (k - 1) + 1 for d, k in zip(dilation, taps, strict=True)]
    return {
        "batch": pick.randint(1, 3),
        "size": tuple(pick.randint(n, n + 20) for n in least),
        "channels": tuple(pick.randint(1, 150) for _ in range(pick.randint(1, 2))),
        "out_channels": pick.randint(1, 150),
        "taps": taps,
        "stride": pick.choice([(1, 1), (2, 2), (1, 2)]),
        "dilation": dilation,
        "format": pick.choice(FORMATS),
        "half": pick.choice([32, 64]),
        "ranges": pick.choice(["all", "sample", "row"]),
        "bias": pick.random() < 0.5,
        "row": pick.random() < 0.5,
        "residual": pick.random() < 0.5,
        "sliced": pick.random() < 0.3,
        "seed": seed,
    }


@pytest.mark.parametrize("seed", range(30))
def test_random_convolutions(seed):
    check(conv_arguments(**drawn(seed)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("channels, out", [(128, 256), (96, 80)])
def test_every_tile_that_may_be_chosen(format, channels, out):
    """On a convolution that tiles divide and on one that they do not."""
    half = 32 if format == "int4" else 0
    size, taps = (18, 18), (3, 3)
    problem = Problem(2, *size, channels, out, taps, (1, 1), (1, 1), format, half)
    capability = torch.cuda.get_device_capability()
    large = Problem(16, 130, 130, 1280, 1280, taps, (1, 1), (1, 1), format, half)
    for tile in {*candidates(problem, capability), *candidates(large, capability)}:
        settings = {"batch": 2, "size": size, "channels": (channels,), "out_channels": out}
        given = conv_arguments(
            **settings, taps=taps, format=format, half=half or 32, tile=tile, residual=False
        )
        check(given)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_in_half_precision(format, dtype):
    found, expected = both(conv_arguments(format=format, dtype=dtype, channels=(64,)))
    # one unit in the last place, where float32 lies at the middle of two
    unit = 2 ** -(7 if dtype == torch.bfloat16 else 10)
    close = (found.float() - expected.float()).abs() <= unit * expected.float().abs() + 1e-3
    assert close.all() and (found == expected).float().mean() > (0.9 if format == "fp8" else 0.99)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_requantized_results(format):
    found, expected = both(conv_arguments(format=format, requantize=True, channels=(64, 32)))
    apart = (found.short() - expected.short()).abs()
    # the product with 1 / scale may be fused with an addition, and lie beside the middle of two
    assert apart.max() <= 1 and (apart > 0).float().mean() < 2e-3 and len(found.unique()) > 30


def test_requantized_fp8_results():
    found, expected = both(conv_arguments(format="fp8", requantize=True, channels=(64,)))
    found, expected = found.float(), expected.float()
    step = torch.maximum(expected.abs() * 2**-3, torch.tensor(2.0**-9))  # to the next e4m3 float
    assert ((found - expected).abs() <= step).all() and (found == expected).float().mean() > 0.9


@pytest.mark.parametrize("format", FORMATS)
def test_programs_that_share_a_sum(format):
    tile = Tile(64, 64, 64, 8, 4, 4, 3)
    check(conv_arguments(format=format, channels=(320,), out_channels=64, half=32, tile=tile))


@pytest.mark.parametrize("format", FORMATS)
def test_offsets_beyond_31_bits(format):
    """A slice of an image of more than 2^31 elements: 2.1 GB."""
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("too little memory")
    problem = Problem(33, 64, 64, 64, 32, (1, 1), (1, 1), (1, 1), format, 32 * (format == "int4"))
    given = operands(problem, torch.device(DEVICE))
    (small,) = given["xs"]
    wide = torch.zeros(33, 64, 64, 16384, dtype=torch.uint8, device=DEVICE).view(small.dtype)
    spread = wide[..., -64:]
    spread.copy_(small)
    settings = {"dtype": torch.float32, "tile": Tile(64, 32, 64, 8, 1, 4, 3)}
    expected = conv2d(**given, **settings)
    given["xs"] = [spread]
    assert torch.equal(conv2d(**given, **settings), expected)


def test_every_element_is_written():
    given = conv_arguments(channels=(70,), out_channels=33, size=(19, 21))
    first, _ = both(given)
    torch.full((first.numel() * 4,), float("nan"), device=DEVICE)  # what memory is reused
    second, _ = both(given)
    assert first.isfinite().all() and torch.equal(first, second)


@pytest.mark.parametrize("format", FORMATS)
def test_compiled_calls_are_the_same(format, dynamo):
    given = conv_arguments(format=format, channels=(64,))
    here = {key: on_device(value) for key, value in given.items()}
    compiled = torch.compile(lambda xs: conv2d(**{**here, "xs": xs}) * 2, fullgraph=True)
    assert torch.equal(compiled(here["xs"]), conv2d(**here) * 2)


NORMS = [
    {},
    {"affine": False, "modulated": False, "silu": False},
    {"runs": 2, "pads": (0, 1, 2, 3)},
    {"per_sample": False, "size": (33, 47), "groups": 32, "width": 10, "batch": 1},
    {"size": (64, 64), "groups": 32, "width": 10, "batch": 3, "pads": (0, 0, 0, 0)},
    {"dtype": FP8, "size": (16, 16), "groups": 8, "width": 8},
    {"mean": 1000.0, "size": (24, 30), "modulated": False},
]


@pytest.mark.parametrize("settings", NORMS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_norms(settings, x_dtype):
    given = norm_arguments(**settings)
    given["x"] = given["x"].to(x_dtype)
    found = group_norm_quantize(**{key: on_device(value) for key, value in given.items()})
    found, expected = found.cpu().float(), group_norm_quantize_reference(**given).float()
    apart = (found - expected).abs()
    # sums in another order: a value beside the middle of two codes may take the other one, and
    # more of them where the mean is far above the deviation (see tests/triton)
    share = 2e-2 if settings.get("mean") or settings.get("dtype") == FP8 else 2e-3
    step = torch.maximum(expected.abs() * 2**-3, torch.tensor(2.0**-9))
    assert found.shape == expected.shape
    assert (apart <= (step if settings.get("dtype") == FP8 else 1)).all()
    assert (apart > 0).float().mean() < share


def test_a_compiled_norm_is_the_same(dynamo):
    given = {key: on_device(value) for key, value in norm_arguments().items()}
    x = given.pop("x")
    compiled = torch.compile(lambda x: group_norm_quantize(x, **given), fullgraph=True)
    assert torch.equal(compiled(x), group_norm_quantize(x, **given))
