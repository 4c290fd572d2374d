"""round_weights: every layer is rounded on what it will see, to give the full-precision output."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from tests.ir.test_sites import graph_of
from tests.passes.test_quantize_layers import (
    FP8,
    STATIC,
    TIMES,
    W4A8,
    W8,
    quantize,
    relative_error,
    toy_batches,
)
from tests.strategies import WIDTH, GraphBuilder, draw_inputs
from tests.toys import ToyUNet, seeded
from tfmq_fx.api import prepare
from tfmq_fx.conversion.convert import convert
from tfmq_fx.core.config import ReconstructionSpec, TemporalSpec
from tfmq_fx.core.errors import CalibrationError
from tfmq_fx.core.layer_config import LayerConfig, WeightSpec
from tfmq_fx.core.presets import PRESETS
from tfmq_fx.ir.sites import find_sites
from tfmq_fx.passes.round_weights import round_layer, round_weights
from tfmq_fx.quant.gptq import round_second_order
from tfmq_fx.quant.input_statistics import InputStatistics
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.serialization.checkpoint import with_rounded_state

W3 = LayerConfig(weights=WeightSpec(bits=3))


@pytest.fixture(scope="module")
def toy():
    return graph_of(seeded(ToyUNet).eval(), 3, 8, 8)


def rounded(gm, layers, batches=None, spec=None, **kwargs):
    """(quantized to nearest, rounded) for every site by `layers`."""
    batches = list(toy_batches()) if batches is None else batches
    nearest = quantize(gm, layers, batches, TIMES).gm
    done = round_weights(
        nearest,
        reference=gm,
        chunks=batches,
        plan={s.name: layers for s in find_sites(gm)[0]},
        spec=ReconstructionSpec() if spec is None else spec,
        **kwargs,
    )
    return nearest, done


@pytest.mark.parametrize("layers", [W3, W4A8])
def test_outputs_come_nearer_to_full_precision(toy, layers):
    nearest, done = rounded(toy, layers)
    sites, _ = find_sites(toy)
    assert done.changed == len(sites) and not done.declined
    fresh = [
        (x.flip(0) + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), t)
        for x, t in toy_batches()
    ]
    # second-order rounding gains some 5 dB; ask for a third of the error power off, on other data
    assert relative_error(done.gm, toy, fresh) < relative_error(nearest, toy, fresh) * 2 / 3


def calls_of(gm, names, batches):
    """What every call of these layers got and gave: name -> [(arguments, output)]."""
    found = {name: [] for name in names}
    hooks = [
        gm.get_submodule(name).register_forward_hook(
            lambda _, given, output, name=name: found[name].append((given, output))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            gm(*batch)
    for hook in hooks:
        hook.remove()
    return found


def test_the_chosen_rounding_of_each_layer_is_never_worse_than_nearest(toy):
    """Measured on the layers that came out: their outputs on what they see, against the output of
    full precision, and those of the same layer rounded to nearest."""
    batches = list(toy_batches())
    nearest, done = rounded(toy, W4A8, batches)
    names = [s.name for s in find_sites(toy)[0]]
    assert set(done.details["error"]) == set(names)
    wanted, seen = calls_of(toy, names, batches), calls_of(done.gm, names, batches)

    def error(layer, name):
        with torch.no_grad():
            return sum(
                float((layer(*given) - full).square().sum())
                for (given, _), (_, full) in zip(seen[name], wanted[name], strict=True)
            )

    ratios = {
        name: error(done.gm.get_submodule(name), name) / error(nearest.get_submodule(name), name)
        for name in names
    }
    # the damping of the statistics, a hundredth of them, is all that what is chosen by misses
    assert max(ratios.values()) < 1.01, ratios
    assert sum(ratio < 0.9 for ratio in ratios.values()) > 0.9 * len(ratios), ratios


def test_it_is_deterministic_for_a_seed(toy):
    a, b = (rounded(toy, W4A8)[1].gm for _ in range(2))
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


def test_fp8_weights_are_rounded_to_nearest_and_their_biases_corrected(toy):
    nearest, done = rounded(toy, FP8)
    errors = done.details["error"]
    assert {form for e in errors.values() for form in e} == {"given", "nearest"}
    assert done.changed == len(errors) and not done.declined
    for name in ("mid1.conv1", "attention.qkv"):
        layer, given = done.gm.get_submodule(name), nearest.get_submodule(name)
        assert layer.spec() == given.spec() and layer.weight_codes().dtype == torch.float8_e4m3fn
        assert not torch.equal(layer.bias, given.bias)
    # aligning weights and means takes a tenth off what rounding to nearest in place leaves
    found, before = (relative_error(gm, toy, toy_batches()) for gm in (done.gm, nearest))
    assert found < 0.9 * before


def test_the_quantized_graph_that_is_given_stays_as_it_was(toy):
    batches = list(toy_batches())
    nearest = quantize(toy, W4A8, batches, TIMES).gm
    before = {k: v.clone() for k, v in nearest.state_dict().items()}
    plan = {s.name: W4A8 for s in find_sites(toy)[0]}
    round_weights(nearest, reference=toy, chunks=batches, plan=plan, spec=ReconstructionSpec())
    assert all(torch.equal(v, before[k]) for k, v in nearest.state_dict().items())


def test_the_bias_takes_up_the_mean_of_the_error():
    b = GraphBuilder()
    gm = b.finish(b.layer("proj", nn.Linear(WIDTH, 3), b.x))
    x = torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(0)) + 2
    batches = [(x, draw_inputs(gm, 500)["t"])]
    nearest, done = rounded(gm, W3, batches)
    with torch.no_grad():
        wanted, found = gm(*batches[0])[0].mean(0), done.gm(*batches[0])[0].mean(0)
        plain = nearest(*batches[0])[0].mean(0)
    # The mean is right up to float32: sums of 500 rows of 4 products below 5 * 0.5 * 4 each.
    assert float((found - wanted).abs().max()) <= 10 * 2**-20
    assert float((plain - wanted).abs().max()) > 0.01


def test_a_channel_of_massive_mean_leaves_the_rounding_of_the_others_as_good():
    def error(mean):
        """Mean squared error of the output, apart from that of rounding the input."""
        b = GraphBuilder()
        layer = nn.Linear(64, 32)
        gm = b.finish(b.layer("proj", layer, b.call(torch.tile, b.x, (1, 64 // WIDTH))))
        generator = torch.Generator().manual_seed(0)
        mixed = torch.randn(2000, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
        x = mixed + 0.1 * torch.randn(2000, 64, generator=generator)
        x[:, 3] += mean
        made = quantize(gm, W3, [(torch.zeros(2, WIDTH), torch.tensor([0, 0]))], TIMES).gm
        proj, found = made.get_submodule("proj"), InputStatistics.empty(layer.weight.detach()[None])
        found.add_sums(found.sums(x[None], x[None]))
        (state,) = round_layer("proj", proj, found, W3, ReconstructionSpec()).states.values()
        with torch.no_grad():
            return float((with_rounded_state(proj, state)(x) - layer(x)).square().mean())

    # an output of about 700 is good to 2^-14 in float32, and some codes come out differently
    assert error(3000) < 1.5 * error(0) < 0.1


def test_sites_that_were_rounded_elsewhere_are_left(toy):
    nearest, done = rounded(toy, W4A8, skip=("mid1.conv1", "conv_in"))
    for name in ("mid1.conv1", "conv_in"):
        assert done.gm.get_submodule(name) is nearest.get_submodule(name)
    assert {d.site for d in done.declined} == {"mid1.conv1", "conv_in"}
    assert {d.reason for d in done.declined} == {"rounded elsewhere, or in floating point"}


def test_an_all_zero_layer_and_an_all_zero_input_are_fine():
    b = GraphBuilder()
    h = b.layer("dead", nn.Linear(WIDTH, WIDTH), b.x)
    gm = b.finish(b.layer("after", nn.Linear(WIDTH, WIDTH), h))
    gm.get_submodule("dead").weight.data.zero_()
    gm.get_submodule("dead").bias.data.zero_()
    batches = [tuple(draw_inputs(gm, 16).values())]
    _, done = rounded(gm, W3, batches)
    found = done.gm(*batches[0])[0]
    # nothing but the bias is left
    torch.testing.assert_close(found, gm.get_submodule("after").bias.detach().expand(16, WIDTH))


class Edge(nn.Module):
    """A convolution of every extent of 1, an all-zero one and a linear layer; x (B, 1, 1, 1)."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(1, 4, 1)
        self.zero = nn.Conv2d(4, 4, 3, padding=1)
        self.constant = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.unfed = nn.Linear(4, 4)
        self.last = nn.Conv2d(4, 1, 1)
        nn.init.zeros_(self.zero.weight)
        nn.init.constant_(self.constant.weight[1:3], 0.3)

    def forward(self, x, t):
        h = torch.tanh(self.one(x))
        h = h + self.zero(h) + self.constant(h)
        unfed = self.unfed(torch.zeros_like(h).movedim(1, -1)).movedim(-1, 1)
        return self.last(h + unfed) * t[:, None, None, None]


def output_error(gm, reference, batches):
    with torch.no_grad():
        return sum(
            float((gm(*b)[0].double() - reference(*b)[0].double()).square().sum()) for b in batches
        )


@pytest.mark.parametrize("layers", [W3, W4A8])
@pytest.mark.parametrize("factor", [1.0, 1e18, 1e-18])
@pytest.mark.parametrize("count", [1, 8])
def test_degenerate_layers_end_finite_and_no_worse_than_nearest(layers, factor, count):
    gm = graph_of(seeded(Edge).eval(), 1, 1, 1)
    gm.one.weight.data.mul_(1 / factor)
    gm.last.weight.data.mul_(factor)
    generator = torch.Generator().manual_seed(0)
    x = factor * torch.randn(count, 1, 1, 1, generator=generator)
    batches = [(x, torch.ones(count, dtype=torch.long))]
    nearest, done = rounded(gm, layers, batches)
    for name, value in done.gm.state_dict().items():
        assert bool(torch.isfinite(value).all()), name
    # nothing but float32 rounding on top of what nearest loses, where that is next to nothing
    power = output_error(gm, lambda x, t: (torch.zeros(()),), batches)
    assert output_error(done.gm, gm, batches) <= output_error(nearest, gm, batches) + 1e-12 * power
    assert all(min(e.values()) >= 0 for e in done.details["error"].values())


@pytest.mark.parametrize("broken", ["cholesky", "codes"])
def test_a_layer_whose_second_order_rounding_fails_stays_as_it_was(toy, broken, monkeypatch):
    tried = []

    def failing(part, gram, grid, *, damping):
        tried.append(damping)
        if len(part) == 3:  # conv_out
            if broken == "cholesky":
                torch.linalg.cholesky(-torch.eye(2))
            return torch.full_like(part, math.nan)
        return round_second_order(part, gram, grid, damping=damping)

    monkeypatch.setattr("tfmq_fx.passes.round_weights.round_second_order", failing)
    nearest, done = rounded(toy, W4A8)
    (declined,) = done.declined
    assert declined.site == "conv_out" and declined.reason.endswith(": kept what it had")
    assert "linalg.cholesky" in declined.reason or "its codes are not finite" in declined.reason
    assert tried[-3:] == [0.01, 0.1, 1.0] and 0.1 not in tried[:-3]
    assert done.gm.get_submodule("conv_out") is nearest.get_submodule("conv_out")
    assert done.changed == len(find_sites(toy)[0]) - 1


def test_more_damping_helps_first(toy, monkeypatch):
    def failing(part, gram, grid, *, damping):
        if damping < 0.05:
            torch.linalg.cholesky(-torch.eye(2))
        return round_second_order(part, gram, grid, damping=damping)

    monkeypatch.setattr("tfmq_fx.passes.round_weights.round_second_order", failing)
    nearest, done = rounded(toy, W4A8)
    assert done.changed == len(find_sites(toy)[0]) and not done.declined
    assert relative_error(done.gm, toy, toy_batches()) < relative_error(nearest, toy, toy_batches())


def test_refined_codes_are_taken_where_they_are_better(toy):
    _, plain = rounded(toy, W3)
    _, done = rounded(toy, W3, spec=ReconstructionSpec(refine=3))
    errors = done.details["error"]
    assert all(e["refined"] <= e["second-order"] * (1 + 1e-5) for e in errors.values())
    assert relative_error(done.gm, toy, toy_batches()) < relative_error(
        plain.gm, toy, toy_batches()
    )


@pytest.mark.parametrize("group_size", [2, 4])
def test_weights_in_groups_of_channels_are_rounded_better_than_to_nearest(toy, group_size):
    layers = LayerConfig(weights=WeightSpec(bits=3, group_size=group_size))
    nearest, done = rounded(toy, layers)
    assert done.gm.get_submodule("mid1.conv1").weight_scale.shape == (32, 32 // group_size)
    assert relative_error(done.gm, toy, toy_batches()) < relative_error(nearest, toy, toy_batches())


def test_nan_in_the_data_names_the_layer():
    b = GraphBuilder()
    gm = b.finish(b.layer("proj", nn.Linear(WIDTH, 3), b.x))
    x, t = draw_inputs(gm, 8).values()
    x[1, 1] = float("nan")
    with pytest.raises(CalibrationError, match="the inputs of proj hold NaN or Inf"):
        nearest = quantize(gm, W8, [], TIMES).gm
        plan = {"proj": W8}
        round_weights(nearest, reference=gm, chunks=[(x, t)], plan=plan, spec=ReconstructionSpec())


def test_it_follows_other_sizes_than_those_of_capture():
    model = seeded(ToyUNet).eval()
    example = (torch.randn(2, 3, 8, 8), torch.tensor([1, 2]))
    config = dataclasses.replace(PRESETS["w8a8"], temporal=TemporalSpec(mode="table"))
    for size in (4, 16):
        prepared = prepare(model, example, timesteps=4, dynamic=("batch", "spatial"), config=config)
        for x, t in toy_batches(size=size):
            prepared(x, t)
        converted = convert(prepared, progress=False)
        assert relative_error(converted, model, toy_batches(size=size)) < 1e-2


def test_quantized_layers_are_new_and_integers(toy):
    nearest, done = rounded(toy, STATIC)
    for site in find_sites(done.gm)[0]:
        assert isinstance(site.layer, QuantLayer)
        assert site.layer is not nearest.get_submodule(site.name)
        assert site.layer.codes.dtype == torch.uint8


class Constant(nn.Module):
    """Two linear layers; the first always sees the same input, as one guidance scale gives."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(32, 32)
        self.out = nn.Linear(32, 8)

    def forward(self, x, t):
        same = torch.linspace(-3, 50, 32) + 0 * x
        return self.out(torch.tanh(self.scale(same)) + x * t[:, None])


def test_inputs_that_never_change_do_not_steer_the_weights():
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    model = seeded(Constant).eval()
    prepared = prepare(model, (x, torch.ones(40)), timesteps=[1.0], config="w4a8")
    prepared(x, torch.ones(40))
    done = convert(prepared, progress=False)
    given = torch.linspace(-3, 50, 32).expand(1, 32)
    layer = done.gm.scale
    with torch.no_grad():
        error = layer(given, done.gm.activation_scales[:, 0]) - model.scale(given)
        norm = model.scale(given).norm()
        change = (layer.weight - model.scale.weight).norm() / model.scale.weight.norm()
    # The bias takes up the mean, so that what the layer was given is answered up to rounding; the
    # weights are those of the model, less what 1e-6 of sums of squares of 50 can move against 1e-4
    # of their mean (a few per cent), not what fits the noise (all of them).
    assert float(error.norm() / norm) < 1e-3
    assert float(change) < 0.1


def two_timesteps(samples=200):
    """A layer, and inputs that lie in other directions at t = 0 than at t = 1."""
    b = GraphBuilder()
    gm = b.finish(b.layer("proj", nn.Linear(WIDTH, 3), b.x))
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(2, WIDTH, WIDTH, generator=generator)
    t = torch.arange(samples) % 2
    x = torch.randn(samples, WIDTH, generator=generator)
    x = torch.where(t[:, None] == 0, x @ mix[0], x @ mix[1])
    return gm, x, t.to(draw_inputs(gm, 1)["t"].dtype)


def test_the_timestep_that_is_visited_more_often_is_rounded_better():
    gm, x, t = two_timesteps()
    batches = [(x[:120], t[:120]), (x[120:], t[120:])]
    errors = []
    for often in (None, 0, 1):
        weights = None
        if often is not None:
            weights = [torch.where(part == often, 1.8, 0.2) for _, part in batches]
        _, done = rounded(gm, W3, batches, weights=weights)
        errors.append(
            [relative_error(done.gm, gm, [(x[t == step], t[t == step])]) for step in (0, 1)]
        )
    equal, first, second = errors
    assert first[0] < second[0] and second[1] < first[1]
    assert first[0] <= equal[0] and second[1] <= equal[1]
    assert first[0] < equal[0] or second[1] < equal[1]


def test_equal_weights_change_nothing(toy):
    batches = list(toy_batches())
    ones = [torch.ones(len(t)) for _, t in batches]
    plain, same = (rounded(toy, W4A8, batches, weights=w)[1].gm for w in (None, ones))
    for (name, a), b in zip(plain.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("memory", [1, 20_000])
def test_what_waits_on_disk_changes_nothing(toy, memory):
    spec = ReconstructionSpec(memory=memory)
    plain, same = (rounded(toy, W4A8, spec=s)[1].gm for s in (None, spec))
    for (name, a), b in zip(plain.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
