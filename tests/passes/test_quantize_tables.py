import json
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.passes.test_fold_timesteps import unet
from tests.strategies import STEPS, WIDTH, GraphBuilder, captured_graphs, draw_inputs
from tfmq_fx.core.errors import ConfigError, GraphError, InputError
from tfmq_fx.ir.verifier import is_timestep_row
from tfmq_fx.passes.fold_timesteps import fold_timesteps
from tfmq_fx.passes.quantize_tables import quantize_tables
from tfmq_fx.quant.timestep_table import QuantTimestepTable, cache_error, cache_rows, restore_rows

rows_of = st.integers(0, 10_000).map(
    lambda seed: (
        torch.randn(3, 17, generator=torch.Generator().manual_seed(seed))
        * torch.tensor([[1e-3], [1.0], [1e4]])
    )
)


def min_max(rows, bits):
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return ((rows - low) / step).round() * step + low


@settings(deadline=None)
@given(rows=rows_of, bits=st.sampled_from((4, 8)))
def test_cached_rows_are_no_worse_than_min_max(rows, bits):
    codes, scale, zero = cache_rows(rows, bits)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 2**bits
    assert scale.shape == zero.shape == (3,) and bool((scale > 0).all())
    error = (restore_rows(codes, scale, zero) - rows).double().norm(dim=1)
    plain = (min_max(rows, bits) - rows).double().norm(dim=1)
    # float32 parameters: one rounding of scale * code
    assert bool((error <= plain + 2e-7 * rows.double().norm(dim=1)).all())
    relative = error / rows.double().norm(dim=1)
    torch.testing.assert_close(cache_error(rows, bits).double(), relative)


def test_constant_and_zero_rows_are_exact():
    rows = torch.tensor([[0.0, 0.0], [3.5, 3.5], [-1e4, -1e4], [1.0, 2.0]])
    assert torch.equal(restore_rows(*cache_rows(rows, 4))[:3], rows[:3])
    assert cache_error(rows, 4)[:3].tolist() == [0.0] * 3


def test_fewer_bits_cost_more_error():
    rows = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    assert bool((cache_error(rows, 4) > 8 * cache_error(rows, 8)).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_module_restores_what_was_cached(bits):
    features = [torch.randn(6, width) for width in (3, 1, 4)]
    table = QuantTimestepTable.from_rows(STEPS, features, bits=bits)
    expected = torch.cat([restore_rows(*cache_rows(f, bits)) for f in features], 1)
    assert torch.equal(table(STEPS), expected) and torch.equal(table(STEPS[2]), expected[2:3])
    assert table.codes.shape == (6, 8 * bits // 8)
    with pytest.raises(InputError, match="no table row for timestep 4"):
        table(torch.tensor([4]))
    made = QuantTimestepTable.from_spec(json.loads(json.dumps(table.spec())))
    made.load_state_dict(table.state_dict())
    assert torch.equal(made(STEPS), expected)
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend="aot_eager")
    found = compiled(torch.tensor([3, 4, 7]))
    assert torch.equal(found[[0, 2]], expected[[1, 2]]) and found[1].isnan().all()


def test_casting_the_module_changes_its_output_dtype_only():
    steps = torch.tensor([0.1, 0.3], dtype=torch.float64)
    table = QuantTimestepTable.from_rows(steps, [torch.randn(2, 5)], bits=4)
    before = table(steps)
    table.half()
    assert table.scale.dtype == table.zero.dtype == torch.float32
    assert table.keys.dtype == torch.float64
    assert torch.equal(table(steps), before.half())


def test_odd_widths_pack_row_by_row():
    table = QuantTimestepTable.from_rows(STEPS, [torch.randn(6, 3)], bits=4)
    assert table.codes.shape == (6, 2) and table(STEPS).shape == (6, 3)


@settings(deadline=None, max_examples=20)
@given(gm=captured_graphs(), data=st.data())
def test_caching_restores_each_feature_within_its_error(gm, data):
    folded = fold_timesteps(gm, timesteps=STEPS)
    names = folded.details["features"]
    bits = {n: data.draw(st.sampled_from((0, 4, 8))) for n in names}
    bits = {n: b for n, b in bits.items() if b}
    done = quantize_tables(folded.gm, bits=bits)
    assert done.changed == len(bits)
    inputs = draw_inputs(gm, 2).values()
    found, expected = (features_of(m, inputs) for m in (done.gm, folded.gm))
    t = draw_inputs(gm, 2)["t"]
    for name in names:
        if name not in bits:
            assert torch.equal(found[name], expected[name])
            continue
        worst = done.details["features"][name]["error_worst"] * (1 + 1e-5)
        error = (found[name] - expected[name]).norm(dim=1)
        assert bool((error <= worst * expected[name].norm(dim=1) + 1e-6).all()), t
    again = quantize_tables(done.gm, bits=bits)
    assert again.changed == 0 and again.gm.code == done.gm.code


def features_of(gm, inputs):
    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if "feature" in n.meta:
                found[n.meta["feature"]] = value
            return value

    found = {}
    with torch.no_grad():
        Recorder(gm).run(*inputs)
    return found


def test_features_move_and_the_exact_table_shrinks():
    _, gm = unet((WIDTH, 2, 6))
    folded = fold_timesteps(gm, timesteps=STEPS).gm
    done = quantize_tables(folded, bits={"blocks.0.proj": 8, "blocks.2.proj": 4})
    assert done.changed == 2
    assert done.gm.temporal_table.shape == (6, 2) and folded.temporal_table.shape == (6, 12)
    assert {n: m.widths for n, m in done.gm.named_children()} == {
        "temporal_cache_int8": (WIDTH,),
        "temporal_cache_int4": (6,),
    }
    assert done.details["bytes_before"] == 6 * 12 * 4
    assert done.details["bytes_after"] == 6 * (2 * 4 + WIDTH + 3 + 2 * 8)
    facts = done.details["features"]
    assert 0 < facts["blocks.0.proj"]["error_mean"] <= facts["blocks.0.proj"]["error_worst"] < 0.01
    json.dumps(done.details)
    rest = quantize_tables(done.gm, bits={"blocks.1.proj": 8})
    assert not any(is_timestep_row(n) for n in rest.gm.graph.nodes)
    assert not [n for n, _ in rest.gm.named_buffers() if "cache" not in n]
    assert {n for n, _ in rest.gm.named_children()} == {
        "temporal_cache_int8",
        "temporal_cache_int8_1",
        "temporal_cache_int4",
    }


def test_features_of_any_shape():
    b = GraphBuilder()
    h = b.layer("s", nn.Linear(WIDTH, 8), b.sinusoid())
    shaped = b.call("view", h, b.size(b.x), 2, 4)
    kernel = b.call(torch.matmul, shaped, b.call("transpose", shaped, 1, 2))
    gm = b.finish(b.call(operator.add, kernel, b.call("sum", b.x)))
    folded = fold_timesteps(gm, timesteps=STEPS)
    done = quantize_tables(folded.gm, bits=dict.fromkeys(folded.details["features"], 8))
    x, t = torch.randn(3, WIDTH), STEPS[:3]
    exact = folded.gm(x, t)[0]
    assert done.gm(x, t)[0].shape == (3, 2, 2)
    assert float((done.gm(x, t)[0] - exact).abs().max()) < 0.01 * float(exact.abs().max())


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        ({"blocks.0.proj": 3}, "blocks.0.proj: rows can be cached at 4 or 8 bits, not 3"),
        ({"mid": 8}, "no feature mid in an exact table; there are blocks.0.proj, blocks.1.proj"),
    ],
)
def test_wrong_names_and_widths_are_refused(bits, text):
    _, gm = unet()
    with pytest.raises(ConfigError, match=text):
        quantize_tables(fold_timesteps(gm, timesteps=STEPS).gm, bits=bits)


def test_a_cached_feature_keeps_its_bits_and_captured_graphs_have_none():
    _, gm = unet()
    done = quantize_tables(fold_timesteps(gm, timesteps=STEPS).gm, bits={"blocks.0.proj": 4})
    with pytest.raises(ConfigError, match="cached at 4 bits; its exact rows are gone"):
        quantize_tables(done.gm, bits={"blocks.0.proj": 8})
    with pytest.raises(GraphError, match="expected a folded graph"):
        quantize_tables(gm, bits={})
