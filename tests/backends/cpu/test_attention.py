"""Attention goes to the kernel where it computes the same, and stays with torch elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from tests.backends.cpu.cases import needs_kernels
from tests.toys import ToyDiT, seeded
from tfmq_fx.backends.cpu.attention import attention, use_kernel
from tfmq_fx.capture.capture import capture
from tfmq_fx.quant.sqnr import sqnr

SHAPE = (2, 4, 9, 8)


class Attends(nn.Module):
    def __init__(self, *args, **options):
        super().__init__()
        self.args, self.options = args, options

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, *self.args, **self.options)


def tensors(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = shapes or (SHAPE,) * 3
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def traced(module, *values):
    gm = fx.symbolic_trace(module)
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), values, strict=True):
        node.meta["val"] = value
    return gm


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("module", [
    Attends(), Attends(scale=0.5), Attends(None, 0.0, False), Attends(None, 0.0, scale=1.5),
    Attends(attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False),
])  # fmt: skip
def test_plain_attention_runs_on_the_kernel(module, dtype):
    values = tensors(dtype=dtype)
    gm = traced(module, *values)
    assert use_kernel(gm) == 1
    gm.graph.lint()
    gm.recompile()
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [attention]
    assert sqnr(module(*(v.double() for v in values)), gm(*values)) > 40  # as for the kernel


@needs_kernels
def test_a_scale_of_zero_is_one():
    values = tensors()
    gm = traced(Attends(scale=0.0), *values)
    assert use_kernel(gm) == 1
    gm.recompile()
    mean = values[2].mean(2, keepdim=True).expand(SHAPE)
    assert sqnr(mean, gm(*values)) > 40


@needs_kernels
def test_other_lengths_and_channels_that_lie_apart():
    values = tensors((2, 4, 9, 8), (2, 4, 21, 8), (2, 4, 21, 12))
    odd = [v.mT.contiguous().mT for v in values]
    assert all(v.stride(-1) != 1 for v in odd)
    expected = F.scaled_dot_product_attention(*values)
    assert sqnr(expected, attention(*odd, None)) > 40


MASK = torch.ones(9, 9, dtype=torch.bool).tril()


@pytest.mark.parametrize("module, values", [
    (Attends(MASK), tensors()),
    (Attends(attn_mask=MASK.float()), tensors()),
    (Attends(None, 0.1), tensors()),
    (Attends(dropout_p=0.1), tensors()),
    (Attends(is_causal=True), tensors()),
    (Attends(None, 0.0, True), tensors()),
    (Attends(enable_gqa=True), tensors(SHAPE, (2, 2, 9, 8), (2, 2, 9, 8))),
    (Attends(), tensors(SHAPE, (2, 1, 9, 8), (2, 1, 9, 8))),
    (Attends(), tensors(SHAPE, (1, 4, 9, 8), (1, 4, 9, 8))),
    (Attends(), tensors((1, 4, 9, 8), SHAPE, SHAPE)),
    (Attends(), tensors((4, 9, 8), (4, 9, 8), (4, 9, 8))),
    (Attends(), tensors(dtype=torch.float64)),
    (Attends(), tensors(dtype=torch.float16)),
    (Attends(), [v.to("meta") for v in tensors()]),
    (Attends(), [*tensors()[:2], tensors()[2].bfloat16()]),
])  # fmt: skip
def test_what_the_kernel_does_not_compute_is_left_alone(module, values):
    gm = traced(module, *values)
    before = gm.code
    assert use_kernel(gm) == 0
    gm.recompile()
    assert gm.code == before


def test_a_scale_or_mask_that_the_graph_computes_is_left_alone():
    class Computed(nn.Module):
        def forward(self, q, k, v):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=k.sum() + MASK)
            return F.scaled_dot_product_attention(y, k, v, scale=k.sum())

    class ByName(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(query=q, key=k, value=v)

    assert use_kernel(traced(Computed(), *tensors())) == 0
    assert use_kernel(traced(ByName(), *tensors())) == 1  # names are read too


@needs_kernels
def test_a_transformer_attends_on_the_kernel():
    model = seeded(ToyDiT).eval()
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 5]), torch.tensor([3, 4])
    gm = capture(model, {"x": x, "t": t, "y": y}, timestep="t").gm
    with torch.no_grad():
        expected = model(x, t, y)
        assert use_kernel(gm) == len(model.blocks)
        gm.recompile()
        assert sqnr(expected, gm(x, t, y)[0]) > 40
