"""Fusions of the CUDA lowering: each finds its pattern, leaves others alone, and changes no number
beyond rounding. On the CPU the kernels' references run."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.toys import seeded, tiny_unet2d
from tfmq_fx.backends.cuda import fuse as fusions
from tfmq_fx.backends.cuda import lower as lowering
from tfmq_fx.backends.cuda.fuse_norms import norm_codes
from tfmq_fx.backends.cuda.layers import ConcatLayer, dynamic_scale, quantize_input
from tfmq_fx.backends.cuda.trial import Choice, untried
from tfmq_fx.capture import capture
from tfmq_fx.config import ActivationSpec, LayerConfig, WeightSpec
from tfmq_fx.dialect import Stage, check
from tfmq_fx.graph import fork, prune
from tfmq_fx.observers import Ranges
from tfmq_fx.passes.fold_timesteps import fold_timesteps
from tfmq_fx.passes.quantize_layers import quantize_layers
from tfmq_fx.passes.split_concat import split_concat
from tfmq_fx.sites import find_sites

TIMES = (0, 3, 7)
C = 16  # channels of the nets below
EIGHT = LayerConfig(weights=WeightSpec(search=1), activations=ActivationSpec())
TOP = torch.tensor([2.0, 3.0, 4.0])  # of every layer's input at each timestep


class Net(nn.Module):
    """function(net, x, row), between two convolutions; row (B, C) depends on the timestep."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        self.embed = nn.Linear(4, C)
        self.enter = nn.Conv2d(3, C, 3, padding=1)
        self.leave = nn.Conv2d(C, 3, 3, padding=1)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x, t):
        row = self.embed(torch.cos(t[:, None].float() * torch.arange(1, 5, device=t.device)))
        return self.leave(torch.tanh(self.function(self, self.enter(x), row)))


def conv(size=3, width=C, out=C, **options):
    return nn.Conv2d(width, out, size, padding=size // 2, **options)


def net(function, **layers):
    """layers: makers, called in the order given."""
    return seeded(lambda: Net(function, **{name: make() for name, make in layers.items()})).eval()


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 3, 6, 6, generator=generator), torch.full((4,), t)) for t in TIMES]


def whole_sums(problem, dtype):
    """A choice of kernels that do not share sums: only they take a second segment."""
    choice = untried(problem, dtype)
    return dataclasses.replace(choice, tile=choice.tile._replace(split=1))


def captured(model, dynamic=()):
    """The graph of a net, its sizes fixed: free ones take five times as long."""
    x, t = data()[0]
    return capture(model, {"x": x, "t": t}, timestep="t", dynamic=dynamic).gm


def quantized(gm, layers=EIGHT, plan=None):
    """A captured graph with its embedding in a table, layers of concatenations split, and all
    others quantized on one range."""
    keys = torch.tensor(TIMES)
    gm = split_concat(gm, only=[site.name for site in find_sites(gm)[0]]).gm
    gm = fold_timesteps(gm, timesteps=keys).gm
    sites = [site.name for site in find_sites(gm)[0]]
    ranges = dict.fromkeys(sites, Ranges(-TOP, TOP, 0))
    whole = dict.fromkeys(sites, layers) | (plan or {})
    return quantize_layers(gm, plan=whole, ranges=ranges, timesteps=keys).gm


def lowered(model, monkeypatch, layers=EIGHT, plan=None, choose=whole_sums, dynamic=()):
    """The lowered graph of a model before it is fused."""
    with monkeypatch.context() as patch:
        patch.setattr(lowering, "fuse", lambda gm: {})
        gm = quantized(captured(model, dynamic), layers, plan)
        return lowering.lower(gm, choose=choose, capability=(9, 0)).gm


def apply(gm, *names):
    """A copy of a lowered graph after fusions, and what each of them counted."""
    done, counts = fork(gm), []
    with torch.no_grad():
        for name in names:
            counts.append(getattr(fusions, name)(done))
            prune(done.graph)
    done.delete_all_unused_submodules()
    done.recompile()
    done.meta["stage"] = Stage.LOWERED
    check(done, Stage.LOWERED)
    return done, counts


def results(gm, calls=None):
    with torch.no_grad():
        return [gm(x, t)[0] for x, t in calls or data(seed=1)]


def assert_same(gm, other):
    """Equal, bit for bit."""
    for found, expected in zip(results(gm), results(other), strict=True):
        assert torch.equal(found, expected)


def assert_near(gm, other):
    """Equal but for how float32 sums are rounded: a code of the last layer's input may fall on the
    other side."""
    for found, expected in zip(results(gm), results(other), strict=True):
        assert (found - expected).abs().max() <= code_step(other) + 1e-5
        assert (found - expected).abs().median() < 1e-6


def code_step(gm):
    """What one code of the last layer's input changes in the output at most."""
    weight = gm.leave.weight.float().abs() * gm.leave.weight_scale[:, None, None, None]
    return float(gm.activation_scales.max() * weight.max())


def count(gm, target):
    return len(gm.graph.find_nodes(op="call_function", target=target))


# ---------------------------------------------------------------- what changes nothing


def test_views_that_channels_last_refuses_become_reshapes(monkeypatch):
    def function(m, x, row):
        y = m.a(x).view(x.shape[0] * 4, -1)  # merges the batch with channels
        return y.view(x.shape[0], C, 6, 6) + row.view(-1, C, 1, 1)

    gm = quantized(captured(net(function, a=conv)))
    base = lowered(net(function, a=conv), monkeypatch)
    with pytest.raises(RuntimeError, match="view"):
        results(base)
    done, counts = apply(base, "loosen_views")
    assert counts == [3]
    # of the quantized layers, that compute the same up to float rounding
    for found, expected in zip(results(done), results(gm), strict=True):
        assert (found - expected).abs().max() <= code_step(base) + 1e-5


def test_a_view_that_is_written_stays(monkeypatch):
    def function(m, x, row):
        y = x.clone()
        y.view(-1, C, 36).mul_(2.0)
        return m.a(y)

    base = lowered(net(function, a=conv), monkeypatch)
    assert apply(base, "loosen_views")[1] == [0]


def test_operations_without_effect_go(monkeypatch):
    def function(m, x, row):
        y = F.dropout(m.drop(m.a(x)) / 1.0, 0.1, m.training)
        y = m.same(y) * 1 + 1 * x
        return m.b(y.permute(0, 2, 3, 1).permute(0, 3, 1, 2).contiguous())

    layers = {"a": conv, "b": conv, "drop": lambda: nn.Dropout(0.1), "same": nn.Identity}
    base = lowered(net(function, **layers), monkeypatch)
    done, counts = apply(base, "drop_noops")
    assert counts == [7]
    assert_same(done, base)


def test_what_only_seems_to_have_no_effect_stays(monkeypatch):
    def function(m, x, row):
        y = m.a(x) / 1.0
        part = y[:, :4]
        part += 1.0  # of memory that is not a's
        z = 1.0 / (y * y + 1.0)
        return (z * 2).contiguous().sin()

    base = lowered(net(function, a=conv), monkeypatch)
    assert apply(base, "drop_noops")[1] == [0]


# ---------------------------------------------------------------- shared codes


def three(m, x, row):
    tokens = x.flatten(2).transpose(1, 2)
    y = m.q(tokens) * m.k(tokens) + m.v(tokens)
    return y.transpose(1, 2).reshape(x.shape)


LINEARS = {name: lambda: nn.Linear(C, C) for name in "qkv"}


@pytest.mark.parametrize(
    "acts",
    [ActivationSpec(), ActivationSpec(per_timestep=False), ActivationSpec(format="fp8")],
    ids=["per timestep", "static", "fp8"],
)
def test_layers_that_read_the_same_share_its_codes(monkeypatch, acts):
    layers = LayerConfig(weights=WeightSpec(search=1, format=acts.format), activations=acts)
    base = lowered(net(three, **LINEARS), monkeypatch, layers)
    done, counts = apply(base, "share_quantize")
    assert counts == [2] and count(base, quantize_input) == 5 and count(done, quantize_input) == 3
    calls = [done.graph.find_nodes(op="call_module", target=name) for name in "qkv"]
    assert len({call.args for (call,) in calls}) == 1
    assert_same(done, base)


def test_ranges_measured_at_run_time_are_measured_once(monkeypatch):
    layers = dataclasses.replace(EIGHT, activations=ActivationSpec(dynamic=True))
    base = lowered(net(lambda m, x, row: m.a(x) * m.b(x), a=conv, b=conv), monkeypatch, layers)
    done, counts = apply(base, "share_quantize")
    assert counts == [1] and count(base, dynamic_scale) == 4 and count(done, dynamic_scale) == 3
    assert_same(done, base)


def test_codes_that_differ_are_not_shared(monkeypatch):
    four = dataclasses.replace(EIGHT, activations=ActivationSpec(bits=4))
    model = net(three, **LINEARS)
    base = lowered(model, monkeypatch, plan={"k": four})
    assert apply(base, "share_quantize")[1] == [1]  # of q and v
    base = lowered(model, monkeypatch)
    base.activation_scales[1, 2] *= 2  # of one layer at one timestep
    assert apply(base, "share_quantize")[1] == [1]


def test_codes_of_what_is_written_in_between_or_has_other_borders_are_not_shared(monkeypatch):
    def function(m, x, row):
        y = torch.sin(x)
        z = m.a(y)
        y[:, :4] += 1.0
        return z * m.b(y) + m.c(x) * m.d(x)

    layers = {"a": conv, "b": conv, "c": conv, "d": lambda: conv(1)}
    base = lowered(net(function, **layers), monkeypatch)
    assert apply(base, "share_quantize")[1] == [0]


# ---------------------------------------------------------------- concatenations


def shortcut(m, x, row):
    return m.a(torch.cat([x, torch.sin(x)], 1)) + m.b(x)


@pytest.mark.parametrize("size", [1, 3])
def test_parts_of_a_concatenation_run_as_one_kernel(monkeypatch, size):
    model = net(shortcut, a=lambda: conv(size, 2 * C), b=lambda: conv(1))
    base = lowered(model, monkeypatch)
    done, counts = apply(base, "skip_concat", "merge_concat", "absorb_residuals")
    assert counts == [2, 1, 1] and count(done, torch.cat) == 0
    assert isinstance(done.get_submodule("a.0_1"), ConcatLayer)
    assert not hasattr(done.a, "0")
    assert_near(done, base)


def test_linear_parts_and_static_ranges_merge_too(monkeypatch):
    def function(m, x, row):
        tokens = x.flatten(2).transpose(1, 2)
        y = m.a(torch.cat([tokens, tokens * 2], -1))
        return y.transpose(1, 2).reshape(x.shape)

    model = net(function, a=lambda: nn.Linear(2 * C, C))
    static = dataclasses.replace(EIGHT, activations=ActivationSpec(per_timestep=False))
    base = lowered(model, monkeypatch, plan={"a.0": static, "a.1": static})
    done, counts = apply(base, "skip_concat", "merge_concat")
    assert counts == [2, 1]
    assert_near(done, base)
    mixed = lowered(model, monkeypatch, plan={"a.1": static})  # ranges of one sample, and of all
    assert apply(mixed, "merge_concat")[1] == [0]


def test_parts_that_are_called_twice_are_merged_once(monkeypatch):
    def function(m, x, row):
        y = m.a(torch.cat([x, torch.sin(x)], 1))
        return m.a(torch.cat([torch.sin(y), x], 1))

    base = lowered(net(function, a=lambda: conv(3, 2 * C)), monkeypatch)
    done, counts = apply(base, "skip_concat", "merge_concat")
    assert counts == [4, 2] and len(done.graph.find_nodes(op="call_module", target="a.0_1")) == 2
    assert [name for name, _ in done.a.named_children()] == ["0_1"]
    assert_near(done, base)


def test_the_sum_of_two_parts_takes_a_third(monkeypatch):
    def function(m, x, row):
        return m.a(torch.cat([x, torch.sin(x), torch.cos(x)], 1))

    base = lowered(net(function, a=lambda: conv(3, 3 * C)), monkeypatch)
    done, counts = apply(base, "skip_concat", "merge_concat", "absorb_residuals")
    assert counts == [3, 1, 1]
    (both,) = done.graph.find_nodes(op="call_module", target="a.0_1")
    assert both.kwargs["residual"].target == "a.2"
    assert_near(done, base)


def test_layers_that_one_kernel_cannot_run_stay_apart(monkeypatch):
    def function(m, x, row):
        y = m.a(x)
        one = m.b(x) + m.c(x)  # two biases
        two = y + m.d(x)  # y is read again
        three = m.d(one) + m.e(one)  # other taps
        return one + two + three + y

    layers = {"a": conv, "b": conv, "c": conv, "d": lambda: conv(bias=False), "e": lambda: conv(1)}
    base = lowered(net(function, **layers), monkeypatch)
    assert apply(base, "merge_concat")[1] == [0]

    def shared(problem, dtype):
        return Choice("triton", untried(problem, dtype).tile._replace(split=2))

    base = lowered(net(shortcut, a=lambda: conv(3, 2 * C), b=conv), monkeypatch, choose=shared)
    assert apply(base, "merge_concat")[1] == [0]


def test_only_a_part_that_is_taken_whole_replaces_a_concatenation(monkeypatch):
    def function(m, x, row):
        both = torch.cat([x, torch.sin(x)], 1)
        wide = torch.cat([x, torch.sin(x)], 2)
        rows = (
            wide.narrow(2, 0, 6) + wide.narrow(2, 3, 6) + torch.cat([x, x], 0).narrow(1, 0, C)[:4]
        )
        return m.a(both.narrow(1, C, C)) + m.b(both.narrow(1, 4, C)) + rows

    base = lowered(net(function, a=conv, b=conv), monkeypatch)
    done, counts = apply(base, "skip_concat")
    assert counts == [2]  # the second half of both, the first of wide
    assert_same(done, base)


# ---------------------------------------------------------------- rows and residuals


ROWS = {
    "index": lambda m, x, row: m.a(x) + row[:, :, None, None],
    "other order": lambda m, x, row: torch.add(row.unsqueeze(-1).unsqueeze(-1), m.a(x)),
    "method": lambda m, x, row: m.a(x).add(row.reshape(-1, C, 1, 1)),
    "linear": lambda m, x, row: (m.b(x.flatten(2).mT) + row[:, None]).mT.reshape(x.shape),
}


@pytest.mark.parametrize("function", ROWS.values(), ids=ROWS)
def test_rows_of_a_sample_are_added_by_the_layer(monkeypatch, function):
    base = lowered(net(function, a=conv, b=lambda: nn.Linear(C, C)), monkeypatch)
    done, counts = apply(base, "absorb_rows")
    assert counts == [1]
    assert_same(done, base)


OTHER_ROWS = {
    "of all samples": lambda m, x, row: m.a(x) + m.fixed,
    "of places": lambda m, x, row: m.a(x) + x.mean(1, keepdim=True),
    "scaled": lambda m, x, row: torch.add(m.a(x), row[:, :, None, None], alpha=2),
    "read twice": lambda m, x, row: (y := m.a(x)) + row[:, :, None, None] + torch.sin(y),
    "of another dtype": lambda m, x, row: (m.a(x) + row.double()[:, :, None, None]).float(),
    "of channels": lambda m, x, row: (
        m.b(x.flatten(2).mT).mT.reshape(x.shape) + row[:, :, None, None]
    ),
}


@pytest.mark.parametrize("function", OTHER_ROWS.values(), ids=OTHER_ROWS)
def test_other_sums_are_no_rows(monkeypatch, function):
    model = net(function, a=conv, b=lambda: nn.Linear(C, C))
    model.fixed = nn.Parameter(torch.ones(1, C, 1, 1))
    assert apply(lowered(model, monkeypatch), "absorb_rows")[1] == [0]


RESIDUALS = {
    "block": lambda m, x, row: x + m.a(m.drop(torch.tanh(m.a(x)))),
    "row before": lambda m, x, row: (m.a(x) + row[:, :, None, None]) + x,
    "row after": lambda m, x, row: (m.a(x) + x) + row[:, :, None, None],
    "tokens": lambda m, x, row: (
        x + m.b(torch.tanh(x).flatten(2).transpose(1, 2)).transpose(-1, -2).reshape(x.shape)
    ),
    "tokens of an image": lambda m, x, row: (
        m.b(torch.tanh(x).permute(0, 2, 3, 1).reshape(-1, 36, C))
        .reshape(-1, 6, 6, C)
        .permute(0, 3, 1, 2)
        .contiguous()
        + x
    ),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_residuals_are_added_by_the_layer(monkeypatch, name):
    layers = {"a": conv, "b": lambda: nn.Linear(C, C), "drop": lambda: nn.Dropout(0.1)}
    base = lowered(net(RESIDUALS[name], **layers), monkeypatch)
    done, counts = apply(base, "absorb_rows", "absorb_residuals", "absorb_rows")
    expected = {"row before": [1, 1, 0], "row after": [0, 1, 1]}
    assert counts == expected.get(name, [0, 1, 0])
    assert_same(done, base)


def test_of_two_layers_the_later_one_takes_the_other(monkeypatch):
    base = lowered(net(lambda m, x, row: m.a(x) + m.b(x), a=conv, b=lambda: conv(1)), monkeypatch)
    done, counts = apply(base, "absorb_residuals")
    (later,) = done.graph.find_nodes(op="call_module", target="b")
    assert counts == [1] and later.kwargs["residual"].target == "a"
    assert_same(done, base)


def test_other_sums_are_no_residuals(monkeypatch):
    def function(m, x, row):
        y = m.a(x)
        z = torch.add(m.a(y), x, alpha=2)
        z = m.a(z) + z.mean(0, keepdim=True)
        z = torch.sin(z)
        z[:, :4] += m.a(x)[:, :4]
        z = z + m.b(x.flatten(2).mT).reshape(x.shape)  # no image: tokens as channels
        return ((y + z) * y.double()).float()

    layers = {"a": conv, "b": lambda: nn.Linear(C, C)}
    base = lowered(net(function, **layers), monkeypatch)
    assert apply(base, "absorb_residuals")[1] == [0]


# ---------------------------------------------------------------- norms


def norm(channels=C):
    return nn.GroupNorm(4, channels)


class Norm32(nn.GroupNorm):
    """Normalises in float32 whatever it is given."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


def modulated(m, x, row):
    scale, shift = row[:, :, None, None], x.mean((2, 3), keepdim=True)
    return m.a(F.silu(m.norm(x) * (1 + scale) + shift))


def attention(m, x, row):
    tokens = m.norm(x.view(-1, C, 36)).transpose(1, 2)
    return (m.q(tokens) * m.k(tokens)).mT.reshape(x.shape)


NORMS = {
    "modules": lambda m, x, row: m.a(m.drop(m.silu(m.norm(x)))),
    "functions": lambda m, x, row: m.a(
        F.silu(F.group_norm(x, 4, weight=m.norm.weight, eps=1e-3), inplace=True)
    ),
    "alone": lambda m, x, row: m.a(m.norm(x)),
    "sigmoid": lambda m, x, row: m.a((y := m.norm(x)) * torch.sigmoid(y)),
    "float32": lambda m, x, row: m.a(m.silu(m.norm32(x))),
    "shift": lambda m, x, row: m.a(row[:, :, None, None] + m.norm(x)),
    "modulated": modulated,
    "places": attention,
    "images as tokens": lambda m, x, row: m.q(
        m.norm(x).permute(0, 2, 3, 1).reshape(-1, 36, C)
    ).mT.reshape(x.shape),
    "parts": lambda m, x, row: m.wide(m.silu(m.norm_wide(torch.cat([x, torch.sin(x)], 1)))),
}
NORM_LAYERS = {
    "a": conv,
    "wide": lambda: conv(3, 2 * C),
    "q": lambda: nn.Linear(C, C),
    "k": lambda: nn.Linear(C, C),
    "norm": norm,
    "norm_wide": lambda: norm(2 * C),
    "norm32": lambda: Norm32(4, C, affine=False),
    "silu": lambda: nn.SiLU(inplace=True),
    "drop": lambda: nn.Dropout(0.1),
}


@pytest.mark.parametrize("function", NORMS.values(), ids=NORMS)
def test_norms_make_the_codes_of_what_reads_them(monkeypatch, function):
    base = lowered(net(function, **NORM_LAYERS), monkeypatch)
    done, counts = apply(base, "drop_noops", "share_quantize", "fuse_norms")
    assert counts[-1] == 1 and count(done, norm_codes) == 1
    left = {type(done.get_submodule(n.target)) for n in done.graph.find_nodes(op="call_module")}
    assert not left & {nn.GroupNorm, nn.SiLU} and count(done, F.group_norm) == 0
    assert_near(done, base)


@pytest.mark.parametrize("acts", [ActivationSpec(per_timestep=False), ActivationSpec(format="fp8")])
def test_norms_make_codes_of_every_kind(monkeypatch, acts):
    layers = LayerConfig(weights=WeightSpec(search=1, format=acts.format), activations=acts)
    plan = {"a": layers, "wide.0": layers, "wide.1": layers}

    def function(m, x, row):
        return NORMS["modules"](m, x, row) + NORMS["parts"](m, x, row)

    base = lowered(net(function, **NORM_LAYERS), monkeypatch, plan=plan)
    done, counts = apply(base, "drop_noops", "fuse_norms")
    assert counts[-1] == 2
    assert_near(done, base)


def test_parts_of_other_sizes_of_grid_make_their_own_codes(monkeypatch):
    four = dataclasses.replace(EIGHT, activations=ActivationSpec(bits=4))
    base = lowered(net(NORMS["parts"], **NORM_LAYERS), monkeypatch, plan={"wide.1": four})
    assert apply(base, "fuse_norms")[1] == [0]


OTHER_NORMS = {
    "read twice": lambda m, x, row: m.a(y := m.norm(x)) + y,
    "other activation": lambda m, x, row: m.a(torch.tanh(m.norm(x))),
    "scaled by place": lambda m, x, row: m.a(m.norm(x) * x),
    "gate read twice": lambda m, x, row: m.a((y := m.norm(x)) * (g := torch.sigmoid(y))) + g,
    "two borders": lambda m, x, row: m.a(y := m.norm(x)) + m.c(y),
    "part of the channels": lambda m, x, row: m.d(m.norm(x).narrow(1, 0, 8)),
    "channels twice": lambda m, x, row: (
        m.d((y := m.norm(x)).narrow(1, 0, 8)) + m.d(y.narrow(1, 4, 8))
    ),
    "rows": lambda m, x, row: m.a(m.norm(x).narrow(2, 0, 3).repeat(1, 1, 2, 1)),
    "channels as tokens": lambda m, x, row: m.q(m.norm(x).reshape(-1, 36, C)).reshape(x.shape),
    "images as channels": lambda m, x, row: m.a(m.norm(x).transpose(2, 3)),
}


@pytest.mark.parametrize("function", OTHER_NORMS.values(), ids=OTHER_NORMS)
def test_other_uses_of_norms_are_left_alone(monkeypatch, function):
    layers = NORM_LAYERS | {"c": lambda: conv(1), "d": lambda: conv(3, 8)}
    base = lowered(net(function, **layers), monkeypatch)
    done, counts = apply(base, "drop_noops", "share_quantize", "fuse_norms")
    assert counts[-1] == 0
    assert_same(done, base)


def test_norms_of_what_is_written_meanwhile_stay(monkeypatch):
    def function(m, x, row):
        y = torch.sin(x)
        z = m.norm(y)
        y[:, :4] += 1.0
        return m.a(z) + y

    base = lowered(net(function, a=conv, norm=norm), monkeypatch)
    assert apply(base, "fuse_norms")[1] == [0]


def test_modules_with_hooks_stay(monkeypatch):
    model = net(NORMS["modules"], **NORM_LAYERS)
    for name in ("norm", "drop"):
        model.get_submodule(name).register_forward_hook(lambda module, args, y: 2 * y)
    base = lowered(model, monkeypatch)
    done, counts = apply(base, "drop_noops", "fuse_norms")
    assert counts == [0, 0]
    assert_same(done, base)


# ---------------------------------------------------------------- chains


def test_layers_that_follow_each_other_pass_codes_on(monkeypatch):
    def function(m, x, row):
        y = m.c(m.b(m.a(x) + x))  # a needs no border, c does
        tokens = y.flatten(2).transpose(1, 2)
        return m.v(m.q(tokens) + row[:, None]).mT.reshape(x.shape)

    layers = {"a": conv, "b": lambda: conv(1), "c": conv} | LINEARS
    base = lowered(net(function, **layers), monkeypatch)
    expected = results(base)  # the layers that give codes belong to both graphs
    done, counts = apply(base, "absorb_rows", "absorb_residuals", "requantize")
    assert counts == [1, 1, 2]
    for found, value in zip(results(done), expected, strict=True):
        assert torch.equal(found, value)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, row: m.c(y := m.b(torch.sin(x))) + torch.sin(y),
        lambda m, x, row: m.c(m.c(torch.sin(x))),
        lambda m, x, row: m.a(m.c(torch.sin(x))),
    ],
    ids=["read twice", "called twice", "border"],
)
def test_other_layers_give_no_codes(monkeypatch, function):
    layers = {"a": conv, "b": lambda: conv(1), "c": lambda: conv(1)}
    base = lowered(net(function, **layers), monkeypatch)
    assert apply(base, "requantize")[1] == [0]


# ---------------------------------------------------------------- whole models


def block(m, x, row):
    """A residual block that is modulated by the timestep, then attention over all pixels."""
    scale, shift = row[:, :, None, None].chunk(2, 1)
    y = m.a(F.silu(m.norm(x))) + scale.repeat(1, 2, 1, 1)
    y = x + m.b(F.silu(m.norm(y) * (1 + row[:, :, None, None]) + shift.repeat(1, 2, 1, 1)))
    tokens = m.norm(y.view(y.shape[0], C, -1)).transpose(1, 2)
    return y + m.q(tokens).transpose(1, 2).reshape(y.shape)


def test_sizes_may_be_free(monkeypatch):
    layers = {"a": conv, "b": conv, "q": lambda: nn.Linear(C, C), "norm": norm}
    base = lowered(net(block, **layers), monkeypatch, dynamic=("batch", "spatial"))
    done = fork(base)
    with torch.no_grad():
        found = fusions.fuse(done)
    done.recompile()
    assert found["absorb_rows"] == 1 and found["absorb_residuals"] == 2 and found["fuse_norms"] == 3
    assert_near(done, base)
    generator = torch.Generator().manual_seed(0)
    others = [(torch.randn(3, 3, 4, 10, generator=generator), torch.tensor(TIMES))]
    for found, expected in zip(results(done, others), results(base, others), strict=True):
        assert (found - expected).abs().max() <= code_step(base) + 1e-5


def test_a_unet_of_diffusers_is_fused_throughout(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    calls = [(torch.randn(2, 3, 16, 16, generator=generator), torch.full((2,), t)) for t in TIMES]
    named = dict(zip(("sample", "timestep"), calls[0], strict=True))
    gm = quantized(capture(tiny_unet2d(), named, timestep="timestep", dynamic=()).gm)
    done = lowering.lower(gm, choose=whole_sums, capability=(9, 0))
    # 8 residual blocks and 4 of attention, and the last norm.  Two layers of 4 blocks read
    # concatenations, and the first one of the time embedding sines and cosines.
    assert done.declined == []
    assert done.details["fused"] == {
        "loosen_views": 16,
        "drop_noops": 25,
        "share_quantize": 8,  # of query, key and value
        "skip_concat": 8,
        "merge_concat": 9,
        "absorb_rows": 8,
        "absorb_residuals": 12,
        "fuse_norms": 21,
        "requantize": 0,
    }
    with monkeypatch.context() as patch:
        patch.setattr(lowering, "fuse", lambda gm: {})
        base = lowering.lower(gm, choose=whole_sums, capability=(9, 0)).gm
    for found, expected in zip(results(done.gm, calls[:1]), results(base, calls[:1]), strict=True):
        # codes that were rounded the other way change what comes after them
        assert (found - expected).square().mean() < 1e-3 * expected.square().mean()
