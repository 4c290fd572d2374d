"""change_timesteps: computed rows are exact, measured ones are kept or interpolated, and nothing is
made up."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.adapters import Denoiser
from tests.passes.test_fold_timesteps import unet
from tests.passes.test_quantize_layers import W8A8, observe
from tests.passes.test_quantize_products import batches as product_batches
from tests.passes.test_quantize_products import spec as product_spec
from tests.passes.test_quantize_products import with_choices
from tests.strategies import STEPS, captured_graphs, draw_inputs
from tests.toys import ToyDiT, seeded
from tfmq_fx.calibration.output_errors import measure_errors
from tfmq_fx.calibration.product_ranges import measure_products
from tfmq_fx.capture.capture import capture
from tfmq_fx.core.errors import ConfigError, InputError
from tfmq_fx.core.layer_config import LayerConfig, WeightSpec
from tfmq_fx.core.stages import stage_of
from tfmq_fx.ir.subgraphs import compute_rows
from tfmq_fx.ir.temporal_block import temporal_block
from tfmq_fx.passes.change_timesteps import change_timesteps
from tfmq_fx.passes.correct_outputs import CORRECTION, correct_outputs
from tfmq_fx.passes.decompose_attention import decompose_attention
from tfmq_fx.passes.fold_timesteps import fold_timesteps
from tfmq_fx.passes.quantize_layers import SCALES, quantize_layers
from tfmq_fx.passes.quantize_products import SCALES as PRODUCT_SCALES
from tfmq_fx.passes.quantize_products import quantize_products
from tfmq_fx.passes.quantize_tables import quantize_tables
from tfmq_fx.quant.activation import QuantActivation
from tfmq_fx.quant.affine import shared_zero_scales

OTHER = torch.tensor([1, 3, 8, 499, 999, 4])


def rows_of(gm, timesteps):
    block = temporal_block(gm)
    values = compute_rows(block.graph, timesteps.sort().values)
    return {f.name: v for f, v in zip(block.features, values, strict=True)}


def same(a, b):
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name])
        for name in first
    )


@pytest.fixture(scope="module")
def net():
    model = seeded(Denoiser).eval()
    return capture(model, {"x": torch.randn(2, 4), "t": torch.tensor([1, 2])}, timestep="t").gm


@pytest.fixture(scope="module")
def scaled(net):
    """Layers quantized over timesteps 0, 10 and 20: all, and those that folding leaves."""
    generator = torch.Generator().manual_seed(0)
    times = torch.tensor([0, 10, 20])
    data = [
        (torch.randn(8, 4, generator=generator) * (1 + t), torch.full((8,), t))
        for t in times.tolist()
    ]
    ranges = observe(net, data, times)
    plan = dict.fromkeys(ranges, W8A8)
    return [
        quantize_layers(gm, plan=plan, ranges=ranges, timesteps=times)
        for gm in (net, fold_timesteps(net, timesteps=times).gm)
    ]


# ---------------------------------------------------------------- features


@settings(deadline=None, max_examples=12)
@given(gm=captured_graphs(), seed=st.integers(0, 99))
def test_given_rows_make_what_folding_for_these_timesteps_makes(gm, seed):
    done = change_timesteps(
        fold_timesteps(gm, timesteps=STEPS).gm, timesteps=OTHER, rows=rows_of(gm, OTHER)
    )
    expected = fold_timesteps(gm, timesteps=OTHER).gm
    assert same(done.gm, expected) and done.gm.code == expected.code
    assert torch.equal(done.gm.meta["timesteps"], OTHER.sort().values)
    assert done.details["kept"] == 2 and done.details["interpolated"] == 0
    x, _, *more = draw_inputs(gm, 1, seed).values()
    for step in OTHER.tolist():
        inputs = (x, torch.tensor([step]), *more)
        for found, wanted in zip(done.gm(*inputs), gm(*inputs), strict=True):
            assert torch.equal(found, wanted)


@settings(deadline=None, max_examples=12)
@given(gm=captured_graphs(), picks=st.sets(st.sampled_from(STEPS.tolist()), min_size=1))
def test_rows_of_a_subset_are_selected(gm, picks):
    folded = fold_timesteps(gm, timesteps=STEPS)
    done = change_timesteps(folded.gm, timesteps=torch.tensor(list(picks)))
    assert same(done.gm, fold_timesteps(gm, timesteps=torch.tensor(sorted(picks))).gm)
    again = change_timesteps(done.gm, timesteps=torch.tensor(sorted(picks)))
    assert again.changed == 0 and same(again.gm, done.gm)


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_tables_are_cached_anew_or_selected(bits):
    _, gm = unet()
    folded = fold_timesteps(gm, timesteps=STEPS).gm
    cached = quantize_tables(folded, bits={"blocks.0.proj": bits, "blocks.1.proj": bits}).gm
    done = change_timesteps(cached, timesteps=OTHER, rows=rows_of(gm, OTHER))
    wide = fold_timesteps(gm, timesteps=OTHER).gm
    expected = quantize_tables(wide, bits={"blocks.0.proj": bits, "blocks.1.proj": bits}).gm
    assert same(done.gm, expected)
    x = torch.randn(1, 4)
    few = change_timesteps(cached, timesteps=STEPS[[1, 4]]).gm
    for step in (3, 500):
        inputs = (x, torch.tensor([step]))
        for found, wanted in zip(few(*inputs), cached(*inputs), strict=True):
            assert torch.equal(found, wanted)
    with pytest.raises(InputError, match="no table row for timestep 7"):
        few(x, torch.tensor([7]))


def test_a_half_precision_model_gets_rows_in_its_dtype():
    _, gm = unet()
    cached = quantize_tables(fold_timesteps(gm, timesteps=STEPS).gm, bits={"blocks.0.proj": 8}).gm
    cached.half()
    cached.temporal_keys = STEPS.clone()
    done = change_timesteps(cached, timesteps=OTHER, rows=rows_of(gm, OTHER)).gm
    assert done.temporal_table.dtype == torch.float16
    (table,) = (m for m in done.modules() if type(m).__name__ == "QuantTimestepTable")
    assert table(torch.tensor([3])).dtype == torch.float16 and table.scale.dtype == torch.float32


def test_features_that_are_not_given_are_refused_by_name(net):
    folded = fold_timesteps(net, timesteps=STEPS).gm
    with pytest.raises(ConfigError, match=r"4 of 6 timesteps are new .* time\.2, .*refresh\(model"):
        change_timesteps(folded, timesteps=OTHER)
    rows = rows_of(net, OTHER)
    with pytest.raises(ConfigError, match=r"rows must be given for the features time\.2; other"):
        change_timesteps(folded, timesteps=OTHER, rows={**rows, "other": rows["time.2"]})
    with pytest.raises(ConfigError, match=r"time\.2: 5 rows given for 6 timesteps"):
        change_timesteps(folded, timesteps=OTHER, rows={"time.2": rows["time.2"][:5]})


def test_timesteps_that_cannot_be_keys_are_refused(net):
    folded = fold_timesteps(net, timesteps=STEPS).gm
    for wrong, why in ([[1, 1], "duplicate"], [[], "empty"], [[0.5], "cannot hold"]):
        with pytest.raises(ConfigError, match=why) as caught:
            change_timesteps(folded, timesteps=torch.tensor(wrong))
        assert "in pass change_timesteps" in caught.value.__notes__


# ---------------------------------------------------------------- scales


def test_scales_between_are_interpolated_and_those_there_are_kept(scaled):
    gm = scaled[0].gm
    old = gm.get_buffer(SCALES)
    wanted = torch.tensor([5, 10, 12, 30, 0])
    done = change_timesteps(gm, timesteps=wanted)
    new = done.gm.get_buffer(SCALES)
    assert done.details == {"timesteps": 5, "kept": 2, "interpolated": 3, "features": []}
    json.dumps(done.details)
    assert torch.equal(new[[0, 2]], old[[0, 1]])  # bit for bit at 0 and 10
    between = (old[0].double() + old[1].double()) / 2
    assert torch.equal(new[1], between.float())
    assert torch.equal(new[3], (old[1].double() * (1 - 0.2) + old[2].double() * 0.2).float())
    assert torch.equal(new[4], old[2])  # beyond the end: as at the end
    assert stage_of(done.gm) is stage_of(gm) and done.changed == 1
    assert torch.equal(gm.get_buffer(SCALES), old) and len(gm.temporal_keys) == 3
    done.gm(torch.randn(2, 4), torch.tensor([5, 30]))


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from((4, 8, 16)))
def test_the_zero_point_of_a_site_serves_timesteps_between(seed, bits, scaled):
    generator = torch.Generator().manual_seed(seed)
    low, high = -torch.rand(3, generator=generator), torch.rand(3, generator=generator) * 5
    scale, zero = shared_zero_scales(low, high, bits=bits)
    gm = change_timesteps(scaled[0].gm, timesteps=torch.tensor([0, 10, 20])).gm
    table = scale[:, None].expand(-1, gm.get_buffer(SCALES).shape[1]).clone()
    setattr(gm, SCALES, table)
    made = change_timesteps(gm, timesteps=torch.arange(21)).gm.get_buffer(SCALES)[:, 0].double()
    share = torch.arange(21) % 10 / 10
    at = (torch.arange(21) // 10).clamp(max=1)
    share[20] = 1
    for ends, covered in ((low, -made * zero), (high, made * (2**bits - 1 - zero))):
        wanted = ends.double()[at] * (1 - share) + ends.double()[at + 1] * share
        # float32 scales: a rounding of 6e-8 of the larger end
        assert bool((covered.abs() >= wanted.abs() - 1e-6 * covered.abs().max()).all())


def test_scales_and_features_of_one_graph_change_together(net, scaled):
    done = change_timesteps(
        scaled[1].gm, timesteps=torch.tensor([5, 10]), rows=rows_of(net, torch.tensor([5, 10]))
    )
    assert done.details["features"] == ["time.2"] and done.changed == 2
    assert len({id(b) for n, b in done.gm.named_buffers() if n.startswith("temporal_keys")}) == 1
    done.gm(torch.randn(2, 4), torch.tensor([5, 10]))


def test_what_was_measured_can_be_given(scaled):
    gm = scaled[0].gm
    first = torch.tensor([0, 10, 20])
    known = (first, {SCALES: gm.get_buffer(SCALES).clone()})
    other = change_timesteps(gm, timesteps=torch.tensor([3, 7])).gm
    assert same(change_timesteps(other, timesteps=first, calibrated=known).gm, gm)
    after = torch.tensor([4, 12])
    direct = change_timesteps(gm, timesteps=after).gm
    assert same(change_timesteps(other, timesteps=after, calibrated=known).gm, direct)
    assert not same(change_timesteps(other, timesteps=after).gm, direct)


# ---------------------------------------------------------------- products and corrections


def test_a_grid_goes_by_the_nearer_timestep_and_its_highest_value_is_interpolated():
    example = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([1, 2]), "y": torch.tensor([3, 4])}
    gm = capture(seeded(ToyDiT).eval(), example, timestep="t").gm
    gm = decompose_attention(gm).gm
    wanted, times = product_spec(probabilities="log2"), torch.arange(4)
    measured = measure_products(gm, product_batches(gm), spec=wanted, timesteps=times)
    done = quantize_products(gm, measured=measured, spec=wanted, timesteps=times * 10).gm
    done = with_choices(done, torch.tensor([True, False, False, True]))
    old = done.get_buffer(PRODUCT_SCALES).double()
    new = change_timesteps(done, timesteps=torch.tensor([2, 8, 10, 25])).gm
    made = new.get_buffer(PRODUCT_SCALES).double()
    assert torch.equal(made[2], old[1])
    adaptive = 0
    for name, module in done.named_modules():
        if not isinstance(module, QuantActivation):
            continue
        (call,) = (n for n in done.graph.nodes if n.target == name)
        column, *flag = (argument.args[1][1] for argument in call.args[1:])
        top = 2**module.bits - 1
        if flag:
            adaptive += 1
            assert made[:, flag[0]].tolist() == [1, 0, 0, 0]
            highest = old[:, column] * torch.tensor([1, top, top, 1])
            between = highest[2] / 2 + highest[3] / 2
            expected = [
                highest[0] * 0.8 + highest[1] * 0.2,
                (highest[0] * 0.2 + highest[1] * 0.8) / top,
                old[1, column],
                between / top,
            ]
        else:
            expected = [
                old[0, column] * 0.8 + old[1, column] * 0.2,
                old[0, column] * 0.2 + old[1, column] * 0.8,
                old[1, column],
                old[2, column] / 2 + old[3, column] / 2,
            ]
        # float32 rows
        torch.testing.assert_close(made[:, column], torch.stack(expected), rtol=1e-6, atol=0)
    assert adaptive == 2  # one for each block


def test_corrections_are_interpolated(net, scaled):
    times = torch.tensor([0, 10, 20])
    gm = scaled[0].gm
    data = [(torch.randn(30, 4) * 3, times.repeat(10))]

    class Off(nn.Module):
        def forward(self, *inputs):
            return (net(*inputs)[0] + inputs[1][:, None] / 10,)

    errors = measure_errors(Off(), gm, data, timesteps=times)
    done = correct_outputs(gm, errors=errors, kind="bias", timesteps=times).gm
    old = done.get_buffer(CORRECTION)
    new = change_timesteps(done, timesteps=torch.tensor([5, 20])).gm.get_buffer(CORRECTION)
    torch.testing.assert_close(new[0], (old[0] + old[1]) / 2)
    assert torch.equal(new[1], old[2])


def test_a_graph_over_no_timesteps_is_refused(net):
    plan = {
        name: LayerConfig(weights=WeightSpec()) for name in ("enter", "leave", "time.0", "time.2")
    }
    quantized = quantize_layers(net, plan=plan, ranges={}, timesteps=STEPS).gm
    with pytest.raises(ConfigError, match="over no finite set of timesteps; fold it first"):
        change_timesteps(quantized, timesteps=STEPS)
