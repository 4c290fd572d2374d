"""The tracer leaves nothing behind, keeps to its thread, and makes in-place writes pure or kept."""

from __future__ import annotations

import operator
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo  # capture imports it when first used, and it registers effects of its own
from torch import Tensor, fx, nn

from tests import toys
from tfmq_fx.capture.capture import capture
from tfmq_fx.core.errors import CaptureError
from tfmq_fx.ir.functionalize import inplace_, setitem_


class Body(nn.Module):
    """A model made of one function of x (batch, 4) and t (batch,)."""

    def __init__(self, body: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.body(x, t)


def graph_of(body: Callable[[Tensor, Tensor], Any]) -> fx.GraphModule:
    example = {"x": torch.randn(2, 4), "t": torch.tensor([1.0, 2.0])}
    return capture(Body(body), example, timestep="t").gm


def targets(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op.startswith("call")]


PATCHED = [
    (torch, "is_tensor"),
    (torch, "zeros"),
    (torch, "arange"),
    (torch, "tensor"),
    (torch.autocast, "__enter__"),
    (nn.Module, "__call__"),
    (nn.Module, "__getattr__"),
    (nn.Module, "__setattr__"),
]


@pytest.mark.parametrize("kind", [toys.SlicesSequential, toys.BranchesOnData])
def test_nothing_stays_patched(kind: type[nn.Module]) -> None:
    before = [getattr(owner, name) for owner, name in PATCHED]
    effects = set(fx.node._side_effectful_functions)
    try:
        capture(kind(), {"x": torch.randn(2, 4), "t": 1}, timestep="t")
    except CaptureError:
        assert kind is toys.BranchesOnData
    assert [getattr(owner, name) for owner, name in PATCHED] == before
    assert torch.overrides._get_current_function_mode() is None
    assert fx.node._side_effectful_functions == effects
    assert torch.is_grad_enabled() and not torch.fx._symbolic_trace.is_fx_tracing()


def test_other_threads_run_as_ever() -> None:
    model, x, t = toys.seeded(toys.ToyUNet, width=8).eval(), torch.randn(2, 3, 8, 8), torch.zeros(2)
    with torch.no_grad():
        expected = model(x, t)
    stop, wrong, runs = threading.Event(), [], []

    def work() -> None:
        with torch.no_grad():
            while not stop.is_set():
                found = model(x, t)
                runs.append(type(torch.zeros(2)))
                if not torch.equal(found, expected):
                    wrong.append(found)

    captured: list[Any] = []

    def trace() -> None:
        example = {"x": torch.randn(2, 3, 8, 8), "t": 3}
        captured.append(capture(model, example, timestep="t"))

    worker, tracers = threading.Thread(target=work), [threading.Thread(target=trace) for _ in "ab"]
    worker.start()
    for tracer in tracers:
        tracer.start()
    for tracer in tracers:
        tracer.join()
    stop.set()
    worker.join()
    assert not wrong and set(runs) == {Tensor} and len(captured) == 2
    assert captured[0].gm.code == captured[1].gm.code


def test_shapes_make_no_data_edges() -> None:
    def body(x: Tensor, t: Tensor) -> Tensor:
        h = t[:, None].type_as(x).expand_as(x)
        h = h.view_as(x).to(x) + torch.zeros(x.size(0), len(x[0]))
        return h.reshape(x.shape[0], -1)

    gm = graph_of(body)
    users = [user.target for node in gm.graph.nodes if node.name == "x" for user in node.users]
    assert users == [torch.ops.aten.sym_size.int]


def test_sizes_are_read_once_and_from_the_inputs() -> None:
    def body(x: Tensor, t: Tensor) -> Tensor:
        h = (x * 2).reshape(x.shape[0], 2, 2)
        return h.flatten(1).view(h.shape[0], -1) + t.view(t.size(0), 1)

    gm = graph_of(body)
    sizes = [node for node in gm.graph.nodes if node.target is torch.ops.aten.sym_size.int]
    assert [node.args for node in sizes] == [(next(iter(gm.graph.nodes)), 0)]


def test_factories_are_recorded() -> None:
    def body(x: Tensor, t: Tensor) -> Tensor:
        rates = torch.arange(4, dtype=torch.float32) + torch.tensor([1.0, 2.0, 3.0, 4.0])
        return x + rates * torch.full((x.shape[0], 1), 2.0) * t[:, None]

    gm = graph_of(body)
    assert {torch.arange, torch.tensor, torch.full} <= set(targets(gm))
    assert not any(node.op == "get_attr" for node in gm.graph.nodes)


def test_isinstance_and_is_tensor_hold() -> None:
    def body(x: Tensor, t: Tensor) -> Tensor:
        assert isinstance(x, Tensor) and torch.is_tensor(t) and not isinstance(x, nn.Parameter)
        return x + t[:, None]

    assert targets(graph_of(body)) == [operator.getitem, operator.add]


def test_plain_in_place_operators_become_pure() -> None:
    def body(x: Tensor, t: Tensor) -> Tensor:
        h = x * 2
        h += t[:, None]
        h.mul_(3.0).clamp_(min=0.0)
        return h

    found = targets(graph_of(body))
    # who reads h after a write reads the result of the write instead
    assert operator.add in found and operator.iadd not in found
    assert "mul" in found and "clamp" in found and inplace_ not in found


def test_writes_seen_elsewhere_stay() -> None:
    def body(x: Tensor, t: Tensor) -> Tensor:
        h = x * 2
        view = h[:, :2]
        view += 1
        h[:, 2:] = t[:, None]
        return h

    gm = graph_of(body)
    assert inplace_ in targets(gm) and setitem_ in targets(gm)
    kept = [node for node in gm.graph.nodes if node.target in (inplace_, setitem_)]
    assert all(node.meta["writes"] for node in kept)
    gm.graph.eliminate_dead_code()
    assert all(node in gm.graph.nodes for node in kept)


def test_promotion_stays_in_place() -> None:
    def body(x: Tensor, t: Tensor) -> Tensor:
        h = x.half()
        h += t[:, None]
        return h

    assert inplace_ in targets(graph_of(body))


def test_results_with_field_names() -> None:
    def body(x: Tensor, t: Tensor) -> Tensor:
        return x.max(dim=1).values + torch.topk(x, 2, dim=-1).indices[:, 0] + t

    assert operator.getitem in targets(graph_of(body))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda x, t: x * float(t[0]), r"float\(\) of a tensor's data"),
        (lambda x, t: x if torch.equal(x, x) else t, "equal.* depends on a tensor's data"),
        (lambda x, t: x if 1.0 in x else t, "'in' of a tensor's data"),
        (lambda x, t: x * x.numpy(), r"\.numpy\(\) of a tensor's data"),
        (lambda x, t: x @ x, r"test_tracer.py:\d+\): tracing Body failed: "),
    ],
)
def test_what_cannot_be_followed_names_the_line(body: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        graph_of(body)


FIRST_USE = """
import torch
from torch import nn
from tfmq_fx.capture.capture import capture

class OnDevice(nn.Module):
    def forward(self, x, t):
        with torch.device("cpu"):
            return x * torch.ones(4) + t[:, None] + torch.zeros_like(x)

capture(OnDevice(), {"x": torch.randn(2, 4), "t": torch.arange(2)}, timestep="t")
with torch.device("meta"):
    assert torch.ones(2).is_meta and torch.randn(2).is_meta
names = {f for functions in torch.overrides.get_overridable_functions().values() for f in functions}
assert torch.cat in names and torch.zeros not in names  # factories are not overridable
assert torch.zeros in torch.overrides.get_ignored_functions()
"""


def test_what_torch_caches_at_first_use_holds_its_own_functions() -> None:
    # its own process: caches of this one are filled already
    subprocess.run([sys.executable, "-c", FIRST_USE], check=True)


class Interrupts(toys.Small):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        torch.zeros(2)
        raise KeyboardInterrupt


def test_nothing_stays_patched_after_an_interruption() -> None:
    before = [getattr(owner, name) for owner, name in PATCHED]
    with pytest.raises(KeyboardInterrupt):
        capture(Interrupts(), {"x": torch.randn(2, 4), "t": 1}, timestep="t")
    assert [getattr(owner, name) for owner, name in PATCHED] == before
    assert torch.overrides._get_current_function_mode() is None
    assert not torch.fx._symbolic_trace.is_fx_tracing()
    assert isinstance(nn.Linear(2, 2)(torch.zeros(1, 2)), Tensor)


class Applies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2


class Compiled(toys.Small):
    """Hands a traced tensor to code that is not Python's."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return Applies.apply(self.base(x, t)) + t[:, None]


def test_a_traced_tensor_is_no_foreign_memory_to_compiled_code() -> None:
    model = toys.seeded(Compiled).eval()
    captured = capture(model, {"x": torch.randn(2, 4), "t": 1}, timestep="t")
    x, t = torch.randn(3, 4), torch.arange(3)
    with torch.no_grad():
        assert torch.equal(captured.gm(x, t)[0], model(x, t))


class Counts(toys.Small):
    """A size that depends on data."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.base(x, t) * torch.nonzero(x > 0).shape[0]


def test_sizes_that_come_from_data_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"the model \(test_tracer.py:\d+\): .*nonzero"):
        capture(Counts(), {"x": torch.randn(2, 4), "t": 1}, timestep="t")


class Named(toys.Small):
    """Calls a layer with its input by name, as motion modules of diffusers do."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(input=self.base(x, t)) + t[:, None]


def test_the_input_of_a_layer_is_its_first_argument() -> None:
    model = toys.seeded(Named).eval()
    captured = capture(model, {"x": torch.randn(2, 4), "t": 1}, timestep="t")
    (layer,) = [node for node in captured.gm.graph.nodes if node.target == "out"]
    assert len(layer.args) == 1 and not layer.kwargs
    x, t = torch.randn(3, 4), torch.arange(3)
    with torch.no_grad():
        assert torch.equal(captured.gm(x, t)[0], model(x, t))
