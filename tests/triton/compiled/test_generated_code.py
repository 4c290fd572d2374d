"""A lowered model compiles for CUDA without a break, to the kernels it should and little else."""

import re

import pytest
import torch
from torch import nn

from tests.toys import seeded
from tests.triton.compiled.without_device import generated_code
from tfmq_fx import ActivationSpec, LayerConfig, WeightSpec, calibrate, convert, prepare
from tfmq_fx.backends.cuda.autotune import untimed_choice
from tfmq_fx.backends.cuda.lower import lower

TIMES = (0, 3, 7)
LAYERS = {
    "int8": LayerConfig(weights=WeightSpec(), activations=ActivationSpec()),
    "int4": LayerConfig(weights=WeightSpec(bits=4), activations=ActivationSpec()),
    "fp8": LayerConfig(weights=WeightSpec(format="fp8"), activations=ActivationSpec(format="fp8")),
}


class Block(nn.Module):
    """A residual block of a UNet: norms, convolutions, a time embedding, a shortcut."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 64)
        self.norm1, self.norm2 = nn.GroupNorm(8, 32), nn.GroupNorm(8, 64)
        self.conv1 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1)
        self.skip = nn.Conv2d(32, 64, 1)

    def forward(self, x, t):
        row = self.embed(t[:, None].to(x.dtype))
        h = self.conv1(nn.functional.silu(self.norm1(x))) + row[:, :, None, None]
        h = self.conv2(nn.functional.silu(self.norm2(h)))
        return self.skip(x) + h


X = torch.randn(2, 32, 16, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
CALLS = [
    (X.contiguous(memory_format=torch.channels_last), torch.full((2,), time)) for time in TIMES
]


def lowered(layer):
    model = seeded(Block).eval().to(torch.bfloat16)
    prepared = prepare(model, CALLS[0], timesteps=TIMES, config="w8a8", overrides={"*": layer})
    made = convert(calibrate(prepared, CALLS, progress=False), progress=False)
    done = lower(made.gm, choose=untimed_choice, capability=(9, 0))
    assert done.declined == [] and done.details["integer"] == 3
    return done.gm


@pytest.fixture(scope="module")
def generated():
    graphs = {name: lowered(layer) for name, layer in LAYERS.items()}
    # torch.Tensor is not quite itself after the first: graphs are made before
    return {name: generated_code(gm, CALLS[0]) for name, gm in graphs.items()}


@pytest.fixture(params=["int8", "int4", "fp8"])
def code(generated, request):
    return generated[request.param]


def launches(code):
    body = code[code.index("def call(") :]
    return [name.rstrip("0123456789").rstrip("_") for name in re.findall(r"(\w+)\.run\(", body)]


def test_every_layer_and_norm_is_one_of_our_kernels(code):
    found = launches(code)
    assert found.count("conv_kernel") == 3
    assert found.count("norm_partial_kernel") == found.count("norm_apply_kernel") == 2


def test_little_else_is_launched(code):
    others = [name for name in launches(code) if not name.endswith("_kernel")]
    # for each norm the statistics of its groups; look-ups by timestep and the shortcut's codes
    assert len(others) <= 6, others
    assert "extern_kernels" not in code[code.index("def call(") :]


def test_results_are_written_once(code):
    """Nothing clones what a kernel writes to: Inductor knows that it is empty before."""
    allocated = re.findall(r"empty_strided_cuda\(\(2, 16, 16, 64\).*?torch\.(\w+)\)", code)
    assert allocated.count("bfloat16") <= 3
