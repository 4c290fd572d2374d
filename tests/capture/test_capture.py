"""capture: the graph equals the model exactly, leaves it alone, and says what it cannot follow."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import toys
from tfmq_fx.capture.capture import Captured, capture
from tfmq_fx.core.errors import CaptureError, ConfigError, InputError, StateError
from tfmq_fx.core.stages import Stage
from tfmq_fx.ir.verifier import check


def call(captured: Captured, *args: Any, **kwargs: Any) -> Any:
    values, return_dict = captured.call.bind(args, kwargs)
    return captured.call.rebuild(captured.gm(*values), return_dict)


def small_inputs(batch: int = 2) -> dict[str, Any]:
    return {"x": torch.randn(batch, 4), "t": torch.arange(batch) * 3}


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def unet() -> tuple[nn.Module, Captured]:
    model = toys.tiny_unet2d()
    example = {"sample": torch.randn(1, 3, 16, 16), "timestep": 10}
    return model, capture(model, example, timestep="timestep")


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["int", "float", "scalar", "one", "equal", "different"])
def test_unet2d_equals_the_model(unet: Any, batch: int, kind: str) -> None:
    model, captured = unet
    x = torch.randn(batch, 3, 16, 16)
    t = {
        "int": 7,
        "float": 7.0,
        "scalar": torch.tensor(7),
        "one": torch.tensor([7], dtype=torch.int32),
        "equal": torch.full((batch,), 7),
        "different": torch.arange(batch) * 123,
    }[kind]
    with torch.no_grad():
        expected = model(x, t)
        found = call(captured, x, timestep=t)
        assert type(found) is type(expected)
        equal(expected.sample, found.sample)
        found = call(captured, x, t, return_dict=False)
    assert isinstance(found, tuple) and len(found) == 1
    equal(expected.sample, found[0])


def test_unet2d_has_no_guard_on_large_batches(unet: Any) -> None:
    # diffusers tests batch >= 64 only to call contiguous(): another layout, so that convolutions
    # add in another order; eps = 2^-23 grows over some 30 layers of sums of up to 576 products
    model, captured = unet
    assert captured.call.guards == ()
    assert "batch >= 64" in captured.notes[0] and "a memory layout only" in captured.notes[0]
    x = torch.randn(65, 3, 16, 16)
    with torch.no_grad():
        a, b = model(x, 3).sample, call(captured, x, 3).sample
    torch.testing.assert_close(a, b, rtol=0, atol=2**-23 * 30 * 576**0.5)


def test_cifar10_configuration() -> None:
    model = toys.cifar10_unet(8)
    captured = capture(
        model, {"sample": torch.randn(2, 3, 32, 32), "timestep": 10}, timestep="timestep"
    )
    assert captured.route == "trace" and captured.call.guards == ()
    for batch in (1, 4):
        x, t = torch.randn(batch, 3, 32, 32), torch.arange(batch) * 300
        with torch.no_grad():
            equal(model(x, t).sample, call(captured, x, t).sample)


@pytest.mark.parametrize("dynamic", [("batch",), ("batch", "spatial")])
def test_handwritten_unet(dynamic: tuple[str, ...]) -> None:
    model = toys.seeded(toys.ToyUNet, width=8)
    captured = capture(model, {"x": torch.randn(2, 3, 8, 8), "t": 5}, timestep="t", dynamic=dynamic)
    model.eval()
    side = 12 if "spatial" in dynamic else 8
    x, t = torch.randn(3, 3, side, side), torch.tensor([1, 500, 3])
    with torch.no_grad():
        equal(model(x, t), call(captured, x, t))
    if "spatial" not in dynamic:
        with pytest.raises(InputError, match="dimension 2 was captured as 8, got 12"):
            call(captured, torch.randn(3, 3, 12, 12), t)


def test_transformer_with_labels_and_float_timesteps() -> None:
    model = toys.seeded(toys.ToyDiT)
    example = {"x": torch.randn(1, 3, 8, 8), "t": 0.5, "y": torch.tensor([3])}
    captured = capture(model, example, timestep="t")
    x, t, y = torch.randn(3, 3, 8, 8), torch.rand(3), torch.tensor([1, 9, 0])
    with torch.no_grad():
        equal(model(x, t, y), call(captured, x, t, y=y))


FOLLOWED = [
    toys.WritesItems,
    toys.InPlaceActivations,
    toys.SlicesSequential,
    toys.ExpandsTimestep,
    toys.DropsOut,
    toys.TupleOutput,
    toys.SharedTwice,
]


@pytest.mark.parametrize("kind", FOLLOWED, ids=lambda kind: kind.__name__)
def test_traps_that_are_followed(kind: type[nn.Module]) -> None:
    model = toys.seeded(kind)
    captured = capture(model, small_inputs(1), timestep="t")
    assert model.training
    reference = copy.deepcopy(model).eval()
    for batch in (1, 2, 4):
        inputs = small_inputs(batch)
        x = inputs["x"].clone()
        with torch.no_grad():
            expected, found = reference(**inputs), call(captured, **inputs)
        equal(x, inputs["x"])
        for a, b in zip(expected, found, strict=True):
            equal(a, b)


def test_random_operations_stay_random() -> None:
    model = toys.DrawsNoise().eval()
    captured = capture(model, small_inputs(), timestep="t")
    inputs = small_inputs(3)
    results = []
    for run in (model, captured.gm):
        with torch.random.fork_rng([]), torch.no_grad():
            torch.manual_seed(0)
            results.append(run(**inputs) if run is model else call(captured, **inputs))
    equal(*results)
    with torch.no_grad():
        assert not torch.equal(call(captured, **inputs), call(captured, **inputs))


def test_nested_inputs_and_outputs() -> None:
    model = toys.NestedOutput().eval()
    extra = {"shift": torch.randn(2, 4), "more": [torch.randn(2, 4), torch.randn(4)]}
    captured = capture(model, {**small_inputs(), "extra": extra, "scale": 2.0}, timestep="t")
    assert captured.call.names == ("x", "t", "extra_shift", "extra_more_0", "extra_more_1")
    with torch.no_grad():
        expected = model(**small_inputs(), extra=extra, scale=2.0)
        x = small_inputs()["x"]
        expected = model(x, torch.arange(2), extra, 2.0)
        found = call(captured, x, torch.arange(2), extra, scale=2.0)
    assert found.keys() == expected.keys() and found["kind"] == "toy"
    equal(expected["sample"], found["sample"])
    equal(expected["aux"]["parts"][1], found["aux"]["parts"][1])


REFUSED = [
    (toys.BranchesOnData, r"the model \(toys.py:\d+\): bool\(\) of a tensor's data"),
    (toys.ReadsItem, r"the model \(toys.py:\d+\): \.item\(\) of a tensor's data"),
    (toys.WritesState, r"the model \(toys.py:\d+\): forward writes to calls"),
    (toys.CountsCalls, r"replay at .*output tensor of the graph differs from the model's"),
]


@pytest.mark.parametrize(
    ("kind", "message"), REFUSED, ids=lambda item: getattr(item, "__name__", "")
)
def test_traps_that_are_refused(kind: type[nn.Module], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(kind(), small_inputs(), timestep="t")


def test_a_branch_on_the_batch_becomes_a_guard() -> None:
    captured = capture(toys.BranchesOnBatch(), small_inputs(), timestep="t")
    assert captured.route == "trace" and "captured where Eq(batch, 1) is False" in captured.notes[0]
    call(captured, **small_inputs(3))
    with pytest.raises(InputError, match=r"Eq\(batch, 1\) is False \(tested at toys.py:\d+\)"):
        call(captured, **small_inputs(1))


def test_a_loop_over_the_batch_fixes_it() -> None:
    captured = capture(toys.LoopsOverBatch(), small_inputs(), timestep="t")
    assert any("batch is fixed: captured where Eq(batch, 2)" in note for note in captured.notes)
    with pytest.raises(InputError, match=r"Eq\(batch, 2\)"):
        call(captured, **small_inputs(3))


def test_the_graph_carries_values_modules_and_lines(unet: Any) -> None:
    model, captured = unet
    check(captured.gm, Stage.CAPTURED)
    assert captured.gm.meta["timestep"] == "timestep"
    placeholders = {n.name: n.meta["val"] for n in captured.gm.graph.nodes if n.op == "placeholder"}
    sample, t = placeholders["sample"], placeholders["timestep"]
    assert t.dtype == torch.int64 and t.shape[0].node.expr == sample.shape[0].node.expr
    names = {name for name, _ in model.named_modules()}
    for node in captured.gm.graph.nodes:
        stack = list(node.meta["nn_module_stack"].items())
        assert stack[0] == ("", ("", type(model)))
        if node.op == "call_module":
            assert node.target in names and stack[-1][1][0] == node.target
        if node.op.startswith("call") and "sym_size" not in node.name:
            assert ".py:" in node.meta["source"]
    (output,) = (node for node in captured.gm.graph.nodes if node.op == "output")
    assert isinstance(output.args[0], tuple)
    sizes = [n for n in captured.gm.graph.nodes if n.target is torch.ops.aten.sym_size.int]
    assert len(sizes) == 1


def test_the_model_is_left_alone() -> None:
    model = toys.seeded(toys.InPlaceActivations).train()
    before = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    captured = capture(model, small_inputs(), timestep="t")
    assert model.training and model.free.training and model.free.inplace
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert captured.gm.linear is not model.linear
    shared = captured.gm.linear.weight
    assert shared.data_ptr() == model.linear.weight.data_ptr()
    captured.gm.requires_grad_(False)
    assert model.linear.weight.requires_grad and not shared.requires_grad
    assert not captured.gm.act.inplace and not captured.gm.free.inplace


def test_deepcopy_and_pickle(unet: Any) -> None:
    model, captured = unet
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([1, 2, 3])
    copied = copy.deepcopy(captured.gm)
    check(copied, Stage.CAPTURED)
    loaded = pickle.loads(pickle.dumps(captured.gm))
    with torch.no_grad():
        expected = model(x, t).sample
        equal(expected, copied(x, t)[0])
        equal(expected, loaded(x, t)[0])


def test_fullgraph_compile(unet: Any) -> None:
    model, captured = unet

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gm = captured.gm

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return call(captured, *args, **kwargs)

    compiled = torch.compile(Wrapper(), fullgraph=True, backend="eager")
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([4, 9])
    with torch.no_grad():
        found = compiled(x, timestep=t)
        assert type(found) is type(model(x, t))
        equal(model(x, t).sample, found.sample)
        equal(model(x, 5).sample, compiled(x, 5, return_dict=False)[0])


def test_meta_device() -> None:
    with torch.device("meta"):
        model = toys.ToyUNet(width=8)
        x = torch.randn(2, 3, 8, 8)
    captured = capture(model, {"x": x, "t": 3}, timestep="t")
    assert captured.notes == ("not replayed: tensors on the meta device have no data",)


def test_fixed_batch() -> None:
    captured = capture(toys.SlicesSequential(), small_inputs(1), timestep="t", dynamic=())
    call(captured, **small_inputs(1))
    with pytest.raises(InputError, match="x: dimension 0 was captured as 1, got 2"):
        call(captured, **small_inputs(2))


def test_unusable_arguments() -> None:
    model = toys.SlicesSequential()
    with pytest.raises(ConfigError, match="forward has no 'z'; it takes x, t"):
        capture(model, {**small_inputs(), "z": 1}, timestep="t")
    with pytest.raises(ConfigError, match="forward needs 'x'"):
        capture(model, {"t": 1}, timestep="t")
    with pytest.raises(ConfigError, match="timestep='time' is not among the example inputs x, t"):
        capture(model, small_inputs(), timestep="time")
    with pytest.raises(ConfigError, match=r"dynamic: unknown \['depth'\]"):
        capture(model, small_inputs(), timestep="t", dynamic=("depth",))
    with pytest.raises(CaptureError, match="one number for each of the 2 samples"):
        capture(model, {**small_inputs(), "t": torch.zeros(3)}, timestep="t")


class ListsSamples(toys.Small):
    """Takes a plain list with an element for each sample, of which it reads the first."""

    def forward(self, x: Tensor, t: Tensor, shapes: list[Any], order: list[int]) -> Tensor:
        height, width = shapes[0]
        return self.base(x, t) * height + width + order[1]


def test_a_list_of_equal_elements_follows_the_batch() -> None:
    model = toys.seeded(ListsSamples)
    example = {**small_inputs(2), "shapes": [(4, 6)] * 2, "order": [0, 1]}
    captured = capture(model, example, timestep="t")
    for batch in (1, 2, 3):
        inputs = {**small_inputs(batch), "shapes": [(4, 6)] * batch, "order": [0, 1]}
        with torch.no_grad():
            equal(model(**inputs), call(captured, **inputs))
    with pytest.raises(InputError, match="shapes: 2 for a batch of 3"):
        call(captured, **{**inputs, "shapes": [(4, 6)] * 2})
    with pytest.raises(InputError, match=r"shapes.2.1: captured as the constant 6, got 7"):
        call(captured, **{**inputs, "shapes": [(4, 6), (4, 6), (4, 7)]})
    with pytest.raises(InputError, match="order: expected a list of 2"):
        call(captured, **{**inputs, "order": [0, 1, 2]})


class Keeps(toys.Small):
    """Leaves a value on itself; mode says what later calls make of it."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode, self.cache = mode, dict[str, Tensor]()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.base(x, t)
        if self.mode == "shown":
            self.latest = h
        elif self.mode == "constant":
            if "angles" not in self.cache:
                self.cache["angles"] = torch.arange(4) / 4
            h = h + self.cache["angles"]
        elif "mean" in self.cache:
            h = h + self.cache["mean"].round()  # hidden from comparison by rounding
        else:
            self.cache["mean"] = x.mean() * 1e-3
        return h


def test_values_left_for_the_next_call_are_refused_where_it_reads_them() -> None:
    for mode in ("shown", "constant"):
        model = toys.seeded(Keeps, mode)
        captured = capture(model, small_inputs(), timestep="t")
        inputs = small_inputs(3)
        with torch.no_grad():
            equal(model(**inputs), call(captured, **inputs))
    with pytest.raises(StateError, match=r"test_capture.py:\d+\): forward reads a value that an"):
        capture(toys.seeded(Keeps, "read"), small_inputs(), timestep="t")
