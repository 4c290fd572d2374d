"""Models in double precision, and the comparison that every exact rewrite of layers must pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from tests import zoo
from tests.toys import seeded, tiny_unet2d
from tfmq_fx.capture.capture import capture
from tfmq_fx.ir.graph_pass import Rewrite
from tfmq_fx.ir.sites import Site, find_sites

# Sums of up to thousands of products in another order differ by about 1e-14 in double precision,
# and dozens of layers with norms between them amplify that by a few orders; a wrong weight or
# channel gives 1e-2 and more.
TOLERANCE = 1e-10


class Called(nn.Module):
    """One layer, called on x and on its double, by keyword once; t moves the result."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x)) + self.layer(input=2 * x)
        return y + t.view(-1, *[1] * (y.dim() - 1))


def graph_of(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """The graph of model(x, t)."""
    steps = torch.arange(1, len(x) + 1)
    return capture(model.double().eval(), {"x": x.double(), "t": steps}, timestep="t").gm


def inputs_of(gm: fx.GraphModule, batch: int = 2, seed: int = 0) -> list[Tensor]:
    """Random values for the placeholders of a graph whose batch is free."""
    generator = torch.Generator().manual_seed(seed)
    values = []
    for node in gm.graph.find_nodes(op="placeholder"):
        fake = node.meta["val"]
        shape = [size if isinstance(size, int) else batch for size in fake.shape]
        if fake.dtype.is_floating_point and node.target != gm.meta["timestep"]:
            values.append(torch.randn(shape, generator=generator, dtype=fake.dtype))
        else:
            values.append(torch.randint(0, 8, shape, generator=generator).to(fake.dtype))
    return values


def values_of(gm: fx.GraphModule, inputs: list[Tensor]) -> dict[str, Any]:
    """The value of every node, by name."""
    values: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    with torch.no_grad():
        Recorder(gm).run(*inputs)
    return values


def relative(found: Any, expected: Any) -> float:
    """Largest difference, relative to the largest value; of numbers, whether they differ."""
    if not isinstance(expected, Tensor):
        return float(found != expected)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if found.numel() == 0 or not found.dtype.is_floating_point:
        return float(not torch.equal(found, expected))
    expected = expected.detach()
    scale = float(expected.abs().max()) or 1.0
    return float((found.detach() - expected).abs().max()) / scale


def check_exact(
    gm: fx.GraphModule, done: Rewrite, *, batch: int = 2, tolerance: float = TOLERANCE
) -> None:
    """Assert that a rewrite kept every value under its name, and that what the graph says of its
    values is true."""
    inputs = inputs_of(gm, batch)
    before, after = values_of(gm, inputs), values_of(done.gm, inputs)
    for name, expected in before.items():
        pairs = zip(tree_leaves(after[name]), tree_leaves(expected), strict=True)
        assert all(relative(a, b) <= tolerance for a, b in pairs), name
    for node in done.gm.graph.nodes:
        assert node.op == "output" or "nn_module_stack" in node.meta, node.name
        value, found = node.meta.get("val"), after[node.name]
        if isinstance(value, Tensor):
            assert found.dtype == value.dtype and found.dim() == value.dim(), node.name
            for size, real in zip(value.shape, found.shape, strict=True):
                assert not isinstance(size, int) or size == real, node.name


def snapshot(gm: fx.GraphModule) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """What must be the same of a graph after a pass has read it."""
    modules = {name: type(module) for name, module in gm.named_modules()}
    return gm.code, modules, {name: value.clone() for name, value in gm.state_dict().items()}


def assert_untouched(gm: fx.GraphModule, earlier: tuple[str, dict[str, Any], Any]) -> None:
    """Assert that a graph is as it was when `snapshot` looked."""
    code, modules, tensors = snapshot(gm)
    assert code == earlier[0] and modules == earlier[1] and tensors.keys() == earlier[2].keys()
    assert all(torch.equal(value, earlier[2][name]) for name, value in tensors.items())


def all_sites(gm: fx.GraphModule) -> list[Site]:
    """The sites of a graph."""
    return find_sites(gm)[0]


@functools.cache
def captured(name: str) -> fx.GraphModule:
    """A model in double precision: "digits", the shipped UNet, "tiny", another, or of the zoo."""
    if name == "digits":
        from tfmq_fx.evaluation.digits import load_unet

        model: nn.Module = load_unet().double()
        example = {"sample": torch.randn(2, 1, 16, 16).double(), "timestep": torch.tensor([3, 9])}
    elif name == "tiny":
        model = tiny_unet2d().double()
        example = {"sample": torch.randn(2, 3, 16, 16).double(), "timestep": torch.tensor([3, 9])}
    else:
        model = zoo.model(name, dtype=torch.float64)
        example = zoo.inputs(name, model)
    return capture(model, example, timestep="timestep").gm


@st.composite
def layers(draw: st.DrawFn, *, grouped: bool = True) -> tuple[nn.Module, Tensor]:
    """A linear layer or a convolution with random weights, and an input for it, batch 2; a channel
    of the input, or of the weights, may be zero."""
    bias = draw(st.booleans())
    if draw(st.booleans()):
        width, out = draw(st.integers(1, 12)), draw(st.integers(1, 9))
        layer = seeded(nn.Linear, width, out, bias=bias)
        shape = (2, *draw(st.sampled_from(((), (3,), (1, 2)))), width)
        dim = -1
    else:
        groups = draw(st.sampled_from((1, 2, 3))) if grouped else 1
        width, out = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))
        dims = draw(st.sampled_from((1, 2, 2, 3)))
        kernel = tuple(draw(st.sampled_from((1, 2, 3))) for _ in range(dims))
        dilation, stride = draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 2)))
        mode = draw(st.sampled_from(("zeros", "zeros", "reflect", "circular", "replicate")))
        padding: Any = draw(st.sampled_from((0, 1, "same", "valid")))
        if padding == "same":
            stride = 1
        pixels = 1 if max(kernel) == 1 and draw(st.booleans()) else 7
        if pixels == 1 and mode != "zeros":
            padding = 0
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        layer = seeded(
            kind,
            width,
            out,
            kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=mode,
        )
        shape, dim = (2, width, *[pixels] * dims), 1
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if draw(st.booleans()):
        x.select(dim, 0).zero_()
    if draw(st.booleans()):
        layer.weight.data[:, 0] = 0
    return layer.double(), x.double()
