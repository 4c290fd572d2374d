"""Every public function with each of its arguments wrong in turn: one of the package's errors, that
names what was found, and never one of torch's or Python's."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tfmq_fx
from tfmq_fx import TfmqError
from tfmq_fx.evaluation.evaluate import evaluate


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.e = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1), nn.Linear(8, 4)

    def forward(self, x, t):
        e = self.e(torch.sin(t[:, None].to(x.dtype) * torch.arange(1, 9) / 20))
        return self.b((self.a(x) + e[:, :, None, None]).sigmoid())


@pytest.fixture(scope="module")
def have(tmp_path_factory):
    """What the calls of the tables use."""
    torch.manual_seed(0)
    net = Net().eval()
    x, t = torch.randn(2, 2, 4, 4), torch.tensor([9, 5])
    prepared = tfmq_fx.prepare(net, (x, t), timesteps=[5, 9], config="w8a8")
    prepared(x, t)
    folder = tmp_path_factory.mktemp("entry")
    (folder / "file").write_text("not a model")
    model = tfmq_fx.fold_timesteps(net, [5, 9], (x, t))
    compiled = tfmq_fx.compile(model, "eager")
    return SimpleNamespace(
        net=net, x=x, t=t, inputs=(x, t), prepared=prepared, model=model, compiled=compiled,
        folder=folder, file=folder / "file",
        sampled=lambda: tfmq_fx.prepare(net, (x, t), timesteps=[5, 9]),
        scheduler=SimpleNamespace(step=lambda: None),
    )  # fmt: skip


WRONG = {
    "prepare": [
        lambda h: tfmq_fx.prepare(5),
        lambda h: tfmq_fx.prepare(None),
        lambda h: tfmq_fx.prepare(Net),
        lambda h: tfmq_fx.prepare("unet"),
        lambda h: tfmq_fx.prepare(h.net),
        lambda h: tfmq_fx.prepare(h.net, 5),
        lambda h: tfmq_fx.prepare(h.net, h.x),
        lambda h: tfmq_fx.prepare(h.net, ()),
        lambda h: tfmq_fx.prepare(h.net, (h.x,)),
        lambda h: tfmq_fx.prepare(h.net, (h.x, h.t, h.t)),
        lambda h: tfmq_fx.prepare(h.net, (h.x, None)),
        lambda h: tfmq_fx.prepare(h.net, ("x", h.t)),
        lambda h: tfmq_fx.prepare(h.net, (h.x[:0], h.t[:0])),
        lambda h: tfmq_fx.prepare(h.net, (h.x, h.t > 0)),
        lambda h: tfmq_fx.prepare(h.net, (h.x, torch.zeros(3))),
        lambda h: tfmq_fx.prepare(h.net, {"x": h.x, "time": h.t}),
        lambda h: tfmq_fx.prepare(h.net, {1: h.x, 2: h.t}),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, timestep="when"),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, timestep=5),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, timestep="x"),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, config="w3a3000"),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, config=5),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, config=None),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, overrides={"nothing": tfmq_fx.LayerConfig()}),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, overrides=5),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, overrides={"a": "w8a8"}),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, overrides={5: tfmq_fx.LayerConfig()}),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, dynamic=5),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, dynamic=("depth",)),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, dynamic="batch,spatial"),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, dynamic={"y": {0: "batch"}}),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, dynamic={"x": 5}),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, timesteps="fast"),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, timesteps=[]),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, timesteps=[5, 5]),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, timesteps=[float("nan")]),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, timesteps=[2**70]),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, timesteps=[1e300]),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, timesteps=2**70),
        lambda h: tfmq_fx.prepare(h.net, h.inputs, timesteps=torch.ones(2) * 1j),
        lambda h: tfmq_fx.prepare(h.prepared, h.inputs),
        lambda h: tfmq_fx.prepare(h.model, h.inputs),
        lambda h: tfmq_fx.prepare(h.compiled, h.inputs),
    ],
    "calibrate": [
        lambda h: tfmq_fx.calibrate(h.net, [h.inputs]),
        lambda h: tfmq_fx.calibrate(h.model, [h.inputs]),
        lambda h: tfmq_fx.calibrate(5, [h.inputs]),
        lambda h: tfmq_fx.calibrate(h.prepared, 5),
        lambda h: tfmq_fx.calibrate(h.prepared, None),
        lambda h: tfmq_fx.calibrate(h.prepared, h.inputs),
        lambda h: tfmq_fx.calibrate(h.prepared, h.x),
        lambda h: tfmq_fx.calibrate(h.prepared, [5]),
        lambda h: tfmq_fx.calibrate(h.prepared, "abc"),
        lambda h: tfmq_fx.calibrate(h.prepared, [{"x": h.x}]),
        lambda h: tfmq_fx.calibrate(h.prepared, [{1: h.x}]),
        lambda h: tfmq_fx.calibrate(h.prepared, [(h.x[:0], h.t[:0])]),
        lambda h: tfmq_fx.calibrate(h.prepared, [(h.x * float("nan"), h.t)]),
        lambda h: tfmq_fx.calibrate(h.prepared, [(h.x / 0, h.t)]),
        lambda h: tfmq_fx.calibrate(h.prepared, [h.inputs], samples=4),
        lambda h: tfmq_fx.calibrate(h.prepared, [h.inputs], batch_size=4),
        lambda h: tfmq_fx.calibrate(h.prepared, [h.inputs], seed=0),
        lambda h: tfmq_fx.calibrate(h.prepared, [h.inputs], num_inference_steps=50),
        lambda h: tfmq_fx.calibrate(h.prepared, [h.inputs], "a prompt"),
        lambda h: tfmq_fx.calibrate(h.prepared, [h.inputs], guidance=7.5),
        lambda h: tfmq_fx.calibrate(h.prepared, (h.scheduler, (2, 4, 4)), samples=0),
        lambda h: tfmq_fx.calibrate(h.prepared, (h.scheduler, (2, 4, 4)), batch_size="2"),
        lambda h: tfmq_fx.calibrate(h.prepared, (h.scheduler, (2, 4, 4)), seed=-1),
        lambda h: tfmq_fx.calibrate(h.prepared, (h.scheduler, (2, 4, 4)), num_inference_steps=2.5),
        lambda h: tfmq_fx.calibrate(h.prepared, (h.scheduler, 5)),
        lambda h: tfmq_fx.calibrate(h.prepared, (h.scheduler, ("a",))),
        lambda h: tfmq_fx.calibrate(h.prepared, (h.scheduler, (2, -4, 4))),
        lambda h: tfmq_fx.calibrate(h.prepared, (type(h.scheduler), (2, 4, 4))),
        lambda h: tfmq_fx.calibrate(h.prepared, (h.scheduler, (2, 4, 4)), label=5),
        lambda h: tfmq_fx.calibrate(h.prepared, SimpleNamespace(components={})),
    ],
    "convert": [
        lambda h: tfmq_fx.convert(5),
        lambda h: tfmq_fx.convert(h.net),
        lambda h: tfmq_fx.convert(h.model),
        lambda h: tfmq_fx.convert(h.sampled()),
        lambda h: tfmq_fx.convert(h.prepared, budget="a lot"),
        lambda h: tfmq_fx.convert(h.prepared, budget=-1),
        lambda h: tfmq_fx.convert(h.prepared, budget=object()),
        lambda h: tfmq_fx.convert(h.prepared, bits=5),
        lambda h: tfmq_fx.convert(h.prepared, bits="w4a8"),
        lambda h: tfmq_fx.convert(h.prepared, budget=1000, bits=5),
        lambda h: tfmq_fx.convert(h.prepared, checkpoint=5),
        lambda h: tfmq_fx.convert(h.prepared, checkpoint=h.file),
    ],
    "fold_timesteps": [
        lambda h: tfmq_fx.fold_timesteps(5, [5], h.inputs),
        lambda h: tfmq_fx.fold_timesteps(h.net, None, h.inputs),
        lambda h: tfmq_fx.fold_timesteps(h.net, h.inputs),
        lambda h: tfmq_fx.fold_timesteps(h.net, [5], 5),
        lambda h: tfmq_fx.fold_timesteps(h.net, [5], h.inputs, timestep="when"),
    ],
    "compile": [
        lambda h: tfmq_fx.compile(5),
        lambda h: tfmq_fx.compile(h.net),
        lambda h: tfmq_fx.compile(h.prepared),
        lambda h: tfmq_fx.compile(h.compiled),
        lambda h: tfmq_fx.compile(h.model, "fastest"),
        lambda h: tfmq_fx.compile(h.model, 5),
        lambda h: tfmq_fx.compile(h.model, None),
        lambda h: tfmq_fx.compile(h.model, "eager", speed=9),
        lambda h: tfmq_fx.compile(h.model, "inductor", artifact=5),
    ],
    "save": [
        lambda h: tfmq_fx.save(5, h.folder / "a"),
        lambda h: tfmq_fx.save(h.net, h.folder / "a"),
        lambda h: tfmq_fx.save(h.prepared, h.folder / "a"),
        lambda h: tfmq_fx.save(h.compiled, h.folder / "a"),
        lambda h: tfmq_fx.save(h.model, 5),
        lambda h: tfmq_fx.save(h.model, None),
        lambda h: tfmq_fx.save(h.model, ""),
        lambda h: tfmq_fx.save(h.model, h.file),
        lambda h: tfmq_fx.save(h.model, h.file / "inside"),
        lambda h: tfmq_fx.save(h.model, h.folder),
        lambda h: tfmq_fx.save(h.model, "a\0b"),
    ],
    "load": [
        lambda h: tfmq_fx.load(5),
        lambda h: tfmq_fx.load(None),
        lambda h: tfmq_fx.load(""),
        lambda h: tfmq_fx.load(h.file),
        lambda h: tfmq_fx.load(h.folder),
        lambda h: tfmq_fx.load(h.folder / "nothing"),
        lambda h: tfmq_fx.load("a\0b"),
        lambda h: tfmq_fx.load(h.model),
        lambda h: tfmq_fx.load(h.folder, outputs=5),
    ],
    "bind_request": [
        lambda h: tfmq_fx.bind_request(5),
        lambda h: tfmq_fx.bind_request(h.net),
        lambda h: tfmq_fx.bind_request(h.prepared),
        lambda h: tfmq_fx.bind_request(h.compiled),
        lambda h: tfmq_fx.bind_request(h.model, "fast"),
        lambda h: tfmq_fx.bind_request(h.model, [5, 1000.5]),
        lambda h: tfmq_fx.bind_request(h.model, None, h.inputs),
        lambda h: tfmq_fx.bind_request(h.model, timestep="t"),
        lambda h: tfmq_fx.bind_request(h.model, spec=5),
        lambda h: tfmq_fx.bind_request(h.model, spec=tfmq_fx.PrologueSpec(), steps=2),
        lambda h: tfmq_fx.bind_request(h.model, on_miss="guess"),
        lambda h: tfmq_fx.bind_request(h.model, colour="red"),
        lambda h: tfmq_fx.bind_request(h.model, conditions=("label",)),
        lambda h: tfmq_fx.bind_request(h.model, capacity="many"),
    ],
    "refresh": [
        lambda h: tfmq_fx.refresh(5),
        lambda h: tfmq_fx.refresh(h.net),
        lambda h: tfmq_fx.refresh(h.compiled),
        lambda h: tfmq_fx.refresh(h.model),
        lambda h: tfmq_fx.refresh(h.model, 5),
        lambda h: tfmq_fx.refresh(h.model, nn.Linear(1, 1)),
        lambda h: tfmq_fx.refresh(h.model, h.prepared),
        lambda h: tfmq_fx.refresh(h.model, timesteps="fast"),
        lambda h: tfmq_fx.refresh(h.model, timesteps=[1, 2, 3]),
        lambda h: tfmq_fx.refresh(h.model, h.net, timesteps=[]),
        lambda h: tfmq_fx.check_source(5, h.net),
        lambda h: tfmq_fx.check_source(h.model, 5),
    ],
    "looking": [
        lambda h: tfmq_fx.report(5),
        lambda h: tfmq_fx.report(h.net),
        lambda h: tfmq_fx.report(h.prepared),
        lambda h: tfmq_fx.verify(h.model, h.net),
        lambda h: tfmq_fx.verify(5, h.model),
        lambda h: tfmq_fx.verify(h.net, 5),
        lambda h: tfmq_fx.verify(h.net, h.prepared),
        lambda h: tfmq_fx.verify(nn.Linear(1, 1), h.model),
        lambda h: tfmq_fx.verify(h.net, h.model, 5),
        lambda h: tfmq_fx.verify(h.net, h.model, [5]),
        lambda h: tfmq_fx.verify(h.net, h.model, [(h.x,)]),
        lambda h: tfmq_fx.verify(h.net, h.model, []),
        lambda h: tfmq_fx.verify(h.net, h.model, [h.inputs], seed=0),
        lambda h: tfmq_fx.verify(h.net, h.model, [h.inputs], conditions=3),
        lambda h: tfmq_fx.verify(h.net, h.model, batch=0),
        lambda h: tfmq_fx.verify(h.net, h.model, batch="a"),
        lambda h: tfmq_fx.verify(h.net, h.model, conditions="a"),
        lambda h: tfmq_fx.verify(h.net, h.model, seed="a"),
        lambda h: tfmq_fx.verify(h.net, h.model, threshold="high"),
        lambda h: tfmq_fx.compare(5, 5),
        lambda h: tfmq_fx.compare(h.net, h.model),
        lambda h: tfmq_fx.compare(h.net, h.model, source=5),
        lambda h: tfmq_fx.compare(h.net, h.model, samples=-1),
        lambda h: tfmq_fx.compare(h.net, h.model, out=h.file),
        lambda h: tfmq_fx.analyze(5),
        lambda h: tfmq_fx.analyze(None),
        lambda h: tfmq_fx.analyze(h.file),
        lambda h: tfmq_fx.analyze(h.folder / "nothing"),
        lambda h: tfmq_fx.analyze(h.net),
        lambda h: tfmq_fx.analyze(h.net, h.inputs, timestep="when"),
        lambda h: tfmq_fx.analyze(h.net, h.inputs, steps=0),
        lambda h: tfmq_fx.analyze(h.net, h.inputs, steps="a"),
        lambda h: tfmq_fx.analyze(h.net, h.inputs, conditions=["label"]),
        lambda h: tfmq_fx.analyze(h.net, h.inputs, conditions=5),
        lambda h: evaluate(models=["nothing"], out=h.folder / "e"),
        lambda h: evaluate(models=5, out=h.folder / "e"),
        lambda h: evaluate(recipes=["nothing"], out=h.folder / "e"),
        lambda h: evaluate(bits=["w99"], out=h.folder / "e"),
        lambda h: evaluate(out=h.file),
        lambda h: evaluate(out=h.folder / "e", samples=-1),
        lambda h: evaluate(out=h.folder / "e", seeds=[]),
        lambda h: evaluate(out=h.folder / "e", steps=0),
        lambda h: evaluate(out=h.folder / "e", learning="much"),
        lambda h: evaluate(out=h.folder / "e", backend="openvino"),
        lambda h: evaluate(out=h.folder / "e", device="tpu"),
        lambda h: evaluate(out=h.folder / "e", batch=0),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_gets_an_error_of_the_package(have, name):
    foreign = []
    for i, call in enumerate(WRONG[name]):
        try:
            found = call(have)
            foreign.append(f"{name} {i} (line {call.__code__.co_firstlineno}): {found!r:.80}")
        except TfmqError as error:
            if not str(error).strip():
                foreign.append(f"{name} {i}: no message")
        except Exception as error:
            line = call.__code__.co_firstlineno
            foreign.append(f"{name} {i} (line {line}): {type(error).__name__}: {error!s:.160}")
    assert not foreign, "\n".join(["", *foreign])
