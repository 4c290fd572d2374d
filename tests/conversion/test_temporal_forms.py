"""temporal: every form of every feature is measured, and the best of what fits is chosen."""

import copy
import json

import pytest
import torch

from tests.ir.test_sites import graph_of
from tests.passes.test_quantize_layers import observe
from tests.toys import ToyUNet, seeded
from tfmq_fx.conversion.temporal_forms import choose_temporal
from tfmq_fx.core.config import Config, TemporalSpec
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.layer_config import ActivationSpec, LayerConfig, WeightSpec
from tfmq_fx.ir.subgraphs import as_input, compute_rows
from tfmq_fx.ir.temporal_block import temporal_block
from tfmq_fx.passes.quantize_layers import quantize_layers
from tfmq_fx.quant.quant_layer import QuantLayer

TIMES = torch.arange(0, 1000, 125)
W4A8 = LayerConfig(weights=WeightSpec(bits=4), activations=ActivationSpec(bits=8))


@pytest.fixture(scope="module")
def gm():
    return graph_of(seeded(ToyUNet).eval(), 3, 8, 8)


@pytest.fixture(scope="module")
def block(gm):
    return temporal_block(gm)


@pytest.fixture(scope="module")
def ranges(block):
    return observe(block.graph, [(TIMES,)], TIMES)


def choose(block, ranges, *, layers=W4A8, timesteps=TIMES, visits=None, **spec):
    config = Config(layers=layers, temporal=TemporalSpec(**{"tiar_iters": 0} | spec))
    return choose_temporal(
        block,
        config=config,
        plan=dict.fromkeys(block.modules, layers),
        ranges=ranges,
        timesteps=timesteps,
        visits=torch.ones(len(timesteps)) if visits is None else visits,
    )


def names(block):
    return [f.name for f in block.features]


def test_exact_rows_are_the_features_one_timestep_at_a_time(block):
    rows = compute_rows(block.graph, TIMES)
    assert [tuple(r.shape) for r in rows] == [(8, f.width) for f in block.features]
    with torch.no_grad():
        for i, t in enumerate(TIMES):
            for row, value in zip(rows, block.graph(t[None]), strict=True):
                assert torch.equal(row[i], value[0])


def test_timesteps_are_given_in_the_dtype_of_the_graph(block):
    assert as_input(block.graph, TIMES.double()).dtype == torch.int64


def test_table_keeps_every_feature_exactly(block, ranges):
    result = choose(block, ranges, mode="table")
    assert result.choice == dict.fromkeys(names(block), "table")
    assert result.tabled == names(block) and not result.cached and not result.layers
    facts = result.details["features"]
    assert {facts[n]["error"] for n in names(block)} == {0.0}
    widths = {f.name: f.width for f in block.features}
    assert {n: facts[n]["candidates"]["table"]["bytes"] for n in widths} == {
        n: 8 * w * 4 for n, w in widths.items()
    }


@pytest.mark.parametrize("bits", [(8,), (4,), (8, 4)])
def test_cache_takes_the_best_of_the_bits_allowed(block, ranges, bits):
    result = choose(block, ranges, mode="cache", cache_bits=bits)
    assert result.cached == dict.fromkeys(names(block), max(bits))
    assert result.tabled == names(block) and not result.layers


def test_tib_keeps_the_block_as_quantized_layers(block, ranges):
    result = choose(block, ranges, mode="tib")
    assert result.choice == dict.fromkeys(names(block), "tib")
    assert set(result.layers) == set(block.modules) and not result.tabled
    assert all(isinstance(m, QuantLayer) for m in result.layers.values())
    assert {m.range_kind() for m in result.layers.values()} == {"per timestep"}
    assert [rewrite.name for rewrite in result.passes] == ["reconstruct_tib"]


def test_select_reaches_every_form_as_the_budget_shrinks(block, ranges):
    full = choose(block, ranges, budget=1 << 30)
    assert set(full.choice.values()) == {"table"}
    sizes = {
        form: sum(f["candidates"][form]["bytes"] for f in full.details["features"].values())
        for form in ("table", "cache8", "cache4")
    }
    between = choose(block, ranges, budget=(sizes["table"] + sizes["cache8"]) // 2)
    assert set(between.choice.values()) == {"table", "cache8"}
    few = choose(block, ranges, budget=(sizes["cache8"] + sizes["cache4"]) // 2)
    assert set(few.choice.values()) == {"cache8", "cache4"}
    assert few.cached == {n: int(c[-1]) for n, c in few.choice.items()}
    with pytest.raises(ConfigError, match=f"takes {sizes['cache4']} bytes"):
        choose(block, ranges, budget=sizes["cache4"] - 1)


def test_nothing_is_learnt_where_exact_rows_fit_the_budget(block, ranges, monkeypatch):
    full = choose(block, ranges)
    rows = sum(f["candidates"]["table"]["bytes"] for f in full.details["features"].values())
    assert full.details["exact_fits"] and rows <= full.details["budget"]
    assert set(full.choice.values()) == {"table"} and not full.passes and not full.layers

    def learn(*args, **kwargs):
        raise RuntimeError("learning")

    monkeypatch.setattr("tfmq_fx.conversion.temporal_forms.reconstruct_tib", learn)
    assert choose(block, ranges, tiar_iters=1000).choice == full.choice
    assert choose(block, ranges, tiar_iters=1000, budget=rows).choice == full.choice
    for given in ({"budget": rows - 1}, {"mode": "tib"}):  # here it may win
        with pytest.raises(RuntimeError, match="learning"):
            choose(block, ranges, tiar_iters=1000, **given)


def test_a_block_that_loses_nothing_is_kept_where_rows_take_more(gm):
    times = torch.arange(1000)
    block = temporal_block(copy.deepcopy(gm))
    for path in block.modules:
        for parameter in block.graph.get_submodule(path).parameters():
            parameter.data.zero_()  # as layers start that add nothing yet: nearest is exact
    ranges = observe(block.graph, [(times,)], times)
    result = choose(block, ranges, timesteps=times, budget=1 << 30)
    assert result.details["exact_fits"]
    assert set(result.choice.values()) == {"tib"} and set(result.layers) == set(block.modules)


def test_select_takes_the_block_where_rows_would_outweigh_it(block):
    times = torch.arange(1000)
    ranges = observe(block.graph, [(times,)], times)
    config = Config(layers=W4A8, temporal=TemporalSpec(tiar_iters=0, cache_bits=(8,)))
    result = choose_temporal(
        block,
        config=config,
        plan=dict.fromkeys(block.modules, W4A8),
        ranges=ranges,
        timesteps=times,
        visits=torch.ones(1000),
    )
    assert "tib" in result.choice.values()
    assert result.details["budget"] == result.details["block_bytes"]


def test_errors_are_means_weighted_by_visits(block, ranges):
    once = torch.zeros(len(TIMES))
    once[3] = 5.0
    facts = choose(block, ranges, visits=once, cache_bits=(8,)).details["features"]
    plan = dict.fromkeys(block.modules, W4A8)
    quantized = quantize_layers(block.graph, plan=plan, ranges=ranges, timesteps=TIMES).gm
    with torch.no_grad():
        found = [f[3] for f in quantized(TIMES)]
    rows = [row[3] for row in compute_rows(block.graph, TIMES)]
    for name, a, b in zip(names(block), found, rows, strict=True):
        # both sides in float32; the norm sums up to 32 squares
        expected = float((a - b).norm() / b.norm())
        assert facts[name]["candidates"]["tib"]["error"] == pytest.approx(expected, rel=1e-5)


def test_the_bytes_of_the_block_are_those_of_its_buffers(block, ranges):
    result = choose(block, ranges, mode="tib")
    scales = len(TIMES) * 4
    expected = sum(sum(b.nbytes for b in m.buffers()) + scales for m in result.layers.values())
    assert result.details["block_bytes"] == expected


def test_float_layers_stay_in_the_block_at_their_own_size(block, ranges):
    result = choose(block, ranges, mode="tib", layers=LayerConfig())
    parameters = [p for path in block.modules for p in block.graph.get_submodule(path).parameters()]
    assert result.details["block_bytes"] == sum(p.nbytes for p in parameters)
    assert not result.layers
    # the block over all timesteps at once against one at a time: a few float32 roundings a layer
    assert max(f["error"] for f in result.details["features"].values()) < 1e-5


def test_a_model_without_a_temporal_block_has_nothing_to_choose():
    class Still(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x, t):
            return self.linear(x) * t[:, None]

    block = temporal_block(graph_of(seeded(Still).eval(), 4))
    result = choose(block, {}, mode="select")
    assert result.choice == {} and result.tabled == [] and result.cached == {}


def test_details_are_json_ready(block, ranges):
    result = choose(block, ranges)
    assert json.loads(json.dumps(result.details)) == result.details
