"""fixes: a layer quantized again is what conversion makes of the same data; the rest is exact."""

import copy

import pytest
import torch
from torch import fx

from tests.converted import KEYS, captured, lossy
from tests.passes.test_quantize_layers import (
    DYNAMIC,
    FP8,
    FP8_DYNAMIC,
    STATIC,
    W4A8,
    W8A8,
    quantize,
    toy_batches,
)
from tests.test_sites import graph_of
from tests.toys import ToyUNet, seeded
from tfmq_fx.config import ActivationSpec, LayerConfig, WeightSpec
from tfmq_fx.fixes import (
    Fix,
    float_inputs,
    float_layer,
    float_weights,
    more_bits,
    requantized,
    with_layers,
)
from tfmq_fx.site_parts import find_parts
from tfmq_fx.walk import Walk

GROUPED = LayerConfig(weights=WeightSpec(bits=4, group_size=8), activations=ActivationSpec(bits=8))
SYMMETRIC = LayerConfig(
    weights=WeightSpec(bits=4, symmetric=True), activations=ActivationSpec(bits=8)
)
TIMES = torch.arange(4)


@pytest.fixture(scope="module")
def gm():
    return graph_of(seeded(ToyUNet).eval(), 3, 8, 8)


@pytest.fixture(scope="module")
def chunks():
    return [list(batch) for batch in toy_batches()]


def values_of(gm, chunks, part):
    """The reference's value and the part's inputs, for each chunk."""
    needed = (part.target, *part.given)
    walk = Walk(gm, chunks)
    walk.keep(needed)
    walk.run_past(needed)
    return [[walk.values[node][i] for node in needed] for i in range(len(chunks))]


def changed(part, fix):
    own = fx.GraphModule(part.part, part.part.graph)
    fix.apply_(own)
    return own


def ranges_of(part, values):
    """Of what each leaf reads, by position of the timestep: one chunk for each."""
    found = {leaf.path: {} for leaf in part.leaves}
    for step, (_, *inputs) in enumerate(values):
        _, *read = part.part(*inputs)
        for leaf, x in zip(part.leaves, read, strict=True):
            found[leaf.path][step] = (float(x.min()), float(x.max()))
    return found


def picked(parts):
    """A few layers of different kinds: convolution, time projection, one by one convolution."""
    return [p for p in parts if p.name in ("down2.conv1", "up1.time", "attention.qkv", "conv_out")]


@pytest.mark.parametrize(
    "layers", [W8A8, W4A8, STATIC, GROUPED, SYMMETRIC, FP8, DYNAMIC, FP8_DYNAMIC]
)
def test_the_same_bits_again_are_what_nearest_rounding_of_the_same_data_gives(gm, chunks, layers):
    model = quantize(gm, layers, chunks, TIMES).gm
    tables = dict(model.named_buffers())
    for part in picked(find_parts(gm, model)):
        with torch.no_grad():
            ranges = ranges_of(part, values_of(gm, chunks, part))
        found = requantized(part.leaves, ranges, tables, search=80)
        (leaf,) = part.leaves
        made = found.modules[leaf.path]
        assert made is not leaf.layer and made.spec() == leaf.layer.spec()
        for name, value in leaf.layer.named_buffers():
            assert torch.equal(getattr(made, name), value), name
        per_timestep = layers.activations.per_timestep
        assert list(found.columns) == ([leaf.column] if per_timestep else [])
        for (table, column), scales in found.columns.items():
            assert torch.equal(scales, tables[table][:, column])


def test_timesteps_that_share_a_scale_share_a_range_and_unseen_ones_keep_theirs(gm, chunks):
    model = quantize(gm, W8A8, chunks, TIMES).gm
    part = next(p for p in find_parts(gm, model) if p.name == "conv_out")
    (leaf,) = part.leaves
    table, column = leaf.column
    tables = {table: model.get_buffer(table).clone()}
    tables[table][:, column] = torch.tensor([1.0, 1.0, 2.0, 3.0])
    ranges = {leaf.path: {0: (0.0, 1.0), 1: (0.0, 5.0), 2: (0.0, 2.0)}}
    fix = requantized([leaf], ranges, tables)
    # nothing is negative, so that zero stands at the end and 255 codes span the range
    expected = torch.tensor([5 / 255, 5 / 255, 2 / 255, 3.0])
    torch.testing.assert_close(fix.columns[leaf.column], expected)
    assert int(fix.modules[leaf.path].act_zero) == 0


def test_eight_bits_are_nearer_and_leave_the_input_alone(gm, chunks):
    model = quantize(gm, W4A8, chunks, TIMES).gm
    for part in picked(find_parts(gm, model)):
        (leaf,) = part.leaves
        fix = more_bits(part.leaves, 8)
        made = fix.modules[leaf.path]
        assert (made.weight_bits, made.act_bits, fix.columns) == (8, 8, {})
        assert torch.equal(made.act_zero, leaf.layer.act_zero)
        steps = [(layer.weight - leaf.weight).norm() for layer in (made, leaf.layer)]
        assert float(steps[0]) < float(steps[1]) / 8  # the step is 17 times smaller


@pytest.mark.parametrize("layers", [FP8, FP8_DYNAMIC, DYNAMIC])
def test_other_formats_get_float_inputs_and_integer_weights(gm, chunks, layers):
    model = quantize(gm, layers, chunks, TIMES).gm
    part = next(p for p in find_parts(gm, model) if p.name == "attention.qkv")
    (leaf,) = part.leaves
    made = float_inputs(part.leaves).modules[leaf.path]
    assert (made.act_bits, made.dynamic, made.range_kind()) == (None, False, "none")
    assert torch.equal(made.weight, leaf.layer.weight)
    finer = more_bits(part.leaves, 8).modules[leaf.path]
    assert (finer.weight_format, finer.act_format) == ("int", leaf.layer.act_format)


def test_a_layer_in_floating_point_gives_the_references_value(gm, chunks):
    model = quantize(gm, W4A8, chunks, TIMES).gm
    for part in picked(find_parts(gm, model)):
        (leaf,) = part.leaves
        plain = changed(part, float_layer(part.leaves, part.products))
        weights = changed(part, float_weights(part.leaves))
        inputs = changed(part, float_inputs(part.leaves))
        with torch.no_grad():
            for expected, *given in values_of(gm, chunks, part):
                torch.testing.assert_close(plain(*given)[0], expected, rtol=1e-5, atol=1e-5)
                _, x = part.part(*given)
                step = int(given[[n.target for n in part.given].index("t")][0])
                scale = model.get_buffer(leaf.column[0])[step, leaf.column[1]]
                seen = leaf.layer.quantized_input(x, scale.expand(len(x)))
                wanted = leaf.layer.apply_op(seen, leaf.weight, leaf.bias)
                torch.testing.assert_close(weights(*given)[0], wanted, rtol=0, atol=0)
                wanted = leaf.layer.apply_op(x, leaf.layer.weight, leaf.layer.bias)
                torch.testing.assert_close(inputs(*given)[0], wanted, rtol=0, atol=0)


def test_products_of_attention_are_rounded_without_weights():
    model = lossy("q-diffusion-w8a8")
    found = [part for part in find_parts(captured(), model.gm) if part.products]
    assert [part.name for part in found] == ["einsum", "einsum_1"]
    chunk = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), KEYS[:2]]
    for part in found:
        assert part.leaves == () and len(part.products) == 2
        ((expected, *given),) = values_of(captured(), [chunk], part)
        with torch.no_grad():
            (rounded,) = part.part(*given)
            (plain,) = changed(part, float_layer((), part.products))(*given)
        assert torch.equal(plain, expected)
        # 8 bits of each operand, half a step of a range that calibration saw, is about 1/255; a
        # value beyond that range is clipped (found: 1.8 and 0.6 %; a wrong operand is off by 100 %)
        error = float((rounded - expected).norm() / expected.norm())
        assert 1e-4 < error < 4e-2


def test_a_change_can_be_taken_back_and_leaves_the_model_alone(gm, chunks):
    model = quantize(gm, W4A8, chunks, TIMES).gm
    part = next(p for p in find_parts(gm, model) if p.name == "conv_out")
    (leaf,) = part.leaves
    before = copy.deepcopy(model.state_dict())
    fix = Fix(more_bits(part.leaves, 8).modules, {leaf.column: torch.full((4,), 7.0)})
    own = fx.GraphModule(model, copy.deepcopy(model.graph))
    back = fix.apply_(own)
    assert own.get_submodule(leaf.path) is fix.modules[leaf.path]
    assert own.get_buffer(leaf.column[0])[:, leaf.column[1]].tolist() == [7.0] * 4
    back.apply_(own)
    assert own.get_submodule(leaf.path) is leaf.layer
    for state in (model.state_dict(), own.state_dict()):
        assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_leaves_take_the_layers_of_a_change(gm, chunks):
    model = quantize(gm, W4A8, chunks, TIMES).gm
    parts = find_parts(gm, model)
    fix = more_bits(parts[0].leaves, 8)
    (leaf,) = with_layers(parts[0].leaves, fix)
    assert leaf.layer is fix.modules[leaf.path] and leaf.weight is parts[0].leaves[0].weight
    assert with_layers(parts[1].leaves, fix) == list(parts[1].leaves)
    assert with_layers(parts[0].leaves, float_weights(parts[0].leaves))[0].layer.weight_bits == 4
