import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.strategies import STEPS, WIDTH, GraphBuilder, captured_graphs, draw_inputs
from tfmq_fx.core.errors import ConfigError, InputError
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.ir.temporal_block import temporal_block
from tfmq_fx.ir.verifier import is_timestep_row
from tfmq_fx.passes.fold_timesteps import fold_timesteps

# Tables hold rows computed at batch 1; the original multiplies at batch B, where BLAS may take
# another kernel and add in another order: a few float32 roundings (6e-8) per layer, ten layers.
REASSOCIATED = 1e-5


def unet(widths=(WIDTH, 2), **kwargs):
    """linear(silu(linear(sinusoid(t)))) per block, each added to or joined with x."""
    b = GraphBuilder(**kwargs)
    h = b.layer("time.linear", nn.Linear(WIDTH, WIDTH), b.sinusoid())
    h = b.call(F.silu, h)
    outs = []
    for i, width in enumerate(widths):
        emb = b.layer(f"blocks.{i}.proj", nn.Linear(WIDTH, width), h)
        outs.append(b.call(torch.cat, [b.call(F.silu, emb), b.x], 1))
    return b, b.finish(*outs)


@settings(deadline=None, max_examples=40)
@given(gm=captured_graphs(), seed=st.integers(0, 99))
def test_folding_changes_no_output(gm, seed):
    done = fold_timesteps(gm, timesteps=STEPS)
    with torch.no_grad():
        for batch, tolerance in ((1, 0.0), (3, REASSOCIATED)):
            inputs = draw_inputs(gm, batch, seed).values()
            for found, expected in zip(done.gm(*inputs), gm(*inputs), strict=True):
                error = (found - expected).norm()
                assert error <= tolerance * expected.norm()
    assert done.changed == len(done.details["features"])
    again = fold_timesteps(done.gm, timesteps=STEPS)
    assert again.changed == 0 and again.gm.code == done.gm.code


def test_one_table_and_one_look_up_replace_the_block():
    _, gm = unet()
    done = fold_timesteps(gm, timesteps=STEPS.flip(0))
    assert done.details == {
        "features": ["blocks.0.proj", "blocks.1.proj"],
        "rows": 6,
        "table_bytes": 6 * (WIDTH + 2) * 4,
        "weight_bytes": 4 * (2 * (WIDTH * WIDTH + WIDTH) + WIDTH * 2 + 2),
    }
    assert done.changed == 2 and not done.declined and stage_of(done.gm) is Stage.FOLDED
    assert dict(done.gm.named_parameters()) == {} and not list(done.gm.named_children())
    assert set(dict(done.gm.named_buffers())) == {"temporal_table", "temporal_keys"}
    assert torch.equal(done.gm.temporal_keys, STEPS)
    assert torch.equal(done.gm.meta["timesteps"], STEPS)
    assert sum(is_timestep_row(n) for n in done.gm.graph.nodes) == 1
    assert dict(gm.named_parameters()) and stage_of(gm) is Stage.CAPTURED  # the input is as it was
    placed = [n for n in done.gm.graph.nodes if n.meta.get("feature")]
    assert [n.name for n in placed] == ["blocks_0_proj_row", "blocks_1_proj_row"]
    assert [[path for path, _ in n.meta["nn_module_stack"].values()] for n in placed] == [
        ["", "blocks", "blocks.0"],
        ["", "blocks", "blocks.1"],
    ]
    assert not any("source_fn_stack" in n.meta for n in placed)


def test_rows_are_looked_up_for_each_sample():
    _, gm = unet()
    folded = fold_timesteps(gm, timesteps=STEPS).gm
    x, t = torch.randn(4, WIDTH), STEPS[[3, 0, 3, 5]]
    with torch.no_grad():
        alone = torch.cat([folded(x[i : i + 1], t[i : i + 1])[0] for i in range(4)])
    assert torch.equal(folded(x, t)[0], alone)


def test_an_unknown_timestep_is_refused():
    _, gm = unet()
    folded = fold_timesteps(gm, timesteps=STEPS).gm
    with pytest.raises(InputError, match=r"no table row for timestep 4;.* 6 timesteps: 0, 3, 7"):
        folded(torch.randn(2, WIDTH), torch.tensor([3, 4]))


def test_only_the_named_features_are_folded_and_the_rest_later():
    _, gm = unet()
    some = fold_timesteps(gm, timesteps=STEPS, only=["blocks.1.proj"])
    assert some.changed == 1
    assert set(dict(some.gm.named_modules())) >= {"time.linear", "blocks.0.proj"}
    assert "blocks.1.proj" not in dict(some.gm.named_modules())
    rest = fold_timesteps(some.gm, timesteps=STEPS)
    assert rest.details["features"] == ["blocks.0.proj"] and not list(rest.gm.named_children())
    assert set(dict(rest.gm.named_buffers())) == {
        "temporal_table",
        "temporal_table_1",
        "temporal_keys",
    }
    inputs = draw_inputs(gm, 1).values()
    assert all(map(torch.equal, rest.gm(*inputs), gm(*inputs)))
    assert fold_timesteps(gm, timesteps=STEPS, only=[]).changed == 0
    with pytest.raises(
        ConfigError, match=r"no temporal feature mid; the graph has blocks.0.proj, b"
    ):
        fold_timesteps(gm, timesteps=STEPS, only=["mid"])


def test_tables_of_one_graph_share_one_set():
    _, gm = unet()
    folded = fold_timesteps(gm, timesteps=STEPS, only=["blocks.1.proj"]).gm
    with pytest.raises(ConfigError, match="folded for 6 other timesteps"):
        fold_timesteps(folded, timesteps=STEPS[:3])


@pytest.mark.parametrize(
    ("timesteps", "text"),
    [
        (torch.tensor([]), "empty"),
        (torch.tensor([1, 2, 1]), "duplicate timesteps .as torch.int64.: 1"),
        (torch.tensor([1.0, float("nan")]), "NaN"),
        (torch.tensor([0.5]), "cannot hold 0.5"),
        (torch.tensor([[1]]), r"one-dimensional, got shape \(1, 1\)"),
    ],
)
def test_unusable_timesteps_are_refused(timesteps, text):
    _, gm = unet()
    with pytest.raises(ConfigError, match=text):
        fold_timesteps(gm, timesteps=timesteps)


def test_float_timesteps_are_keys_as_the_model_receives_them():
    _, gm = unet(timestep_dtype=torch.bfloat16)
    steps = torch.tensor([0.1, 0.5, 0.7])
    folded = fold_timesteps(gm, timesteps=steps).gm
    assert folded.temporal_keys.dtype == torch.float64
    x, t = torch.randn(1, WIDTH), steps[:1].bfloat16()
    assert torch.equal(folded(x, t)[0], gm(x, t)[0])
    with pytest.raises(InputError, match="no table row"):
        folded(x, steps[:1])  # 0.1 in float32 is another value


def test_features_of_any_shape_and_dtype():
    """Two tables, one for each dtype; a contiguous copy where the model calls view."""
    b = GraphBuilder()
    h = b.layer("time.linear", nn.Linear(WIDTH, 6 * WIDTH), b.sinusoid())
    flat = b.call("view", h, -1, 1)
    flat = b.call("reshape", b.call(operator.add, flat, b.call("sum", b.x)), b.size(h), 6 * WIDTH)
    wide = b.layer("wide", nn.Linear(WIDTH, WIDTH).double(), b.call("double", b.sinusoid()))
    shaped = b.call(
        "softmax",
        b.call("view", b.layer("s", nn.Linear(WIDTH, 8), b.sinusoid()), b.size(b.x), 2, 4),
        2,
    )
    kernel = b.call(torch.matmul, shaped, b.call("transpose", shaped, 1, 2))
    gm = b.finish(
        flat, b.call(operator.mul, wide, b.x), b.call(operator.add, kernel, b.call("sum", b.x))
    )
    done = fold_timesteps(gm, timesteps=STEPS)
    assert {f.shape for f in temporal_block(gm).features} == {(6 * WIDTH,), (WIDTH,), (2, 2)}
    assert {b.dtype for n, b in done.gm.named_buffers() if "table" in n} == {
        torch.float32,
        torch.float64,
    }
    x, t = torch.randn(1, WIDTH), STEPS[1:2]
    assert all(map(torch.equal, done.gm(x, t), gm(x, t)))
    x, t = torch.randn(3, WIDTH), STEPS[1:4]
    for found, expected in zip(done.gm(x, t), gm(x, t), strict=True):
        torch.testing.assert_close(found, expected, rtol=REASSOCIATED, atol=REASSOCIATED)


def test_a_feature_that_mixes_the_batch_is_declined():
    b = GraphBuilder()
    h = b.layer("time.linear", nn.Linear(WIDTH, WIDTH), b.sinusoid())
    centred = b.call(operator.sub, h, b.call("mean", h, 0, keepdim=True))
    narrow = b.layer("narrow", nn.Linear(WIDTH, 1), centred)
    plain = b.layer("plain", nn.Linear(WIDTH, 1), b.sinusoid())
    gm = b.finish(b.call(operator.mul, narrow, b.x), b.call(operator.mul, plain, b.x))
    done = fold_timesteps(gm, timesteps=STEPS)
    assert done.details["features"] == ["plain"]
    assert [(d.site, d.reason) for d in done.declined] == [
        ("narrow", "its value for one sample depends on the rest of the batch")
    ]
    with torch.no_grad():
        x, t = torch.randn(3, WIDTH), STEPS[1:4]
        for found, expected in zip(done.gm(x, t), gm(x, t), strict=True):
            torch.testing.assert_close(found, expected, rtol=REASSOCIATED, atol=REASSOCIATED)


def test_the_batch_size_does_not_keep_the_block_alive():
    b = GraphBuilder()
    h = b.layer("time.linear", nn.Linear(WIDTH, WIDTH), b.sinusoid())
    out = b.layer("out", nn.Linear(WIDTH, WIDTH), h)
    ones = b.call(torch.ones, (b.size(h), WIDTH))
    gm = b.finish(b.call(operator.add, b.call(operator.mul, out, b.x), ones))
    done = fold_timesteps(gm, timesteps=STEPS)
    assert not list(done.gm.named_children())
    x, t = torch.randn(1, WIDTH), STEPS[:1]
    assert torch.equal(done.gm(x, t)[0], gm(x, t)[0])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_graphs_answer_an_unknown_timestep_with_nan(backend):
    _, gm = unet()
    folded = fold_timesteps(gm, timesteps=STEPS).gm
    compiled = torch.compile(folded, fullgraph=True, dynamic=True, backend=backend)
    for batch in (2, 3):
        inputs = tuple(draw_inputs(gm, batch).values())
        for found, expected in zip(compiled(*inputs), folded(*inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found = compiled(torch.randn(2, WIDTH), torch.tensor([3, 4]))[0]
    assert found[0].isfinite().all() and found[1, :WIDTH].isnan().all()
