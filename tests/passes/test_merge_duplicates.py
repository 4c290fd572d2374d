"""merge_duplicates: equal layers on equal values become one; nothing else does."""

import copy

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from tests.strategies import captured_graphs, draw_inputs
from tests.toys import sinusoidal
from tfmq_fx import fold_timesteps, prepare
from tfmq_fx.capture.capture import capture
from tfmq_fx.ir.temporal_block import temporal_block
from tfmq_fx.passes.merge_duplicates import merge_duplicates


class Repeats(nn.Module):
    """Each block embeds the timestep itself, with the same weights, as DiT does in diffusers."""

    def __init__(self, depth=3, width=8):
        super().__init__()
        embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.embeds = nn.ModuleList(copy.deepcopy(embed) for _ in range(depth))
        self.mods = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.width = width

    def forward(self, x, t):
        for embed, mod in zip(self.embeds, self.mods, strict=True):
            x = x + mod(embed(sinusoidal(t, self.width)))
        return x


def repeats(seed=0):
    torch.manual_seed(seed)
    return Repeats().eval()


def graph(model, device="cpu"):
    example = {"x": torch.randn(2, 8, device=device), "t": torch.tensor([1, 2], device=device)}
    return capture(model, example, timestep="t").gm


def layers(gm):
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_module"]


def test_equal_embedders_become_one():
    model = repeats()
    before = graph(model)
    done = merge_duplicates(before)
    assert layers(done.gm) == [
        "embeds.0.0",
        "embeds.0.1",
        "embeds.0.2",
        "mods.0",
        "mods.1",
        "mods.2",
    ]
    assert done.details["merged"] == {
        f"embeds.{i}.{j}": f"embeds.0.{j}" for i in (1, 2) for j in (0, 1, 2)
    }
    assert len(layers(before)) == 12 and len(model.embeds) == 3
    cosines = [node for node in done.gm.graph.nodes if node.target == "cos"]
    assert len(cosines) == 1
    x, t = torch.randn(3, 8), torch.tensor([0, 7, 3])
    with torch.no_grad():
        assert torch.equal(done.gm(x, t)[0], model(x, t))


def test_one_bit_of_difference_keeps_layers_apart():
    model = repeats()
    with torch.no_grad():
        weight = model.embeds[1][0].weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    found = layers(merge_duplicates(graph(model)).gm)
    assert "embeds.1.0" in found and "embeds.1.2" in found and "embeds.2.0" not in found


class Differing(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.GroupNorm(2, 8, eps=1e-5), nn.GroupNorm(2, 8, eps=1e-3)
        self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 8)
        self.p, self.q = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x, t):
        y = self.a(x) + self.b(x) + self.c(x) * self.p + self.c(x) * self.q + self.d(x)
        return y + torch.randn_like(x) * torch.randn_like(x) + t[:, None]


def test_settings_random_numbers_and_named_parameters_stay_apart():
    torch.manual_seed(0)
    model = Differing().eval()
    before = graph(model)
    done = merge_duplicates(before)
    assert layers(done.gm) == ["a", "b", "c", "d"]  # the second call of c went
    targets = [node.target for node in done.gm.graph.nodes]
    assert targets.count(torch.randn_like) == 2 and {"p", "q"} <= set(targets)
    x, t = torch.randn(3, 8), torch.arange(3)
    results = []
    for gm in (before, done.gm):
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(gm(x, t)[0])
    assert torch.equal(*results)


def test_layers_on_the_meta_device_are_not_compared():
    assert len(layers(merge_duplicates(graph(repeats().to("meta"), "meta")).gm)) == 12


def test_one_row_serves_all_blocks():
    model = repeats()
    assert len(temporal_block(merge_duplicates(graph(model)).gm).modules) == 2 + 3
    x, t = torch.randn(1, 8), torch.tensor([5])
    done = fold_timesteps(model, 10, (x, t))
    with torch.no_grad():
        assert torch.equal(done(x, t), model(x, t))
    assert prepare(model, (x, t), config="fp").gm.meta["capture"]["merged"]["embeds.1.0"]


@settings(deadline=None, max_examples=60)
@given(captured_graphs())
def test_any_graph_computes_the_same(gm):
    done = merge_duplicates(gm)
    inputs = draw_inputs(gm, 3)
    for a, b in zip(gm(**inputs), done.gm(**inputs), strict=True):
        assert torch.equal(a, b)
    assert merge_duplicates(done.gm).changed == 0


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_layers_with_hooks_stay(hook):
    model = repeats()
    gm = graph(model)
    getattr(gm.get_submodule("embeds.1.0"), hook)(lambda *_: None)
    assert "embeds.1.0" in layers(merge_duplicates(gm).gm)
