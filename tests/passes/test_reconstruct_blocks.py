"""reconstruct_blocks: blocks are learnt in execution order, and none ends worse than it began."""

import pytest
import torch
from torch import nn

from tests.ir.test_sites import graph_of
from tests.passes.test_quantize_layers import (
    FP8,
    TIMES,
    W4A8,
    quantize,
    relative_error,
    toy_batches,
)
from tests.passes.test_round_weights import Edge, two_timesteps
from tests.toys import SharedTwice, ToyUNet, seeded
from tfmq_fx.calibration.executor import LayerwiseExecutor
from tfmq_fx.core.config import ReconstructionSpec
from tfmq_fx.core.layer_config import LayerConfig, WeightSpec
from tfmq_fx.ir.reconstruction_units import units
from tfmq_fx.ir.sites import find_sites
from tfmq_fx.passes.reconstruct_blocks import reconstruct_blocks
from tfmq_fx.passes.round_weights import round_weights
from tfmq_fx.quant.quant_layer import QuantLayer

W3 = LayerConfig(weights=WeightSpec(bits=3))


@pytest.fixture(scope="module")
def toy():
    return graph_of(seeded(ToyUNet).eval(), 3, 8, 8)


def learnt(gm, layers=W3, iters=20, batches=None, second_order=False, spec=None, **kwargs):
    batches = list(toy_batches()) if batches is None else batches
    spec = ReconstructionSpec() if spec is None else spec
    given = quantize(gm, layers, batches, TIMES).gm
    if second_order:
        plan = {s.name: layers for s in find_sites(gm)[0]}
        given = round_weights(given, reference=gm, chunks=batches, plan=plan, spec=spec).gm
    done = reconstruct_blocks(given, reference=gm, chunks=batches, spec=spec, iters=iters, **kwargs)
    return given, done


@pytest.mark.parametrize("second_order", [False, True])
def test_no_block_ends_worse_than_it_began(toy, second_order):
    given, done = learnt(toy, second_order=second_order)
    errors = done.details["error"]
    best = {p: min(e, key=lambda k: (e[k], k != "before")) for p, e in errors.items()}
    assert done.changed == sum(form != "before" for form in best.values())
    assert {d.site: d.reason for d in done.declined} == {
        p: f"learnt rounding is no better ({errors[p]['after']:.4g}): kept "
        f"{'what it had' if form == 'before' else 'nearest rounding'} ({errors[p][form]:.4g})"
        for p, form in best.items()
        if form != "after"
    }
    members = {u.path: u.sites for u in units(find_sites(given)[0])}
    for path, form in best.items():
        for site in members[path]:
            same = done.gm.get_submodule(site.name) is site.layer
            assert same == (form == "before")


def test_outputs_come_nearer_to_full_precision(toy):
    given, done = learnt(toy, iters=60)
    assert done.changed > 8
    error = relative_error(done.gm, toy, toy_batches())
    assert error < 0.7 * relative_error(given, toy, toy_batches())


def test_fp8_weights_stay_and_biases_move(toy):
    given, done = learnt(toy, layers=FP8, iters=20)
    assert done.changed > 0
    assert relative_error(done.gm, toy, toy_batches()) < relative_error(given, toy, toy_batches())
    for name, layer in given.named_modules():
        if isinstance(layer, QuantLayer):
            made = done.gm.get_submodule(name)
            assert torch.equal(made.codes, layer.codes) and made.spec() == layer.spec()
            assert torch.equal(made.weight_scale, layer.weight_scale)


def test_blocks_are_learnt_in_execution_order(toy):
    _, done = learnt(toy, iters=1)
    expected = [u.path for u in units(find_sites(toy)[0])]
    assert list(done.details["error"]) == expected
    assert expected.index("mid2") < expected.index("up2") < expected.index("up1")


def test_it_is_deterministic_for_a_seed_and_leaves_its_input_alone(toy):
    given, a = learnt(toy, iters=3)
    before = {k: v.clone() for k, v in given.state_dict().items()}
    _, b = learnt(toy, iters=3)
    state = a.gm.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in b.gm.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in given.state_dict().items())


def test_sites_to_skip_are_left(toy):
    given, done = learnt(toy, iters=2, skip=("conv_in", "attention.qkv", "attention.out"))
    for name in ("conv_in", "attention.qkv", "attention.out"):
        assert done.gm.get_submodule(name) is given.get_submodule(name)
    assert not {"conv_in", "attention"} & set(done.details["error"])


def test_integer_inputs_are_rounded_while_weights_are_learnt(toy):
    given, done = learnt(toy, layers=W4A8, iters=20)
    assert done.changed > 0
    assert done.gm.get_submodule("mid1.conv1").act_bits == 8
    error = relative_error(done.gm, toy, toy_batches())
    assert error < relative_error(given, toy, toy_batches())


@pytest.mark.parametrize("quantize_inputs", [True, False])
def test_weights_are_learnt_with_activations_as_the_configuration_says(
    toy, quantize_inputs, monkeypatch
):
    seen = []

    class Spying(LayerwiseExecutor):
        def __init__(self, gm, chunks, **kwargs):
            seen.append(gm)
            super().__init__(gm, chunks, **kwargs)

    monkeypatch.setattr("tfmq_fx.passes.reconstruct_blocks.LayerwiseExecutor", Spying)
    spec = ReconstructionSpec(quantize_inputs=quantize_inputs)
    given, done = learnt(toy, layers=W4A8, iters=20, spec=spec)
    walked = {m.act_bits for m in seen[1].modules() if isinstance(m, QuantLayer)}
    assert walked == ({8} if quantize_inputs else {None})
    # learnt either way, and integer inputs are what is left in the end
    assert done.changed > 8
    assert {s.layer.act_bits for s in find_sites(done.gm)[0]} == {8}
    error = relative_error(done.gm, toy, toy_batches())
    assert error < relative_error(given, toy, toy_batches())
    for site in find_sites(seen[1])[0]:  # what was walked is what was learnt
        assert torch.equal(site.layer.codes, done.gm.get_submodule(site.name).codes)


def test_both_ways_of_learning_differ(toy):
    a, b = (
        learnt(toy, layers=W4A8, iters=5, spec=ReconstructionSpec(quantize_inputs=q))[1]
        for q in (True, False)
    )
    assert a.details["error"] != b.details["error"]


@pytest.mark.parametrize("learning_rate", [1e30, 1e8, 3e-2])
@pytest.mark.parametrize("factor", [1.0, 1e18])
@pytest.mark.parametrize("count", [1, 8])
def test_degenerate_and_diverging_blocks_end_finite_and_no_worse(learning_rate, factor, count):
    gm = graph_of(seeded(Edge).eval(), 1, 1, 1)
    gm.one.weight.data.mul_(1 / factor)
    gm.last.weight.data.mul_(factor)
    x = factor * torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    batches = [(x, torch.ones(count, dtype=torch.long))]
    spec = ReconstructionSpec(learning_rate=learning_rate)
    _, done = learnt(gm, iters=10, batches=batches, spec=spec)
    for name, value in done.gm.state_dict().items():
        assert bool(torch.isfinite(value).all()), name
    for path, error in done.details["error"].items():
        assert error["before"] < 1, path  # finite, and targets so large that squares overflow
    if learning_rate > 1:
        assert done.declined and all(": kept " in d.reason for d in done.declined)


def test_a_block_whose_learning_stops_says_why(monkeypatch):
    gm = graph_of(seeded(Interleaved).eval(), 4)
    spec = ReconstructionSpec(learning_rate=1e30)
    given, done = learnt(gm, iters=10, batches=small_batches(), spec=spec)
    reasons = {d.site: d.reason for d in done.declined}
    assert "the loss became inf at step 1 of 10: kept " in reasons["wide.0"]
    assert relative_error(done.gm, gm, small_batches()) <= relative_error(
        given, gm, small_batches()
    )


def test_nan_in_the_data_leaves_blocks_as_they_were():
    gm = graph_of(seeded(Interleaved).eval(), 4)
    batches = small_batches()
    given = quantize(gm, W3, batches, TIMES).gm
    batches[0][0][3, 1] = float("nan")
    done = reconstruct_blocks(
        given, reference=gm, chunks=batches, spec=ReconstructionSpec(), iters=5
    )
    assert done.changed == 0 and len(done.declined) == 6
    assert all("the loss became nan" in d.reason for d in done.declined)
    assert all("kept what it had (nan)" in d.reason for d in done.declined)


class Interleaved(nn.Module):
    """Layers kept in lists by kind, called in turns: no list is a region of the graph."""

    def __init__(self):
        super().__init__()
        self.wide = nn.ModuleList(nn.Linear(4, 8) for _ in range(3))
        self.narrow = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))

    def forward(self, x, t):
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = x + narrow(torch.tanh(wide(x)))
        return x * t[:, None]


def small_batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 4, generator=generator), torch.arange(16) % 4) for _ in range(2)]


def test_layers_in_lists_that_take_turns_are_learnt_one_by_one():
    gm = graph_of(seeded(Interleaved).eval(), 4)
    given, done = learnt(gm, iters=40, batches=small_batches())
    order = [f"{kind}.{i}" for i in range(3) for kind in ("wide", "narrow")]
    assert list(done.details["error"]) == order
    error = relative_error(done.gm, gm, small_batches())
    assert error < relative_error(given, gm, small_batches())


def test_a_layer_called_several_times_is_declined_by_reason():
    gm = graph_of(seeded(SharedTwice).eval(), 4)
    _, done = learnt(gm, iters=2, batches=small_batches())
    (declined,) = done.declined
    assert done.changed == 0 and "called 3 times" in declined.reason


def test_the_timestep_that_is_visited_more_often_is_learnt_better():
    gm, x, t = two_timesteps()
    batches = [(x, t)]
    errors = []
    for often in (0, 1):
        weights = [torch.where(t == often, 1.8, 0.2)]
        _, done = learnt(gm, iters=300, batches=batches, weights=weights)
        errors.append(
            [relative_error(done.gm, gm, [(x[t == step], t[t == step])]) for step in (0, 1)]
        )
    first, second = errors
    assert first[0] < second[0] and second[1] < first[1]


def test_neither_equal_weights_nor_what_waits_on_disk_changes_anything(toy):
    batches = list(toy_batches())
    ones = [torch.ones(len(t)) for _, t in batches]
    states = [
        learnt(toy, layers=W4A8, iters=5, batches=batches, **kwargs)[1].gm.state_dict()
        for kwargs in ({}, {"weights": ones}, {"spec": ReconstructionSpec(memory=1)})
    ]
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())


class WritesItsInput(nn.Module):
    """A block that adds to its input in place."""

    def __init__(self):
        super().__init__()
        self.block = nn.Module()
        self.block.first, self.block.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, t):
        h = torch.tanh(x) * t[:, None]
        return h + self.block.second(self.block.first(h.add_(1.0)))


@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_inputs_written_in_place_are_the_same_in_every_step(memory):
    gm = graph_of(seeded(WritesItsInput).eval(), 4)
    spec = ReconstructionSpec(memory=memory)
    given, done = learnt(gm, iters=60, batches=small_batches(), spec=spec)
    error = relative_error(done.gm, gm, small_batches())
    assert error < relative_error(given, gm, small_batches())
