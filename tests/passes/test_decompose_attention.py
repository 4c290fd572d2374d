"""decompose_attention: fused attention as single steps, the same function."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.toys import ToyDiT, ToyUNet, seeded
from tfmq_fx.capture.capture import capture
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.ir.node_info import op_name
from tfmq_fx.passes.decompose_attention import decompose_attention

# Sums of at most 64 terms of order 1 in another order: off by at most 64 * 2**-53 of their terms.
EXACT = {"rtol": 1e-10, "atol": 1e-12}
INFINITY = float("inf")


class Attends(nn.Module):
    """One attention over a sequence x (B, tokens, 12), its options given at construction."""

    def __init__(self, heads=3, kv_heads=3, mask=None, by_name=False, **options):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.by_name, self.options = by_name, options
        self.register_buffer("mask", mask)
        self.qkv = nn.Linear(12, (heads + 2 * kv_heads) * 4)

    def forward(self, x, t):
        q, k, v = (
            part.unflatten(-1, (-1, 4)).transpose(1, 2)
            for part in self.qkv(x).split(
                [self.heads * 4, self.kv_heads * 4, self.kv_heads * 4], dim=-1
            )
        )
        if self.by_name:
            named = {"query": q, "key": k, "value": v, "attn_mask": self.mask}
            out = F.scaled_dot_product_attention(**named, **self.options)
        else:
            out = F.scaled_dot_product_attention(q, k, v, self.mask, **self.options)
        return out.transpose(1, 2).flatten(2) * t[:, None, None]


def captured(model, tokens=6, batch=2):
    example = {"x": torch.randn(batch, tokens, 12).double(), "t": torch.arange(1, batch + 1)}
    return capture(model.double().eval(), example, timestep="t").gm


def inputs(tokens=6, batch=5):
    x = torch.randn(batch, tokens, 12, generator=torch.Generator().manual_seed(3))
    return x.double(), torch.arange(1, batch + 1)


def names(gm):
    return [op_name(node) for node in gm.graph.nodes]


def check_same(gm, *values):
    done = decompose_attention(gm)
    assert done.changed == 1 and not done.declined
    assert stage_of(done.gm) is Stage.CAPTURED
    assert "scaled_dot_product_attention" not in names(done.gm)
    with torch.no_grad():
        torch.testing.assert_close(done.gm(*values), gm(*values), **EXACT)
    return done.gm


def seeded_mask(kind, tokens=6):
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(tokens, tokens, generator=generator) > 0.4
    keep[2] = False  # this query sees nothing
    if kind == "bool":
        return keep
    bias = torch.randn(3, tokens, tokens, generator=generator).double()
    return bias.masked_fill(~keep, -INFINITY)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"mask": "bool"},
        {"mask": "float", "scale": 2.0},
        {"dropout_p": 0.0, "enable_gqa": True, "heads": 6},
    ],
    ids=str,
)
def test_every_form_is_the_same_function(options, by_name):
    options = dict(options)
    if "mask" in options:
        options["mask"] = seeded_mask(options["mask"])
    model = seeded(Attends, by_name=by_name, **options)
    done = check_same(captured(model), *inputs())
    assert names(done).count("matmul") == 2 and names(done).count("softmax") == 1


def test_options_may_all_be_given_by_position():
    class Positional(Attends):
        def forward(self, x, t):
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            y = F.scaled_dot_product_attention(q, k, v, None, 0.0, True)
            return y * t[:, None, None]

    check_same(captured(seeded(Positional)), *inputs())


@functools.cache  # of a number of tokens; any batch goes through one graph
def of_tokens(tokens, causal):
    return captured(seeded(Attends, is_causal=causal), tokens=tokens)


@settings(deadline=None, max_examples=12)
@given(tokens=st.sampled_from((1, 2, 9)), batch=st.integers(1, 4), causal=st.booleans())
def test_any_batch_goes_through(tokens, batch, causal):
    gm = of_tokens(tokens, causal)
    check_same(gm, *inputs(tokens=tokens, batch=batch))


def test_keys_may_outnumber_queries():
    class Cross(nn.Module):
        def forward(self, x, t):
            y = F.scaled_dot_product_attention(x[:, :2], x, x, is_causal=True)
            return y * t[:, None, None]

    check_same(captured(Cross()), *inputs())


def test_the_last_product_keeps_the_name_and_the_block():
    gm = captured(seeded(Attends))
    (old,) = [n for n in gm.graph.nodes if op_name(n) == "scaled_dot_product_attention"]
    done = decompose_attention(gm).gm
    (new,) = [n for n in done.graph.nodes if n.name == old.name]
    assert new.target is torch.matmul
    assert new.meta["nn_module_stack"] == old.meta["nn_module_stack"]
    assert str(new.meta["val"].shape) == str(old.meta["val"].shape)
    assert new.meta["val"].dtype == old.meta["val"].dtype
    assert [n.name for n in gm.graph.nodes].count(f"{old.name}_scores") == 0  # the input is intact


def test_a_query_that_sees_no_key_gets_zero_and_finite_gradients():
    gm = captured(seeded(Attends, mask=seeded_mask("float")))
    done = decompose_attention(gm).gm
    x, t = inputs()
    x.requires_grad_(True)
    (y,) = done(x, t)
    assert bool((y[:, 2] == 0).all())
    y.sum().backward()
    assert bool(torch.isfinite(x.grad).all())


class Views(nn.Module):
    """Reads the result through `view`, which the fused kernel's memory layout allows."""

    def forward(self, x, t):
        q = x.unflatten(-1, (3, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q).transpose(1, 2)
        return y.view(x.shape[0], -1, 12) * t[:, None, None]


def test_views_of_the_result_still_work():
    x, t = inputs()
    model = Views()
    expected = model(x.float(), t)
    gm = capture(model, {"x": x.float()[:2], "t": t[:2]}, timestep="t").gm
    done = decompose_attention(gm)
    assert names(done.gm).count("clone") == 1
    (found,) = done.gm(x.float(), t)
    # float32: sums of at most 6 terms of order 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_dropout_and_attention_inside_a_module_are_declined():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

        def forward(self, x, t):
            return self.attention(x, x, x)[0] * t[:, None, None]

    done = decompose_attention(captured(seeded(Attends, dropout_p=0.1)))
    assert done.changed == 0 and [d.reason for d in done.declined] == ["it has dropout"]
    done = decompose_attention(captured(seeded(Inside)))
    assert done.changed == 0
    assert {d.reason for d in done.declined} == {"attention inside torch.nn.MultiheadAttention"}


def test_models_that_write_it_out_are_left_as_they_are():
    model = seeded(ToyUNet).eval()
    example = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([1, 2])}
    gm = capture(model, example, timestep="t").gm
    done = decompose_attention(gm)
    assert done.changed == 0 and [n.name for n in done.gm.graph.nodes] == [
        n.name for n in gm.graph.nodes
    ]


def test_a_transformer_stays_the_same_function():
    model = seeded(ToyDiT).eval()
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 5]), torch.tensor([3, 4])
    gm = capture(model, {"x": x, "t": t, "y": y}, timestep="t").gm
    done = decompose_attention(gm)
    assert done.changed == len(model.blocks)
    with torch.no_grad():
        (found,), (expected,) = done.gm(x, t, y), gm(x, t, y)
    # float32 (the model embeds t in it) through 2 blocks: 1e-5 is a hundred roundings
    assert float((found - expected).norm() / expected.norm()) < 1e-5
