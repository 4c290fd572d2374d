"""rotate_inputs: the same outputs from inputs whose outliers are spread over their block."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.exact import (
    Called,
    all_sites,
    assert_untouched,
    captured,
    check_exact,
    graph_of,
    inputs_of,
    layers,
    snapshot,
    values_of,
)
from tests.strategies import WIDTH, GraphBuilder
from tests.toys import SharedTwice, seeded
from tfmq_fx.core.errors import ConfigError
from tfmq_fx.core.stages import Stage, stage_of
from tfmq_fx.ir.functionalize import inplace_
from tfmq_fx.passes.rotate_inputs import hadamard, rotate_inputs
from tfmq_fx.serialization import artifact


def rotations(gm):
    return [n for n in gm.graph.nodes if n.op == "call_function" and n.name.endswith("_rotated")]


@pytest.mark.parametrize("size", [1, 2, 4, 64, 256])
def test_hadamard_matrices_are_orthonormal_and_symmetric(size):
    h = hadamard(size)
    assert torch.allclose(h @ h.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(h, h.T) and bool((h.abs() == 1 / math.sqrt(size)).all())


@settings(max_examples=40)
@given(case=layers(), group=st.sampled_from((2, 4, 8, 256)))
def test_any_layer_called_several_times_keeps_its_output(case, group):
    layer, x = case
    gm = graph_of(Called(layer), x)
    before = snapshot(gm)
    done = rotate_inputs(gm, group=group, only={"layer"})
    check_exact(gm, done)
    assert_untouched(gm, before)
    assert stage_of(done.gm) is Stage.CAPTURED
    rotates = isinstance(layer, nn.Linear) and layer.in_features % 2 == 0
    assert done.changed == rotates and len(done.declined) == 1 - rotates
    if rotates:
        size = done.details["group"]["layer"]
        powers = [p for p in (2, 4, 8, 16) if p <= group and layer.in_features % p == 0]
        assert size == max(powers)
        assert [tuple(b.shape) for _, b in done.gm.named_buffers()] == [(size, size)]
        assert len(rotations(done.gm)) == 2  # one layer, two inputs


@pytest.mark.parametrize("name", ["digits", "pixart-alpha", "sd3"])
def test_whole_models_keep_their_outputs(name):
    gm = captured(name)
    before = snapshot(gm)
    names = [site.name for site in all_sites(gm)]
    done = rotate_inputs(gm, group=16, only=names)
    check_exact(gm, done)
    assert_untouched(gm, before)
    linear = [s.name for s in all_sites(gm) if isinstance(s.layer, nn.Linear)]
    assert done.changed == len(linear) > 5
    assert set(done.details["group"].values()) <= {2, 4, 8, 16}
    # one matrix for each size of block, and fewer rotations than layers where some share an input
    assert len([n for n, _ in done.gm.named_buffers() if n.startswith("hadamard")]) == len(
        set(done.details["group"].values())
    )
    assert len(rotations(done.gm)) < len(linear)
    again = rotate_inputs(done.gm, group=16, only=names)
    assert again.changed == 0 and len(again.declined) == len(names)


def test_an_outlier_is_spread_over_its_block():
    gm = graph_of(Called(seeded(nn.Linear, 16, 4)), torch.randn(2, 16))
    done = rotate_inputs(gm, group=8, only={"layer"}).gm
    x = torch.zeros(2, 16, dtype=torch.float64)
    x[:, 3] = 8.0
    seen = values_of(done, [x, torch.zeros(2)])[rotations(done)[0].name].abs()
    assert torch.allclose(seen[:, :8], torch.full((2, 8), 8 / math.sqrt(8), dtype=torch.float64))
    assert not bool(seen[:, 8:].any())


class ThreeReaders(nn.Module):
    """Attention's three projections of one input, and a layer of other blocks."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x, t):
        h = torch.tanh(x)
        return self.out(self.q(h) * self.k(h) + self.v(h)) + t[:, None]


def test_sites_that_read_one_value_share_its_rotation():
    gm = graph_of(seeded(ThreeReaders), torch.randn(2, 12))
    done = rotate_inputs(gm, group=16, only={"q", "k", "out"})
    check_exact(gm, done)
    inputs = [done.gm.graph.find_nodes(op="call_module", target=n)[0].args[0] for n in "qkv"]
    assert inputs[0] is inputs[1] and inputs[2].name == "tanh"
    assert len(rotations(done.gm)) == 2
    assert done.details == {"group": {"q": 4, "k": 4, "out": 4}}


def test_a_value_that_is_written_in_place_is_rotated_for_each_reader():
    b = GraphBuilder()
    h = b.call(torch.tanh, b.x)
    first = b.layer("a", nn.Linear(WIDTH, WIDTH), h)
    write = b.call(inplace_, h, "mul_", 3.0)
    write.meta["writes"] = True
    gm = b.finish(b.call(torch.add, first, b.layer("b", nn.Linear(WIDTH, WIDTH), h)))
    done = rotate_inputs(gm, group=4, only={"a", "b"})
    check_exact(gm, done, tolerance=1e-5)  # single precision
    assert len(rotations(done.gm)) == 2


def test_one_rotation_for_each_call_of_a_layer():
    gm = graph_of(SharedDouble(), torch.randn(2, 4))
    done = rotate_inputs(gm, group=4, only={"linear"})
    check_exact(gm, done)
    assert done.changed == 1 and len(rotations(done.gm)) == 3


class SharedDouble(SharedTwice):
    def base(self, x, t):
        return self.linear(x) + t[:, None]


def test_half_precision_makes_up_for_the_rounding_of_the_matrix():
    layer = seeded(nn.Linear, 32, 64, bias=False).half()
    b = GraphBuilder()
    x = b.placeholder("y", b.x.meta["val"].new_empty((b.batch, 32), dtype=torch.float16))
    done = rotate_inputs(b.finish(b.layer("layer", layer, x)), group=32, only={"layer"}).gm
    assert done.hadamard.dtype == torch.float16
    weight = layer.weight.detach().double()
    back = done.get_submodule("layer").weight.detach().double() @ done.hadamard.double()
    gain = float((back * weight).sum() / weight.square().sum())
    # 2048 weights are rounded by up to 2**-12 each, with signs of their own: about 5e-6 of the
    # gain. The entries of the matrix are all rounded alike, and would add 1e-4.
    off = abs(float(done.hadamard[0, 0]) * math.sqrt(32) - 1)
    assert off > 1e-4 and abs(gain - 1) < off / 4
    assert done(*inputs_of(done))[0].dtype == torch.float16


def test_a_rotated_graph_is_saved_and_loaded_bit_identical(tmp_path):
    gm = captured("pixart-alpha")
    done = rotate_inputs(gm, group=8, only=[s.name for s in all_sites(gm)]).gm
    artifact.save(tmp_path / "model", gm=done, call={}, config={}, extra={})
    loaded, inputs = artifact.load(tmp_path / "model").gm, inputs_of(gm)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs)[0], done(*inputs)[0])


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.Conv1d(8, 8, 3), (8, 5), "a convolution: only linear layers are rotated"),
        (nn.Linear(9, 4), (9,), "no power of two divides its 9 input features"),
    ],
)
def test_what_is_declined_says_why(layer, shape, reason):
    gm = graph_of(Called(layer), torch.randn(2, *shape))
    done = rotate_inputs(gm, group=4, only={"layer"})
    assert done.changed == 0 and [(d.site, d.reason) for d in done.declined] == [("layer", reason)]
    assert done.gm.get_submodule("layer") is gm.get_submodule("layer")


@pytest.mark.parametrize("group", [0, 1, 3, 12, -4])
def test_blocks_of_other_sizes_are_refused(group):
    gm = graph_of(Called(nn.Linear(4, 4)), torch.randn(2, 4))
    with pytest.raises(ConfigError, match=f"a power of two, got {group}"):
        rotate_inputs(gm, group=group, only={"layer"})
    with pytest.raises(ConfigError, match="no layer nothing"):
        rotate_inputs(gm, group=4, only={"nothing"})
