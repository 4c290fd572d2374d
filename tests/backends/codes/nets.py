"""Small nets, lowered to the CUDA kernels and fused; on the CPU these run as references."""

import dataclasses

import torch
from torch import nn

from tests.toys import seeded
from tfmq_fx.backends.codes import fuse as fusions
from tfmq_fx.backends.cuda import lower as lowering
from tfmq_fx.backends.cuda.autotune import untimed_choice
from tfmq_fx.backends.cuda.norm import norm_codes
from tfmq_fx.calibration.observers import Ranges
from tfmq_fx.capture.capture import capture
from tfmq_fx.core.layer_config import ActivationSpec, LayerConfig, WeightSpec
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.graph import fork
from tfmq_fx.ir.graph_pass import prune
from tfmq_fx.ir.sites import find_sites
from tfmq_fx.ir.verifier import check
from tfmq_fx.passes.fold_timesteps import fold_timesteps
from tfmq_fx.passes.quantize_layers import quantize_layers
from tfmq_fx.passes.split_concat import split_concat

TIMES = (0, 3, 7)
NORMS = {"norm": norm_codes}
C = 16  # channels of the nets below
EIGHT = LayerConfig(weights=WeightSpec(search=1), activations=ActivationSpec())
LINEARS = {name: lambda: nn.Linear(C, C) for name in "qkv"}
TOP = torch.tensor([2.0, 3.0, 4.0])  # of every layer's input at each timestep


class Net(nn.Module):
    """function(net, x, row), between two convolutions; row (B, C) depends on the timestep."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        self.embed = nn.Linear(4, C)
        self.enter = nn.Conv2d(3, C, 3, padding=1)
        self.leave = nn.Conv2d(C, 3, 3, padding=1)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x, t):
        row = self.embed(torch.cos(t[:, None].float() * torch.arange(1, 5, device=t.device)))
        return self.leave(torch.tanh(self.function(self, self.enter(x), row)))


def conv(size=3, width=C, out=C, **options):
    return nn.Conv2d(width, out, size, padding=size // 2, **options)


def norm(channels=C):
    return nn.GroupNorm(4, channels)


def net(function, **layers):
    """layers: makers, called in the order given."""
    return seeded(lambda: Net(function, **{name: make() for name, make in layers.items()})).eval()


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 3, 6, 6, generator=generator), torch.full((4,), t)) for t in TIMES]


def whole_sums(problem, dtype):
    """A choice of kernels that do not share sums: only they take a second segment."""
    choice = untimed_choice(problem, dtype)
    return dataclasses.replace(choice, tile=choice.tile._replace(split=1))


def captured(model, dynamic=()):
    """The graph of a net, its sizes fixed: free ones take five times as long."""
    x, t = data()[0]
    return capture(model, {"x": x, "t": t}, timestep="t", dynamic=dynamic).gm


def quantized(gm, layers=EIGHT, plan=None):
    """A captured graph with its embedding in a table, layers of concatenations split, and all
    others quantized on one range."""
    keys = torch.tensor(TIMES)
    gm = split_concat(gm, only=[site.name for site in find_sites(gm)[0]]).gm
    gm = fold_timesteps(gm, timesteps=keys).gm
    sites = [site.name for site in find_sites(gm)[0]]
    ranges = dict.fromkeys(sites, Ranges(-TOP, TOP, 0))
    whole = dict.fromkeys(sites, layers) | (plan or {})
    return quantize_layers(gm, plan=whole, ranges=ranges, timesteps=keys).gm


def lowered(model, monkeypatch, layers=EIGHT, plan=None, choose=whole_sums, dynamic=()):
    """The lowered graph of a model before it is fused."""
    with monkeypatch.context() as patch:
        patch.setattr(lowering, "fuse", lambda gm, choose, **norms: {})
        gm = quantized(captured(model, dynamic), layers, plan)
        return lowering.lower(gm, choose=choose, capability=(9, 0)).gm


def apply(gm, *names, choose=whole_sums):
    """A copy of a lowered graph after fusions, and what each of them counted."""
    done, counts = fork(gm), []
    with torch.no_grad():
        for name in names:
            choosing = (choose,) if name == "join_siblings" else ()
            norms = NORMS if name == "fuse_norms" else {}
            counts.append(getattr(fusions, name)(done, *choosing, **norms))
            prune(done.graph)
    done.delete_all_unused_submodules()
    done.recompile()
    done.meta["stage"] = Stage.LOWERED
    check(done, Stage.LOWERED)
    return done, counts


def results(gm, calls=None):
    with torch.no_grad():
        return [gm(x, t)[0] for x, t in calls or data(seed=1)]


def assert_same(gm, other):
    """Equal, bit for bit."""
    for found, expected in zip(results(gm), results(other), strict=True):
        assert torch.equal(found, expected)


def assert_near(gm, other):
    """Equal but for how float32 sums are rounded: a code of the last layer's input may fall on the
    other side."""
    for found, expected in zip(results(gm), results(other), strict=True):
        assert (found - expected).abs().max() <= code_step(other) + 1e-5
        assert (found - expected).abs().median() < 1e-6


def code_step(gm):
    """What one code of the last layer's input changes in the output at most."""
    weight = gm.leave.weight.float().abs() * gm.leave.weight_scale[:, None, None, None]
    return float(gm.activation_scales.max() * weight.max())


def count(gm, target):
    return len(gm.graph.find_nodes(op="call_function", target=target))
