"""attention: padding narrow heads for the CPU's kernel changes nothing but the order of sums."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from tests.toys import ToyDiT, seeded
from tfmq_fx.backends.cpu.attention import WIDTH, pad_attention, padded_attention
from tfmq_fx.capture.capture import capture


def tensors(width, value_width=None, tokens=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, tokens)
    widths = (width, width, value_width or width)
    return [torch.randn(*shape, w, generator=generator).to(dtype) for w in widths]


# Dot products of at most 16 numbers and sums over 12 tokens, in another order: each sum is off by
# at most its length times 2**-24 of its terms, here below 12 * 16 * 2**-24 = 1.2e-5.
TOLERANCE = {"rtol": 0, "atol": 1.2e-5}


@pytest.mark.parametrize("width", [1, 4, 8, 15, 16])
@pytest.mark.parametrize("scale", [None, 0.37])
def test_padded_attention_is_attention(width, scale):
    q, k, v = tensors(width)
    expected = F.scaled_dot_product_attention(q, k, v, scale=scale)
    found = padded_attention(q, k, v, scale=scale)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_values_may_have_another_width():
    q, k, v = tensors(4, value_width=9)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(padded_attention(q, k, v), expected, **TOLERANCE)


def test_masks_and_causality_are_kept():
    q, k, v = tensors(8)
    keep = torch.rand(12, 12, generator=torch.Generator().manual_seed(1)) > 0.3
    keep.fill_diagonal_(True)
    bias = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(2))
    for mask in (keep, bias):
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(padded_attention(q, k, v, mask), expected, **TOLERANCE)
        found = padded_attention(q, k, v, attn_mask=mask, scale=0.2)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.2)
        torch.testing.assert_close(found, expected, **TOLERANCE)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(padded_attention(q, k, v, is_causal=True), expected, **TOLERANCE)


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **self.options)


def traced(module, *values):
    gm = fx.symbolic_trace(module)
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), values, strict=True):
        node.meta["val"] = value
    return gm


@pytest.mark.parametrize("width, changed", [(8, 1), (15, 1), (WIDTH, 0), (64, 0)])
def test_only_heads_narrower_than_the_vector_width_are_padded(width, changed):
    values = tensors(width)
    gm = traced(Attends(scale=0.5), *values)
    expected = gm(*values)
    assert pad_attention(gm) == changed
    gm.recompile()
    torch.testing.assert_close(gm(*values), expected, **TOLERANCE)
    assert (padded_attention in {n.target for n in gm.graph.nodes}) == bool(changed)


def test_heads_on_other_devices_are_left_alone():
    gm = traced(Attends(), *(v.to("meta") for v in tensors(8)))
    assert pad_attention(gm) == 0


def test_tensors_given_by_name_are_left_alone():
    class ByName(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(query=q, key=k, value=v)

    gm = traced(ByName(), *tensors(8))
    assert pad_attention(gm) == 0


def test_attention_of_a_transformer_is_padded():
    model = seeded(ToyDiT).eval()
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 5]), torch.tensor([3, 4])
    gm = capture(model, {"x": x, "t": t, "y": y}, timestep="t").gm
    with torch.no_grad():
        expected = model(x, t, y)
        assert pad_attention(gm) == len(model.blocks)
        gm.recompile()
        (found,) = gm(x, t, y)
    assert math.isclose(float(found.norm()), float(expected.norm()), rel_tol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
