"""The CPU's kernels against references in plain torch, and what is said where they cannot run."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.cpu.cases import (
    conv_arguments,
    convolutions,
    needs_kernels,
    norm_arguments,
    norms,
)
from tfmq_fx.backends.codes.arithmetic import quantize
from tfmq_fx.backends.cpu import kernels, library
from tfmq_fx.backends.cuda.conv import conv2d_reference
from tfmq_fx.backends.cuda.norm import group_norm_quantize_reference
from tfmq_fx.core.errors import BackendError
from tfmq_fx.quant.sqnr import sqnr

BF16_STEP = 2**-7  # between neighbours in bfloat16, of the lower one
ACTIVATIONS = {
    "none": lambda v: v,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
}


@pytest.fixture
def threads():
    """Sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def agrees(given, reference, activation="none"):
    """Assert that the kernel gives what the reference does.

    Sums of integers are exact, and so are their parts of the result but for three roundings each;
    with at most four summands more, each of the two is within 8 * 2**-24 of the sizes added up.
    A result in bfloat16 may then lie at the neighbour, and a code, next to the middle of two, at
    the other one. Activations have slopes below 1.13, and errors of their own below 2e-7 of 1 + erf
    or 1 + exp.
    """
    found = kernels.cpu_conv(**given, activation=activation)
    whole = {**reference, "dtype": torch.float32, "out_scale": None}
    value = conv2d_reference(**whole)
    slack = 2**-20 * _sizes(whole)
    if activation != "none":
        slack = 1.13 * slack + 2**-21 * value.abs()
        value = ACTIVATIONS[activation](value)
    if given["out_scale"] is None:
        expected = value.to(given["dtype"])
        if given["dtype"] == torch.bfloat16:
            slack = slack + BF16_STEP * value.abs() * (found != expected)
            assert (found != expected).float().mean() < 0.01
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert ((found.float() - expected.float()).abs() <= slack).all()
        return found
    scale = given["out_scale"]
    scale = scale.repeat_interleave(value[..., 0].numel() // len(scale)).view(*value.shape[:3], 1)
    codes = quantize(value, scale, 100, 250, torch.uint8)
    if activation == "none":
        assert torch.equal(codes.short(), conv2d_reference(**reference).short() + 128)
    assert found.dtype == torch.uint8 and found.shape == codes.shape
    _at_boundaries(found, codes, value / scale, slack / scale)
    return found


def _sizes(reference):
    """The sizes of all that is added up to each element of the result."""
    plain = {**reference, "bias": None, "row": None, "residual": None}
    lists = ("xs", "weights", "zeros", "weight_scales", "offsets", "scales", "halves")
    sizes = 0
    for i in range(len(reference["xs"])):
        one = {**plain, **{name: [plain[name][i]] for name in lists}}
        sizes = sizes + conv2d_reference(**one).abs()
    if reference["bias"] is not None:
        sizes = sizes + reference["bias"].abs()
    if reference["row"] is not None:
        sizes = sizes + reference["row"].abs()[:, None, None]
    if reference["residual"] is not None:
        sizes = sizes + reference["residual"].abs()
    return sizes


def _at_boundaries(found, expected, steps, slack):
    """Assert that codes differ by one at most, and only where `steps`, exact to `slack` and the
    rounding of 1 / scale and the product with it, may lie on either side of a boundary."""
    apart = (found.short() - expected.short()).abs()
    beyond = (steps - steps.floor() - 0.5).abs()
    assert apart.max() <= 1
    assert (beyond[apart > 0] <= (slack + 2**-22 * steps.abs())[apart > 0]).all()


@needs_kernels
@settings(max_examples=120)
@given(convolutions())
def test_random_convolutions_equal_the_reference(drawn):
    agrees(*conv_arguments(**drawn))


@needs_kernels
@settings(max_examples=40)
@given(convolutions())
def test_results_are_requantized_to_the_same_codes(drawn):
    ranges = ["all", "sample", "row"][drawn["seed"] % 3]
    agrees(*conv_arguments(**drawn, requantize=ranges))


@needs_kernels
@pytest.mark.parametrize("requantize", [None, "sample"])
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "none"])
def test_activations_are_applied_to_the_whole_sum(activation, requantize):
    given, reference = conv_arguments(size=(12, 12), channels=(20, 8), requantize=requantize)
    far = 8 * given["residual"]  # from deep in one tail to the other
    given["residual"] = reference["residual"] = far
    found = agrees(given, reference, activation)
    assert len(found.unique()) > 30


@needs_kernels
def test_other_activations_are_refused():
    with pytest.raises(RuntimeError, match="no activation relu"):
        kernels.cpu_conv(**conv_arguments()[0], activation="relu")


@needs_kernels
def test_requantized_results_fill_the_grid():
    found = agrees(*conv_arguments(channels=(40, 20), requantize="sample"))
    assert len(found.unique()) > 30 and found.max() <= 250  # not all clamped


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("packed", [(False, True), (True, True), (False, False)])
def test_work_is_shared_without_a_trace(threads, count, packed):
    """More pixels than a task takes, and three panels; threads write what one would."""
    given, reference = conv_arguments(
        batch=3, size=(19, 17), channels=(8, 12), out=130, packed=packed, ranges=("row", "sample")
    )
    threads(count)
    assert torch.equal(agrees(given, reference), kernels.cpu_conv(**given))


@needs_kernels
def test_the_widest_sums_do_not_saturate():
    """255 * -128 over 4 taps of 1024 channels, and the largest codes of 4 bits."""
    given, reference = conv_arguments(
        channels=(1024, 1024), taps=(2, 2), packed=(False, True), bias=False, row=False
    )
    given["xs"][0].fill_(255), reference["xs"][0].fill_(127)
    weight = torch.full((20, 2, 2, 1024), -128, dtype=torch.int8)
    given["weights"][0], reference["weights"][0] = kernels.panels(weight), weight
    reference["offsets"][0] = given["offsets"][0] - 128 * 128 * 4 * 1024
    agrees(given, reference)


@needs_kernels
@pytest.mark.parametrize("shape, strides", [
    ((3, 1, 1, 8), (8, 3, 5, 1)), ((3, 4, 1, 8), (64, 16, 1, 1)), ((1, 1, 6, 8), (7, 7, 24, 1)),
])  # fmt: skip
def test_sides_of_one_pixel_may_have_any_stride(shape, strides):
    given, reference = conv_arguments(batch=shape[0], size=shape[1:3], taps=(1, 1))
    odd = torch.zeros(2000, dtype=torch.uint8).as_strided(shape, strides)
    given["xs"] = [odd.copy_(given["xs"][0])]
    agrees(given, reference)


@needs_kernels
def test_other_layouts_and_dtypes_are_refused():
    given, _ = conv_arguments()
    x = given["xs"][0]
    wrong = [
        ({"xs": [x.transpose(1, 2)]}, "pixels evenly apart"),
        ({"xs": [x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)]}, "channels last"),
        ({"xs": [x[..., :6]]}, "in fours"),
        ({"xs": [x[:, :-1]]}, "pixels evenly apart"),
        ({"xs": [x.char()]}, "expected scalar type Byte"),
        ({"row": given["row"].bfloat16()}, "summands in its dtype"),
        ({"residual": given["residual"].transpose(1, 2)}, "contiguous summands"),
    ]
    for changes, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            kernels.cpu_conv(**{**given, **changes})


def test_panels_hold_every_weight_once():
    weight = torch.randint(-128, 128, (70, 3, 2, 8), dtype=torch.int8)
    made = kernels.panels(weight)
    assert made.shape == (2, 6, 2, 64, 4) and made.is_contiguous()
    assert made[1, 3, 1, 5].tolist() == weight[69, 1, 1, 4:].tolist()
    assert not made[1, :, :, 6:].any()
    codes = torch.randint(0, 16, (70, 3, 2, 8), dtype=torch.uint8)
    packed, whole = kernels.packed_panels(codes), kernels.panels(codes).flatten(3)
    assert packed.shape == (2, 6, 2, 128) and packed.is_contiguous()
    assert torch.equal(packed & 15, whole[..., :128]) and torch.equal(packed >> 4, whole[..., 128:])


def same_codes(given):
    """Assert that the codes of a norm are those of exact arithmetic, but at boundaries.

    The kernel computes x * a + b with a and b from sums of n squares in float32: a is exact to
    n / 2 * 2**-24, where squares are of distances to the first pixel more by the ratio of these to
    the variance; b, and either rounded, to 2**-23 of their sizes. SiLU multiplies that by 1.1 at
    most, and adds 2**-21 of itself.
    """
    found = kernels.cpu_norm(**given)
    x, exact = given["x"].double(), dict(given)
    for name in ("weight", "bias", "factor", "shift"):
        exact[name] = None if given[name] is None else given[name].double()
    value, size = x, torch.zeros_like(x)
    if given["groups"]:
        n = x[0, ..., 0].numel()
        images = x.permute(0, 3, 1, 2)
        grouped = images.unflatten(1, (given["groups"], -1)).flatten(2)
        mean, spread = grouped.mean(2), grouped.var(2, correction=0) + given["eps"]
        first = images[:, :, 0, 0].unflatten(1, (given["groups"], -1))
        ratio = 1 + (first - mean[..., None]).square().amax(2) / spread
        off = ((ratio * n + 8) * 2**-24).repeat_interleave(first.shape[2], 1)[:, None, None]
        each = x.shape[3] // given["groups"]
        a = spread.rsqrt().repeat_interleave(each, 1)[:, None, None]
        shift = mean.repeat_interleave(each, 1)[:, None, None]
        if exact["weight"] is not None:
            a = a * exact["weight"]
        value = (x - shift) * a  # F.group_norm refuses a single value
        if exact["bias"] is not None:
            value = value + exact["bias"]
        if exact["factor"] is not None:
            value, a = (v * exact["factor"][:, None, None] for v in (value, a))
        if exact["shift"] is not None:
            value = value + exact["shift"][:, None, None]
        size = off * value.abs() + 2**-22 * ((x * a).abs() + (value - x * a).abs())
        size = size + off * ((x - shift) * a).abs()
    if given["silu"]:
        value = F.silu(value)
        size = 1.1 * size + 2**-21 * value.abs()
    left, right, top, bottom = given["pads"]
    inner = found[:, top : found.shape[1] - bottom, left : found.shape[2] - right]
    assert found.shape == (len(x), top + x.shape[1] + bottom, left + x.shape[2] + right, x.shape[3])
    start, border = 0, torch.ones(found.shape[1:3], dtype=torch.bool)
    border[top : found.shape[1] - bottom, left : found.shape[2] - right] = False
    for scale, zero, count in zip(given["scales"], given["zeros"], given["sizes"], strict=True):
        run = slice(start, start + count)
        steps = value[..., run] / scale.double()[:, None, None, None]
        codes = (steps.round() + zero).clamp(0, given["levels"])
        slack = size[..., run] / scale[:, None, None, None]
        _at_boundaries(inner[..., run], codes, steps, slack)
        assert (found[:, border][..., run] == zero).all()
        start += count
    return found


@needs_kernels
@settings(max_examples=120)
@given(norms())
def test_random_norms_give_the_codes_of_exact_arithmetic(drawn):
    same_codes(norm_arguments(**drawn))


@needs_kernels
@settings(max_examples=60)
@given(norms(), st.floats(0, 1))
def test_parts_are_normed_as_their_concatenation_is(drawn, cut):
    given = norm_arguments(**drawn)
    whole, x = kernels.cpu_norm(**given), given["x"]
    if x.shape[3] > 1:
        first = 1 + int(cut * (x.shape[3] - 2))
        parts = [part.contiguous() for part in x.split([first, x.shape[3] - first], 3)]
        found = kernels.cpu_norm(**{**given, "x": parts[0]}, more=parts[1])
        assert torch.equal(found, whole)


@needs_kernels
@pytest.mark.parametrize("silu", [True, False])
def test_norms_agree_with_the_reference_of_the_graph(silu):
    given = norm_arguments(size=(24, 20), width=30, runs=2, silu=silu)
    found = kernels.cpu_norm(**given)
    expected = group_norm_quantize_reference(**given, dtype=torch.uint8)
    apart = (found.short() - expected.short()).abs()
    # values are exact to some 1e-6, and codes some 0.03 wide
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3


@needs_kernels
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mean, deviation", [(0.0, 1.0), (1000.0, 0.3), (-1000.0, 1e-3)])
def test_statistics_do_not_cancel(threads, count, mean, deviation):
    threads(count)
    found = same_codes(norm_arguments(
        size=(24, 30), mean=mean, deviation=deviation, silu=False, modulated=False, affine=False
    ))  # fmt: skip
    assert len(found.unique()) > 50


@needs_kernels
@pytest.mark.parametrize("settings", [
    {"size": (1, 1)}, {"size": (1, 1), "width": 1}, {"groups": 7, "width": 1}, {"deviation": 0.0},
    {"groups": 1, "width": 1, "size": (1, 1)}, {"groups": 0, "width": 70, "runs": 2, "mean": 0.0},
    {"groups": 0, "silu": False, "mean": 1e9}, {"groups": 0, "silu": True, "mean": -1e9},
])  # fmt: skip
def test_the_ends_of_what_is_normed(settings):
    same_codes(norm_arguments(**settings))


@needs_kernels
def test_a_modulation_is_not_rounded_to_the_inputs_dtype():
    given = norm_arguments(dtype=torch.bfloat16, size=(20, 20), groups=8, width=20)
    assert given["factor"].dtype == torch.float32
    same_codes(given)


@needs_kernels
def test_norms_refuse_other_layouts():
    given = norm_arguments()
    with pytest.raises(RuntimeError, match="contiguous"):
        kernels.cpu_norm(**{**given, "x": given["x"].transpose(1, 2)})
    with pytest.raises(RuntimeError, match="contiguous modulation"):
        wide = given["factor"].repeat_interleave(2, 1)[:, ::2]
        kernels.cpu_norm(**{**given, "factor": wide})


def attended(batch=2, heads=3, queries=13, keys=17, width=8, out=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = [(queries, width), (keys, width), (keys, out or width)]
    return [torch.randn(batch, heads, *s, generator=generator).to(dtype) for s in sizes]


def near(q, k, v, scale=None):
    """Assert that attention is that of float64 but for products of bfloat16.

    Rounding is off by 2**-9 / sqrt(3), some 1e-3, of each of q, k, the softmax and v: some 2e-3, or
    54 dB, together; four times that is allowed.
    """
    found = kernels.cpu_attention(q, k, v, scale or q.shape[-1] ** -0.5)
    given = (x.double() for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*given, scale=scale)
    assert found.dtype == q.dtype and found.shape == expected.shape
    assert found.transpose(1, 2).is_contiguous()
    assert sqnr(expected, found) > 40
    return found


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 5, 8, 16, 40, 64, 160])
def test_attention_is_that_of_torch(width, dtype):
    near(*attended(width=width, dtype=dtype))


@needs_kernels
@pytest.mark.parametrize("queries, keys", [
    (1, 1), (1, 77), (77, 1), (7, 511), (7, 512), (7, 513), (33, 1031), (600, 600), (6, 15),
])  # fmt: skip
@pytest.mark.parametrize("width", [5, 64])
def test_any_number_of_queries_and_keys(queries, keys, width):
    near(*attended(queries=queries, keys=keys, width=width))


@needs_kernels
@pytest.mark.parametrize("count", [1, 3])
def test_heads_are_shared_among_threads(threads, count):
    threads(count)
    for batch, heads, queries in ((1, 1, 40), (1, 2, 5), (3, 5, 9)):
        near(*attended(batch, heads, queries, out=24, width=12), scale=0.37)


@needs_kernels
def test_heads_may_lie_interleaved_or_apart():
    q, k, v = attended(queries=17)
    merged = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)  # (B, L, 3, H, D)
    parts = [x.transpose(1, 2) for x in merged.unbind(2)]
    assert not any(x.is_contiguous() for x in parts)
    assert torch.equal(near(*parts), near(q, k, v))
    assert torch.equal(near(q[:, :, ::2], k[:, :1].expand_as(k), v), near(
        q[:, :, ::2].contiguous(), k[:, :1].expand_as(k).contiguous(), v
    ))  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_large_scores_do_not_overflow(sign):
    """One key of 600 with a score 1e3 above that of the others, all of them large."""
    q, k, v = attended(queries=10, keys=600, width=16)
    k, q = torch.zeros_like(k), torch.zeros_like(q)
    q[..., 0], k[..., 0] = 1.0, sign * 5e4
    chosen = torch.arange(10) * 59
    q[:, :, torch.arange(10), 1 + torch.arange(10)] = 1.0
    k[:, :, chosen, 1 + torch.arange(10)] = 1e3
    found = kernels.cpu_attention(q, k, v, 1.0)
    # 2^0 comes out 7e-5 low: the one weight is 1 in bfloat16, what they are divided by is not
    torch.testing.assert_close(found, v[:, :, chosen].bfloat16().float(), rtol=1e-4, atol=0)


@needs_kernels
def test_equal_scores_average():
    q, k, v = attended(keys=513)
    found = kernels.cpu_attention(q * 0, k, torch.ones_like(v), 1.0)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-4, atol=0)  # as above


@needs_kernels
@pytest.mark.parametrize("op, arguments", [
    ("cpu_conv", conv_arguments(stride=(2, 1), dilation=(1, 2), dtype=torch.bfloat16)[0]),
    ("cpu_conv", conv_arguments(channels=(8, 4), requantize="row")[0]),
    ("cpu_norm", norm_arguments(runs=2, pads=(1, 0, 2, 3))),
    ("cpu_norm", norm_arguments(groups=0, dtype=torch.bfloat16)),
    ("cpu_norm", norm_arguments(width=1, groups=4, runs=1) | {"sizes": [9], "weight": None,
     "bias": None, "factor": None, "shift": None, "groups": 3, "more": torch.randn(2, 5, 7, 5)}),
    ("cpu_attention", dict(zip("qkv", attended(out=12), strict=True)) | {"scale": 0.3}),
])  # fmt: skip
def test_the_ops_pass_torchs_own_checks(op, arguments):
    given = tuple(arguments.values())
    kind = getattr(kernels, op)
    torch.library.opcheck(kind, given, test_utils=("test_schema", "test_faketensor"))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = kind(*given)
    found = kind(*given)
    for read in (torch.Tensor.stride, torch.Tensor.size, lambda x: x.dtype):
        assert read(fake) == read(found)


FLAGS = "avx512f avx512bw avx512vl avx512_vnni avx512_bf16"


@pytest.fixture
def machine(monkeypatch):
    """Says what the machine is, forgotten when the test ends."""

    def say(platform="linux", machine="x86_64", flags=FLAGS):
        monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(kernels.platform, "machine", lambda: machine)
        monkeypatch.setattr(kernels, "processor", lambda: f"Some CPU {flags}")
        kernels.unavailable.cache_clear()

    yield say
    kernels.unavailable.cache_clear()


@pytest.mark.parametrize("what, reason", [
    ({}, None),
    ({"platform": "darwin", "machine": "arm64"}, "need Linux on x86-64, this is darwin arm64"),
    ({"machine": "aarch64"}, "this is linux aarch64"),
    ({"flags": "avx512f avx512bw avx512vl avx512_bf16x"}, "need avx512_vnni, avx512_bf16, which"),
])  # fmt: skip
def test_processors_that_lack_instructions_are_told_so(machine, what, reason):
    machine(**what)
    found = kernels.unavailable()
    assert found is None if reason is None else reason in found


def test_loading_where_the_kernels_cannot_run_says_why(machine):
    machine(flags="sse2")
    with pytest.raises(BackendError, match="need avx512f, avx512bw"):
        kernels.load.__wrapped__()


def test_a_system_that_does_not_tell_is_no_machine_for_them(machine, monkeypatch):
    machine()

    def fail():
        raise OSError("no /proc")

    monkeypatch.setattr(kernels, "processor", fail)
    kernels.unavailable.cache_clear()
    assert kernels.unavailable() == "what the processor can do is not known: no /proc"


def test_rough_powers_are_as_exact_as_bfloat16_asks():
    """The polynomials of the source, evaluated in float64 over their domain."""
    source = library.sources()
    r = torch.linspace(-0.5, 0.5, 4001, dtype=torch.float64)
    for name, bound in (("exp2", 2e-7), ("rough_exp2", 1e-4)):
        body = source.partition(f"Floats {name}(")[2].partition("return scaled")[0]
        terms = [float(part.partition("f)")[0]) for part in body.split("floats(")[1:]]
        value = torch.zeros_like(r)
        for term in (t for t in terms if t > 0):
            value = value * r + term
        assert (value / 2**r - 1).abs().max() < bound
    assert math.log2(math.e) == pytest.approx(float(
        source.partition("LOG2E = ")[2].partition("f;")[0]
    ), rel=2**-23)  # fmt: skip


# ---- both builds of the same source

needs_both = pytest.mark.skipif(
    kernels.unavailable() is not None, reason="this processor runs the plain build alone"
)


def both(name, **arguments):
    """The results of the processor's instructions and of plain C++."""
    kernels.load()
    kernels.load_plain()
    native, plain = (getattr(torch.ops, space) for space in ("tfmq_fx", "tfmq_fx_plain"))
    return getattr(native, name)(**arguments), getattr(plain, name)(**arguments)


@needs_both
@pytest.mark.parametrize("requantize", [None, "row"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_builds_convolve_to_the_same_bits(activation, requantize, dtype):
    given, _ = conv_arguments(
        size=(7, 9), channels=(20, 8), out=70, packed=(True, False), requantize=requantize,
        dtype=dtype,
    )  # fmt: skip
    native, plain = both("cpu_conv", **given, activation=activation)
    assert torch.equal(native, plain)


@needs_both
@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_builds_normalize_to_the_same_codes(groups, dtype):
    given = norm_arguments(groups=groups, width=23, size=(9, 11), runs=2, dtype=dtype)
    assert torch.equal(*both("cpu_norm", **given))


@needs_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_builds_attend_alike(dtype):
    """More keys than a step takes, and odd sizes. Processors may add the two products of a `dot` in
    either order, which can round a weight to its neighbour in bfloat16: 2**-8 of it, and the result
    is a mean of values by weights that then sum to 1 again."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, n, d, generator=generator).to(dtype)
        for n, d in ((13, 40), (531, 40), (531, 23))
    )
    native, plain = both("cpu_attention", q=q, k=k, v=v, scale=0.2)
    assert (native.float() - plain.float()).abs().max() <= 2**-8 * v.abs().max()
    assert sqnr(plain.double(), native.double()) > 60
