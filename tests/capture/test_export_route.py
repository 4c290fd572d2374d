"""The export route: models the tracer cannot follow, in the same form as all others."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import toys
from tests.capture.test_capture import call, equal, small_inputs
from tfmq_fx.api import fold_timesteps, prepare, save
from tfmq_fx.capture import capture as capture_module
from tfmq_fx.capture.capture import capture
from tfmq_fx.conversion.convert import convert
from tfmq_fx.core.errors import CaptureError, InputError
from tfmq_fx.diagnostics.report import report
from tfmq_fx.ir.temporal_block import temporal_block
from tfmq_fx.prologue.load_model import load


@torch.jit.script
def gate(x: Tensor, y: Tensor) -> Tensor:
    return x * torch.sigmoid(y)


class Scripted(toys.Small):
    """A scripted function, which takes tensors only."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.linear(x)
        return gate(self.base(x, t), h)


class Vmapped(toys.Small):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.vmap(lambda row: row * row.sum())(self.base(x, t))


class ScriptedBlock(nn.Module):
    """Layers of many kinds, one called twice, one on a weight that is not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.norm, self.act = nn.GroupNorm(2, 8), nn.SiLU()
        self.time = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
        self.steps = nn.Embedding(50, 8)
        self.token_norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        temb = self.time(self.steps(t))
        h = self.act(self.norm(self.conv(x)))
        h += temb[:, :, None, None]
        tokens = self.token_norm(h.flatten(2).transpose(1, 2))
        tokens = gate(self.mix(tokens), self.mix(tokens + 1))
        tokens = tokens + F.linear(tokens, self.mix.weight)
        h = tokens.transpose(1, 2).unflatten(2, h.shape[2:])
        return F.interpolate(self.out(h), scale_factor=2.0)


@pytest.mark.parametrize("kind", [Scripted, Vmapped, toys.Autocasts])
def test_what_cannot_be_traced_is_exported(kind: type[nn.Module]) -> None:
    model = toys.seeded(kind)
    captured = capture(model, small_inputs(1), timestep="t")
    assert captured.route == "export"
    assert captured.notes[0].startswith("captured by torch.export, since ")
    for batch in (1, 2, 5):
        inputs = small_inputs(batch)
        with torch.no_grad():
            equal(model(**inputs), call(captured, **inputs))


def test_layers_come_back_under_their_names() -> None:
    model = toys.seeded(ScriptedBlock)
    example = {"x": torch.randn(2, 4, 8, 8), "t": torch.tensor([3, 7])}
    captured = capture(model, example, timestep="t", dynamic=("batch", "spatial"))
    assert captured.route == "export"
    layers = [n.target for n in captured.gm.graph.nodes if n.op == "call_module"]
    found = ["steps", "time.0", "time.2", "conv", "norm", "token_norm", "mix", "mix", "out"]
    assert sorted(layers) == sorted(found)
    conv = next(n for n in captured.gm.graph.nodes if n.target == "conv")
    assert list(conv.meta["nn_module_stack"]) == ["", "conv"]
    assert any(n.meta["source"].startswith("test_export_route.py") for n in captured.gm.graph.nodes)
    for batch, side in ((1, 8), (3, 12)):
        x, t = torch.randn(batch, 4, side, side), torch.arange(batch) * 3
        with torch.no_grad():
            equal(model(x, t), call(captured, x, t))
    block = temporal_block(captured.gm)
    assert set(block.modules) == {"steps", "time.0", "time.2"}


def test_an_exported_model_goes_all_the_way(tmp_path: object) -> None:
    model = toys.seeded(ScriptedBlock).eval()
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([3])
    folded = fold_timesteps(model, 20, (x, t))
    with torch.no_grad():
        assert torch.equal(folded(x, t), model(x, t))
    prepared = prepare(model, (x, t), timesteps=4, config="w8a8")
    for step in range(4):
        prepared(torch.randn(6, 4, 8, 8), torch.full((6,), step))
    done = convert(prepared, progress=False)
    assert done.record["capture"]["route"] == "export"
    assert {"conv", "mix", "linear", "out"} == done.record["sites"].keys()
    folded = {"linear": {"weight": ["mix.weight"], "bias": []}}
    assert done.record["capture"]["folded"] == folded
    assert not done.record["declined"]
    save(done, f"{tmp_path}/model")
    with torch.no_grad():
        assert torch.equal(load(f"{tmp_path}/model")(x, t), done(x, t))


class BranchesOnSize(Scripted):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = super().forward(x, t)
        return h * 2 if x.shape[0] > 3 else h


def test_branches_of_an_exported_model_are_guarded() -> None:
    model = toys.seeded(BranchesOnSize)
    captured = capture(model, small_inputs(2), timestep="t")
    assert captured.route == "export"
    with torch.no_grad():
        for batch in (1, 3):
            inputs = small_inputs(batch)
            equal(model(**inputs), call(captured, **inputs))
        with pytest.raises(
            InputError, match=r"batch <= 3 is True \(tested at test_export_route.py"
        ):
            call(captured, **small_inputs(4))


class BranchesBeforeSizesMeet(Scripted):
    """Asks about the size of t before t meets x."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale = 3 if t.shape[0] > 4 else 1
        return super().forward(x, t) * scale


def test_guards_on_sizes_that_are_found_equal_later_are_kept() -> None:
    model = toys.seeded(BranchesBeforeSizesMeet)
    captured = capture(model, small_inputs(2), timestep="t")
    assert captured.route == "export"
    inputs = small_inputs(4)
    with torch.no_grad():
        equal(model(**inputs), call(captured, **inputs))
        with pytest.raises(InputError, match=r"batch <= 4 is True"):
            call(captured, **small_inputs(5))


def test_both_refusals_are_told() -> None:
    with pytest.raises(CaptureError, match="bool\\(\\) of a tensor's data") as caught:
        capture(toys.BranchesOnData(), small_inputs(), timestep="t")
    (note,) = caught.value.__notes__
    assert note.startswith("torch.export does not help: ")


@pytest.mark.parametrize("make", [toys.ToyUNet, toys.ToyDiT, toys.tiny_unet2d])
def test_both_routes_give_the_same_model(make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make() if make is toys.tiny_unet2d else toys.seeded(make)
    model.eval()
    side = 16 if make is toys.tiny_unet2d else 8
    example = {"x": torch.randn(2, 3, side, side), "t": torch.tensor([3, 500])}
    if make is toys.ToyDiT:
        example["y"] = torch.tensor([1, 2])
    if make is toys.tiny_unet2d:
        example = {"sample": example["x"], "timestep": example["t"]}
    timestep = list(example)[1]
    traced = capture(model, example, timestep=timestep)
    trace = capture_module._trace

    def refuse(*args, exported=None, **kwargs):
        if exported is None:
            raise CaptureError("refused by the test")
        return trace(*args, exported=exported, **kwargs)

    monkeypatch.setattr(capture_module, "_trace", refuse)
    exported = capture(model, example, timestep=timestep)
    assert (traced.route, exported.route) == ("trace", "export")
    a, b = (temporal_block(each.gm) for each in (traced, exported))
    assert a.modules == b.modules and [f.shape for f in a.features] == [f.shape for f in b.features]
    weighted = {
        route.route: {
            n.target
            for n in route.gm.graph.nodes
            if n.op == "call_module"
            and any(True for _ in route.gm.get_submodule(n.target).parameters())
        }
        for route in (traced, exported)
    }
    assert weighted["trace"] == weighted["export"]
    inputs = {key: value[:1] for key, value in example.items()}
    with torch.no_grad():
        expected = call(traced, **inputs)
        found = call(exported, **inputs)
    equal(getattr(expected, "sample", expected), getattr(found, "sample", found))


def test_weights_inside_autocast_are_quantized() -> None:
    model = toys.seeded(toys.Autocasts).eval()
    prepared = prepare(model, small_inputs(), timesteps=20, config="w8a8")
    prepared(**small_inputs(4))
    facts = report(convert(prepared, progress=False))
    assert facts.data["sites"].keys() == {"linear"} and facts.data["left_weights"] == 0
    assert facts.weight_coverage == 1


def test_threads_may_trace_and_export_at_once() -> None:
    models = [toys.seeded(kind) for kind in (Scripted, toys.WritesItems, Vmapped, toys.TupleOutput)]
    found: dict[int, str] = {}

    def work(i: int) -> None:
        found[i] = capture(models[i], small_inputs(), timestep="t").route

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: "export", 1: "trace", 2: "export", 3: "trace"}
