"""Bound models answer as the model they were made from does, whatever becomes of the conditions."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import zoo
from tests.denoisers import Spec, build, denoisers, inputs
from tests.test_end_to_end import (
    FLOW_EULER,
    answer,
    calls,
    converted,
    fast,
    pipeline,
    schedule,
)
from tests.toys import ToyDiT, seeded, sinusoidal
from tfmq_fx import (
    Bound,
    ConfigError,
    Converted,
    InputError,
    PrologueSpec,
    StaleError,
    bind_request,
    calibrate,
    convert,
    fold_timesteps,
    load,
    prepare,
    refresh,
    save,
)
from tfmq_fx import compile as compile_model
from tfmq_fx import prologue as prologue_module
from tfmq_fx.backends.inductor import unavailable
from tfmq_fx.metrics import sqnr
from tfmq_fx.structure import outline

Inputs = dict[str, Any]
STEPS = [999, 750, 500, 250, 0]
WIDTH, TOKENS = 8, 6


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Conditional(nn.Module):
    """Values of the timestep, of the timestep and a class, and of a text, all worth storing.

    mix: share of the batch's mean in each sample's embedding.  shows: the embedding is an output.
    """

    def __init__(self, wide: int = 512, mix: float = 0.0, shows: bool = False) -> None:
        super().__init__()
        self.mix, self.shows = mix, shows
        self.time = nn.Sequential(nn.Linear(WIDTH, wide), nn.SiLU(), nn.Linear(wide, WIDTH))
        self.label = nn.Embedding(10, wide)
        self.widen, self.merge = nn.Linear(WIDTH, wide), nn.Linear(wide, 2 * WIDTH)
        self.scale = nn.Parameter(torch.ones(2 * WIDTH))
        self.text = nn.Linear(WIDTH, wide)
        self.q, self.k, self.v = (nn.Linear(n, WIDTH) for n in (WIDTH, wide, wide))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor) -> Any:
        own = self.time(sinusoidal(t, WIDTH).to(x.dtype))
        wide = self.label(y) + self.widen(own)
        if self.mix:
            wide = wide + self.mix * wide.mean(0, keepdim=True)
        both = self.merge(F.silu(wide)) * self.scale
        scale, shift = both[:, None].chunk(2, -1)
        h = x * (1 + scale) + shift
        text = F.silu(self.text(text))
        h = h + F.scaled_dot_product_attention(self.q(h), self.k(text), self.v(text))
        h = h * own[:, None]
        return (h, both) if self.shows else h


def draw(batch: int = 2, seed: int = 0, t: Any = 500, tokens: int = 3) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, TOKENS, WIDTH, generator=generator),
        "t": torch.full((batch,), t) if isinstance(t, int) else torch.as_tensor(t),
        "y": torch.randint(10, (batch,), generator=generator),
        "text": torch.randn(batch, tokens, WIDTH, generator=generator),
    }


def conditional(**options: Any) -> nn.Module:
    model: nn.Module = seeded(Conditional, **options)
    return model.eval()


@functools.cache
def captured(**options: Any) -> tuple[nn.Module, Converted]:
    model = conditional(**options)
    return model, bind_request(model, example_inputs=draw()).unbound()


def bound(timesteps: Any = None, **options: Any) -> Bound:
    return bind_request(captured()[1], timesteps, **options)


def of(values: Inputs) -> Any:
    """The original's answer."""
    return captured()[0](**values)


def check(found: nn.Module, values: Inputs, expected: nn.Module | None = None) -> None:
    wanted = outline((expected or captured()[0])(**values))
    given = outline(found(**values))
    assert wanted[0] == given[0]
    for (path, a), (_, b) in zip(wanted[1], given[1], strict=True):
        assert torch.equal(a, b), f"{path} differs by {(a - b).abs().max()}"


def computed(found: Bound) -> dict[tuple[tuple[str, ...], bool], int]:
    """How many values were computed so far, by what they depend on."""
    return {(p.part.conditions, p.part.stepped): p.computed for p in found.prologue.parts}


T, TC, C = ((), True), (("y",), True), (("text",), False)


def test_the_toy_has_all_three_kinds_of_values() -> None:
    found = bound()
    assert set(computed(found)) == {T, TC, C} and not found.prologue.declined
    assert {n.target for n in found.step.graph.find_nodes(op="call_module")} == {"q"}


# ---------------------------------------------------------------- bit for bit


def variants(name: str, model: nn.Module, batch: int) -> Iterator[Inputs]:
    """Two prompts at two timesteps each, the first one again at the end."""
    for seed in (0, 1, 0):
        yield from list(calls(name, model, batch, seed))[:2]


FAST = {"dit-xl-2", "flux-dev"}
ZOO = ["dit-xl-2", "flux-dev", "sd35-medium", "hunyuan-dit", "wan-1.3b", "sd15", "sdxl", "svd"]


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ZOO]
)
def test_published_architectures_at_any_batch_size(name: str) -> None:
    model = zoo.model(name)
    found = bind_request(model, example_inputs=zoo.inputs(name, model))
    stepped = [p.part for p in found.prologue.parts if p.part.stepped]
    assert stepped and found.step.graph.find_nodes(op="call_module")
    for batch in (1, 2, 3):
        for values in variants(name, model, batch):
            check(found, values, model)


def test_quantized_models(tmp_path: Path) -> None:
    model, prepared = quantizable()
    for recipe in ("w8a8", "w4a8"):
        prepared.recipe = fast(recipe)
        done = convert(prepared, progress=False)
        save(done, tmp_path / recipe)
        for version in (done, load(tmp_path / recipe)):
            found = bind_request(version)
            assert found.prologue.parts[-1].part.conditions == ("y",)
            for batch in (1, 2, 3):
                for values in labelled(batch):
                    check(found, values, done)
                    assert not torch.equal(found(**values), model(**values))  # it is quantized


@functools.cache
def quantizable() -> tuple[nn.Module, Any]:
    model = seeded(ToyDiT).eval()
    prepared = prepare(model, next(labelled(2)), config=fast("w8a8"))
    calibrate(prepared, labelled(4), progress=False)
    return model, prepared


def labelled(batch: int) -> Iterator[Inputs]:
    generator = torch.Generator().manual_seed(batch)
    for seed, step in enumerate((999, 600, 250)):
        x = torch.randn(batch, 3, 8, 8, generator=generator)
        yield {"x": x, "t": torch.full((batch,), step), "y": (torch.arange(batch) + seed) % 10}


def test_tables_folded_before(tmp_path: Path) -> None:
    model = captured()[0]
    folded = fold_timesteps(model, STEPS, draw())
    save(folded, tmp_path / "folded")
    for version in (folded, load(tmp_path / "folded")):
        found = bind_request(version)
        for step in STEPS[:2]:
            check(found, draw(1, t=step), model)
            check(found, draw(3, t=step), folded)
        check(found, draw(2, t=[999, 0]), folded)
        found.set_timesteps([0, 999])
        with pytest.raises(InputError, match="t: 7"):  # its weights are gone
            found(**draw(1, t=7))
        with pytest.raises(InputError, match="t: 7"):
            found.set_timesteps([999, 7])
        assert found.prologue.schedule.values() == [999, 0]
        check(found, draw(1, t=0), model)
        check(found, draw(1, t=500), model)


def test_saved_and_loaded_without_the_original(tmp_path: Path) -> None:
    found = bound(STEPS)
    check(found, draw())
    save(found, tmp_path / "bound")
    made = load(tmp_path / "bound")
    assert isinstance(made, Bound) and made.spec == found.spec
    for seed in (0, 1):
        check(made, draw(seed=seed))
    check(bind_request(load(tmp_path / "bound"), STEPS), draw())


@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow], print_blob=False)
@given(spec=denoisers())
def test_random_denoisers(spec: Spec) -> None:
    """All samples at one timestep, prompts in turn; then each at its own. A failing example prints
    its spec: `tests.denoisers.build` makes the model."""
    spec = dataclasses.replace(spec, training=False)
    model = build(spec).eval()
    found = bind_request(model, example_inputs=inputs(spec, 2), steps=1)
    for batch in (1, 2, 3):
        for seed in (0, 1, 0):
            values = inputs(spec, batch, seed=seed)
            check_nan(found, {**values, "t": values["t"][:1].expand(batch)}, model)
            check_nan(found, values, model)


def check_nan(found: Bound, values: Inputs, model: nn.Module) -> None:
    """`check`, where the model may answer NaN; what is returned is written to afterwards."""
    try:
        given = outline(found(**values))[1]
    except InputError as error:  # the model's code goes another way at this batch size
        assert "Capture again at these sizes" in str(error)
        return
    wanted = outline(model(**values))[1]
    for (path, a), (_, b) in zip(wanted, given, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=0, equal_nan=True), path
    for _, b in given:
        b.zero_()


@pytest.mark.parametrize("conditions", [(), ("y",), ("text",), ("y", "text"), ("x", "y", "text")])
def test_any_choice_of_conditions(conditions: tuple[str, ...]) -> None:
    found = bound(conditions=conditions)
    for seed in (0, 1, 0):
        for step in (999, 0):
            check(found, draw(2, seed, step))


def test_all_at_once_is_equal_up_to_rounding() -> None:
    found = bound(STEPS, mode="batched")
    for values in (draw(2, 0, 999), draw(2, 0, 0), draw(1, 1, 500), draw(2, 0, 250)):
        expected = of(values)
        # sums of up to 512 products in another order, in each of four layers: some 2**-24 * 20 of
        # the largest each
        assert (found(**values) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert computed(found)[TC] == 2 * len(STEPS)


# ---------------------------------------------------------------- never stale

WRITES: dict[str, Callable[[Tensor], object]] = {
    "copy_": lambda c: c.copy_(torch.ones_like(c)),
    "item": lambda c: c.__setitem__((0, 0, 0), 5.0),
    "view": lambda c: c[-1].mul_(0.5),
    "data": lambda c: c.data.mul_(2),
    "new data": lambda c: setattr(c, "data", c * 3),
    "numpy": lambda c: np.multiply(c.numpy(), 2, out=c.numpy()),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_condition_written_in_place(how: str) -> None:
    found = bound()
    values = draw()
    before = found(**values)
    for _ in range(2):
        WRITES[how](values["text"])
        check(found, values)
        assert not torch.equal(found(**values), before)
    values["y"] += 1
    values["y"] %= 10
    check(found, values)


class Pooled(nn.Module):
    """Takes the mean of a long text."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.merge = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return x * t[:, None, None] + self.merge(self.widen(text.mean(1)))[:, None]


@functools.cache
def pooled() -> tuple[nn.Module, Converted]:
    model = seeded(Pooled).eval()
    return model, bind_request(model, example_inputs=long()).unbound()


def long() -> Inputs:
    return {key: value for key, value in draw(tokens=4096).items() if key != "y"}


@pytest.mark.parametrize("how", WRITES)
def test_a_long_condition_written_in_place(how: str) -> None:
    model, source = pooled()
    found, values = bind_request(source), long()
    assert values["text"].nbytes > 1 << 17 and found.prologue.parts
    check(found, values, model)
    for _ in range(2):
        WRITES[how](values["text"])
        check(found, values, model)


@pytest.mark.parametrize(
    "lay",
    [
        lambda c: c.mT.contiguous().mT,
        lambda c: c.repeat_interleave(2, 1)[:, ::2],
        lambda c: c[:1].expand_as(c),
        lambda c: torch.cat([c, c])[1:3],
    ],
    ids=["transposed", "gaps", "expanded", "offset"],
)
def test_the_layout_of_a_condition_counts(lay: Callable[[Tensor], Tensor]) -> None:
    """Equal values in another layout are rounded otherwise, by the original too."""
    found = bound()
    values = draw(1 if lay(draw()["text"]).shape[0] == 1 else 2)
    for _ in range(2):
        check(found, values)
        other = values | {"text": lay(values["text"])}
        check(found, other)
        found.set_timesteps(STEPS)
        check(found, other | {"t": values["t"] * 0})
        check(found, values | {"text": other["text"].contiguous()})


def weights_changed(model: nn.Module, how: str) -> None:
    """Other weights for each kind of value."""
    for path in ("time.2", "merge", "v"):
        layer = model.get_submodule(path)
        if how == "copy_":
            layer.weight.copy_(layer.weight * 0.9)
        elif how == "data":
            layer.weight.data += 0.1
        elif how == "new":
            layer.weight = nn.Parameter(layer.weight * 1.1)
        elif how == "layer":
            layer.bias.data = layer.bias + 1
    if how == "new":
        model.scale = nn.Parameter(model.get_parameter("scale") * 0.9)


ACTIONS = ("new", "old", "clone", "write", "label", "schedule", "weights", "copy", "autocast")


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow], print_blob=False)
@given(
    data=st.data(),
    capacity=st.integers(1, 3),
    offload=st.sampled_from(("none", "disk")),
    start=st.sampled_from((None, tuple(STEPS), 3)),
)
def test_any_sequence_of_events(
    data: st.DataObject, capacity: int, offload: Any, start: Any
) -> None:
    """Prompts come, go and change, with everything else, and each answer is the model's."""
    model, source = (copy.deepcopy(each) for each in captured())
    found = bind_request(source, start, capacity=capacity, offload=offload)
    prompts, cast = [draw()], False
    values = prompts[0]
    for _ in range(data.draw(st.integers(4, 12))):
        action = data.draw(st.sampled_from(ACTIONS))
        if action == "new":
            values = draw(data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3)))
            prompts.append(values)
        elif action == "old":
            values = data.draw(st.sampled_from(prompts))
        elif action == "clone":
            values = {key: value.clone() for key, value in values.items()}
        elif action == "write":
            WRITES[data.draw(st.sampled_from([*WRITES]))](values["text"])
        elif action == "label":
            values["y"][-1] = data.draw(st.integers(0, 9))
        elif action == "schedule":
            found.set_timesteps(data.draw(st.sampled_from((None, 2, STEPS, [7, 500]))))
        elif action == "weights":
            how = data.draw(st.sampled_from(("copy_", "data", "new", "layer")))
            weights_changed(model, how)
            weights_changed(found.gm, how)
        elif action == "copy":
            found = copy.deepcopy(found)
        else:
            cast = not cast
        steps = st.sampled_from((0, 1, 7, 500))
        same = data.draw(st.booleans())
        t = (
            [data.draw(steps)] * len(values["t"])
            if same
            else [data.draw(steps) for _ in values["t"]]
        )
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            check(found, values | {"t": torch.tensor(t)}, model)
        assert all(len(p.entries) <= capacity for p in found.prologue.parts)


def test_prompts_in_turn_and_halves_of_guidance() -> None:
    found = bound(STEPS)
    prompt, empty = draw(2, 1), draw(2, 2)
    both = {key: torch.cat([prompt[key], empty[key]]) for key in prompt}
    for step in STEPS:
        t = torch.full((2,), step)
        for values in (prompt, empty):  # in two calls
            check(found, {**values, "t": t})
        check(found, {**both, "t": t.repeat(2)})  # in one
        check(found, {**prompt, "t": t, "y": prompt["y"].clone(), "text": prompt["text"].clone()})
    assert computed(found) == {T: 2 * len(STEPS), TC: 3 * len(STEPS), C: 3}
    check(found, {**both, "text": both["text"].flip(0)})


def test_batch_size_and_steps_change_midway() -> None:
    found = bound(STEPS)
    for batch, steps in ((2, STEPS[:3]), (1, STEPS[3:]), (3, [1, 2]), (2, STEPS)):
        for step in steps:
            check(found, draw(batch, 0, step))
    found.set_timesteps(20)
    for step in (19, 7, 999):
        check(found, draw(2, 0, step))


def test_copies_are_apart() -> None:
    found = bound(STEPS)
    values = draw()
    check(found, values)
    made = copy.deepcopy(found)
    check(made, values)
    copied = copy.deepcopy(values)
    check(made, copied)
    copied["text"].mul_(2)
    check(made, copied)
    check(found, values)
    made.gm.get_submodule("k").weight.mul_(2)
    assert not torch.equal(made(**values), of(values))
    check(found, values)
    assert made.prologue.schedule.values() == STEPS


def test_pickled() -> None:
    found = bound(STEPS, on_miss="error", capacity=2)
    check(found, draw())
    made = pickle.loads(pickle.dumps(found))
    assert isinstance(made, Bound) and made.spec == found.spec
    check(made, draw())
    check(found, draw())
    with pytest.raises(InputError, match="not among the 5 timesteps of the schedule"):
        made(**draw(t=1))


def test_threads_with_prompts_of_their_own() -> None:
    found = bound(capacity=2)
    prompts = [draw(1 + seed % 2, seed) for seed in range(4)]
    expected = [[of({**p, "t": torch.full_like(p["t"], s)}) for s in STEPS] for p in prompts]
    wrong: list[Any] = []
    start = threading.Barrier(len(prompts))

    def run(k: int) -> None:
        try:
            start.wait()
            for _ in range(8):
                for i, step in enumerate(STEPS):
                    values = {**prompts[k], "t": torch.full_like(prompts[k]["t"], step)}
                    with torch.no_grad():  # of this thread
                        if not torch.equal(found(**values), expected[k][i]):
                            wrong.append((k, step))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("offload", ["none", "disk"])
@pytest.mark.parametrize("how", ["copy_", "data", "new", "layer", "load", "assign"])
def test_weights_changed_in_the_bound_model(how: str, offload: Any) -> None:
    own = copy.deepcopy(captured()[1])
    found = bind_request(own, STEPS, offload=offload)
    before = found(**draw())
    if how in ("load", "assign"):
        state = {key: value * 1.5 for key, value in found.state_dict().items()}
        found.load_state_dict(state, assign=how == "assign")
    else:
        weights_changed(found.gm, how)
    model = conditional()
    model.load_state_dict({key.removeprefix("gm."): v for key, v in found.state_dict().items()})
    for step in (500, 0):
        check(found, draw(t=step), model)
    assert not torch.equal(found(**draw()), before)
    assert found.prologue.schedule.values() == STEPS


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_weights_changed_in_the_source(offload: Any) -> None:
    """As a LoRA is fused: refused by name, and right again after refresh()."""
    model = conditional()
    found = bind_request(model, STEPS, draw(), offload=offload)
    check(found, draw(), model)
    before = found(**draw())
    model.get_submodule("k").weight.data += 0.1
    with pytest.raises(StaleError, match=r"other weights since: k\.weight"):
        found(**draw())
    again = refresh(found, model, progress=False)
    assert isinstance(again, Bound) and again.spec == found.spec
    assert again.prologue.schedule.values() == STEPS
    for seed in (0, 1):
        check(again, draw(seed=seed), model)
    assert not torch.equal(again(**draw()), before)
    model.get_submodule("k").weight.data -= 0.1
    model.get_submodule("k").weight.copy_(captured()[0].get_submodule("k").weight)
    check(found, draw(), model)  # taken out again
    with pytest.raises(StaleError):
        again(**draw())


def test_weights_changed_before_the_schedule_is_set() -> None:
    found = bind_request(copy.deepcopy(captured()[1]), offload="disk")
    found(**draw())
    found.gm.get_submodule("k").weight.add_(1)
    found.set_timesteps(STEPS)
    expected = found.unbound()
    check(bind_request(found, STEPS), draw(), expected)
    found = bind_request(expected, offload="disk")
    found(**draw())
    found.gm.get_submodule("k").weight.add_(1)
    found.set_timesteps(STEPS)
    assert torch.equal(found(**draw()), found.gm(*draw().values())[0])


def test_the_least_recently_used_goes() -> None:
    found = bound(capacity=2)
    a, b, c = (draw(seed=seed) for seed in range(3))
    for values in (a, b, a):
        check(found, values)
    assert computed(found)[C] == 2
    check(found, c)  # b goes
    check(found, a)
    assert computed(found)[C] == 3
    check(found, b)
    assert computed(found)[C] == 4
    assert all(len(p.entries) <= 2 for p in found.prologue.parts)
    sizes = {found.prologue.nbytes()}
    for seed in range(3, 12):
        check(found, draw(seed=seed))
        sizes.add(found.prologue.nbytes())
    assert len(sizes) == 1  # never more than before


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_gradient_modes(mode: Callable[[], Any]) -> None:
    found = bound(STEPS)
    check(found, draw())
    with mode():
        values = draw()
        assert torch.equal(found(**values), of(values))
        values["text"].mul_(2)
        values["y"][0] = 9
        assert torch.equal(found(**values), of(values))
    check(found, values)
    check(found, draw())
    assert not any(r.row(0).requires_grad or r.row(0).is_inference() for r in rows(found))


def rows(found: Bound) -> Iterator[Any]:
    for kept in found.prologue.parts:
        for entry in kept.entries:
            yield from entry.rows


def test_values_first_computed_in_inference_mode_serve_training() -> None:
    found = bound(STEPS)
    values = draw()
    with torch.inference_mode():
        found(**draw())
    with torch.enable_grad():
        x = values["x"].requires_grad_()
        found(**values).sum().backward()
        assert x.grad is not None


def test_autocast_on_and_off() -> None:
    found = bound()
    for _ in range(2):
        check(found, draw())
        with torch.autocast("cpu", torch.bfloat16):
            check(found, draw())
        found.set_timesteps(STEPS)  # computes for both
        with torch.autocast("cpu", torch.bfloat16):
            check(found, draw(t=250))
        with torch.autocast("cpu", torch.bfloat16):
            found.set_timesteps([500, 1])
        check(found, draw(t=1))


def test_to_another_dtype_and_back() -> None:
    model = copy.deepcopy(captured()[0])
    found = bind_request(copy.deepcopy(captured()[1]), STEPS)
    values = draw()
    check(found, values)
    low = {k: v.bfloat16() if v.is_floating_point() else v for k, v in values.items()}
    found.to(torch.bfloat16)
    check(found, low, model.to(torch.bfloat16))
    with pytest.raises(InputError, match=r"captured for torch\.bfloat16, got torch\.float32"):
        found(**values)
    found.to(torch.float32)
    check(found, values, model.float())
    assert found.prologue.schedule.values() == STEPS


def test_quantized_models_to_another_dtype_and_back() -> None:
    done = copy.deepcopy(convert(quantizable()[1], progress=False))  # shares weights else
    found = bind_request(copy.deepcopy(done))
    for dtype in (torch.bfloat16, torch.float32):
        found.to(dtype)
        done.to(dtype)
        for values in labelled(2):
            check(found, values | {"x": values["x"].to(dtype)}, done)


def test_a_new_tensor_where_one_was_freed() -> None:
    found = bound()
    values, places = draw(), set()
    for seed in range(20):
        values["text"] = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(seed))
        places.add(values["text"].data_ptr())
        check(found, values)
        values["text"] = None
    assert len(places) < 20  # some took the place of others


def test_what_is_returned_may_be_written_to() -> None:
    """A kept value that is an output as well stays as it is."""
    model = conditional(shows=True)
    found = bind_request(model, example_inputs=draw())
    for _ in range(3):
        wanted, given = model(**draw()), found(**draw())
        assert all(map(torch.equal, wanted, given))
        for value in given:
            value.zero_()


# ---------------------------------------------------------------- timesteps


def test_a_timestep_in_any_form() -> None:
    found = bound(STEPS)
    for t in (500, torch.tensor(500), torch.tensor([500]), torch.tensor([500, 500]), 500.0):
        assert torch.equal(found(**draw() | {"t": t}), of(draw()))
    assert computed(found)[TC] == len(STEPS)


def test_no_timestep_is_nan_and_infinity_is_one() -> None:
    model = captured()[0]
    found = bind_request(model, example_inputs=draw(t=[0.5, 0.5]))
    with pytest.raises(InputError, match="t: NaN is no timestep"):
        found(**draw(t=[0.5, float("nan")]))
    for t in ([float("inf")] * 2, [float("inf"), 0.5], [-float("inf")] * 2):
        values = draw(t=t)
        assert torch.allclose(found(**values), model(**values), rtol=0, atol=0, equal_nan=True)
    for t in ([0.5, 0.5], [0.1, 0.7], [-0.0, 0.0], [1e-45, 1e38]):
        check(found, draw(t=t))


@pytest.mark.parametrize("mix", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("mode", ["exact", "batched"])
def test_each_sample_at_its_own_timestep(mix: float, mode: Any) -> None:
    model, source = captured(mix=mix) if mix else captured()
    found = bind_request(source, STEPS, mode=mode)
    for t in ([500, 500, 500], [999, 0, 250], [0, 0, 999], [1, 2, 3], [999, 5, 999], [500, 500, 0]):
        values = draw(3, 0, t)
        if mode == "exact":
            check(found, values, model)
        expected = model(**values)
        assert (found(**values) - expected).abs().max() <= 1e-5 * expected.abs().max()
    mixes = {p.part.conditions: p.mixes for p in found.prologue.parts if p.part.stepped}
    assert mixes == {(): False, ("y",): bool(mix)}


def test_more_timesteps_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prologue_module, "_MOST_ROWS", 4)
    found = bound()
    for t in ([1, 2], [2, 3], [4, 1], [5, 4], [1, 1], [5, 6], [5, 5]):
        check(found, draw(t=t))
        assert all(len(p.entries[0].index) <= 4 for p in found.prologue.parts if p.part.stepped)
    found.set_timesteps(STEPS)  # longer than that: it counts as it is
    check(found, draw(t=0))
    check(found, draw(t=[1, 0]))


def test_rows_of_timesteps_that_never_repeat_do_not_outgrow_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prologue_module, "_FEW_ROWS", 1)
    found = bound()
    weights = found.prologue.offloaded.nbytes()
    most = [max(1, weights // (64 * p.part.step_bytes)) for p in found.prologue.parts]
    assert max(most) < 100
    for t in range(150):
        check(found, draw(64, t=t))
        for kept, room in zip(found.prologue.parts, most, strict=True):
            assert not kept.part.stepped or len(kept.entries[0].index) <= room
    found.set_timesteps(range(300))  # what was asked for is kept
    check(found, draw(64, t=299))
    assert {len(p.entries[0].index) for p in found.prologue.parts if p.part.stepped} == {300}


def test_without_waiting_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a schedule is all there is, timesteps stay on their device; one outside gives NaN."""
    monkeypatch.setattr(prologue_module, "_is_remote", lambda t: True)
    found = bound(STEPS, on_miss="error")
    for t in (500, 0, [999, 0], [250, 250]):
        check(found, draw(t=t))
    out = found(**draw(t=[999, 7]))
    assert out[1].isnan().all() and torch.equal(out[0], of(draw(t=[999, 0]))[0])
    model, source = captured(mix=0.5)
    found = bind_request(source, STEPS, on_miss="error")
    for t in (500, [999, 0]):
        check(found, draw(t=t), model)


def test_outside_the_schedule() -> None:
    found = bound(STEPS, on_miss="error")
    check(found, draw(t=500))
    with pytest.raises(InputError, match="t: 7 is not among the 5 timesteps of the schedule"):
        found(**draw(t=[500, 7]))
    with pytest.raises(InputError, match="t: 7 is not"):
        found(**draw(seed=3, t=7))
    check(found, draw(seed=3))
    found.set_timesteps([7])
    check(found, draw(t=7))
    found.set_timesteps(None)
    check(found, draw(t=8))
    check(bound(STEPS), draw(t=7))


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_rows_of_fewer_bits(precision: Any) -> None:
    found = bound(STEPS, precision=precision)
    exact = bound(STEPS)
    for step in STEPS:
        found(**draw(t=step)), exact(**draw(t=step))
    worst = 0.0
    for ours, theirs in zip(found.prologue.parts, exact.prologue.parts, strict=True):
        summary = next(
            p for p in found.prologue.summary()["parts"] if p["values"] == list(ours.part.names)
        )
        errors = []
        for low, high in zip(ours.entries[0].rows, theirs.entries[0].rows, strict=True):
            for step, k in ours.entries[0].index.items():
                a, b = low.row(k), high.row(theirs.entries[0].index[step])
                errors += ((a - b).double().norm(dim=-1) / b.double().norm(dim=-1)).tolist()
        assert summary["error"] == pytest.approx(max(errors, default=0.0), rel=1e-6)
        assert (summary["error"] > 0) == ours.part.stepped
        worst = max(worst, summary["error"])
    assert worst <= (2**-11 if precision == "float16" else 0.01)
    assert found.prologue.nbytes() < exact.prologue.nbytes()
    out, expected = found(**draw()), of(draw())
    assert not torch.equal(out, expected)
    assert (out - expected).norm() <= 4 * worst * expected.norm()


# ---------------------------------------------------------------- how much is computed


def test_each_step_is_computed_once() -> None:
    found = bound(STEPS)
    assert computed(found) == {T: 0, TC: 0, C: 0}
    for prompt in (1, 2):
        for i, step in enumerate(STEPS):
            check(found, draw(seed=0, t=step) | {"y": torch.tensor([prompt, 3])})
            assert computed(found) == {T: len(STEPS), TC: prompt * len(STEPS), C: 1}, i


def test_the_second_request_takes_the_steps_of_the_first() -> None:
    found = bound()
    for i, step in enumerate(STEPS[:3]):
        found(**draw(seed=1, t=step))
        assert computed(found) == {T: i + 1, TC: i + 1, C: 1}
    for step in STEPS[:3]:
        found(**draw(seed=2, t=step))
        assert computed(found) == {T: 3, TC: 6, C: 2}


def test_a_condition_that_never_stays_costs_one_row_a_call() -> None:
    found = bound(50)
    for i in range(12):
        check(found, draw(t=i) | {"y": torch.tensor([i % 10, i // 10])})
    assert computed(found)[TC] <= 3 * 50 + 9
    for step in range(50):  # and one that does costs its rows again
        found(**draw(t=step))
    before = computed(found)[TC]
    found(**draw(seed=5, t=0))
    assert computed(found)[TC] == before + 50


def test_setting_the_schedule_computes_at_once() -> None:
    found = bound()
    check(found, draw(t=1))
    found.set_timesteps(STEPS)
    assert computed(found) == {T: 1 + len(STEPS), TC: 1 + len(STEPS), C: 1}
    check(found, draw(t=0))
    assert computed(found)[TC] == 1 + len(STEPS)


# ---------------------------------------------------------------- what is refused


def test_a_table_that_outweighs_its_weights() -> None:
    model = conditional(wide=8)
    found = bind_request(model, example_inputs=draw(), steps=1000)
    reasons = {d.site: d.reason for d in found.prologue.declined}
    assert "merge" in "".join(reasons) and all(
        "and the weights they replace" in r for r in reasons.values()
    )
    for seed in (0, 1):
        check(found, draw(seed=seed), model)
    kept = {name for p in found.prologue.parts for name in p.part.names}
    assert not kept & set(reasons)


def test_bad_arguments() -> None:
    model, source = captured()
    with pytest.raises(
        ConfigError, match="no input 'label' for a condition; choose from x, y, text"
    ):
        bind_request(source, conditions=("label",))
    with pytest.raises(ConfigError, match="no input 't'"):
        bind_request(source, conditions=("t",))
    with pytest.raises(ConfigError, match="sequence of names"):
        bind_request(source, conditions="y")
    with pytest.raises(ConfigError, match="a PrologueSpec or capacity, not both"):
        bind_request(source, spec=PrologueSpec(), capacity=2)
    with pytest.raises(ConfigError, match="not captured again"):
        bind_request(source, example_inputs=draw())
    with pytest.raises(ConfigError, match="not a Prepared"):
        bind_request(prepare(model, draw(), config="fp"))
    with pytest.raises(ConfigError, match="bind before compiling"):
        bind_request(compile_model(source, backend="eager"))
    with pytest.raises(ConfigError, match="capacity must be at least 1"):
        bind_request(source, capacity=0)
    with pytest.raises(ConfigError, match="timesteps"):
        bind_request(source, [1.5])
    with pytest.raises(ConfigError, match="already"):
        bind_request(source, offload="cpu")


def test_conditions_unlike_those_captured() -> None:
    found = bound(STEPS)
    check(found, draw())
    for change, message in (
        (
            {"text": draw()["text"].double()},
            r"text: captured for torch\.float32, got torch\.float64",
        ),
        ({"y": torch.tensor([1.0, 2.0])}, r"y: captured for torch\.int64, got torch\.float32"),
        ({"y": torch.tensor([1, 2, 3])}, "y: dimension 0 is 3"),
        ({"text": torch.randn(2, 3, WIDTH + 1)}, "text: dimension 2 was captured as 8, got 9"),
        ({"text": torch.randn(2, WIDTH)}, "text: expected 3 dimensions"),
        ({"y": None}, "y: expected a tensor"),
    ):
        with pytest.raises(InputError, match=message):
            found(**draw() | change)
    check(found, draw())


def test_binding_again_and_undoing_it() -> None:
    found = bound(STEPS, capacity=1)
    check(found, draw())
    again = bind_request(found, capacity=3)
    assert again.spec.capacity == 3
    check(again, draw())
    plain = found.unbound()
    assert type(plain) is Converted
    check(plain, draw(t=[1, 2]))
    check(found, draw())


def test_the_original_is_left_alone() -> None:
    model = conditional()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    places = {key: value.data_ptr() for key, value in model.state_dict().items()}
    found = bind_request(model, STEPS, example_inputs=draw(), offload="disk")
    for seed in (0, 1):
        check(found, draw(seed=seed), model)
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == places
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_report_and_repr() -> None:
    found = bound(STEPS)
    check(found, draw())
    summary = found.prologue.summary()
    assert {"merge.weight", "label.weight", "k.weight", "time.0.bias"} <= set(summary["freed"])
    assert "q.weight" not in summary["freed"] and summary["freed_bytes"] > 0
    assert sum(p["kept_bytes"] for p in summary["parts"]) == found.prologue.nbytes() > 0
    assert "prologue of 4 values" in repr(found)
    found.print_readable()


# ---------------------------------------------------------------- compiled, in a pipeline


@pytest.fixture
def dynamo() -> Iterator[Any]:
    import torch._dynamo.testing

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.parametrize("quantized", [False, True])
def test_one_graph_for_prompts_and_steps(quantized: bool, dynamo: Any) -> None:
    counter = dynamo.testing.CompileCounterWithBackend("eager")
    if quantized:
        done = convert(quantizable()[1], progress=False)
        found, every = bind_request(done), [list(labelled(2)), list(labelled(2))[::-1]]
        every[1] = [values | {"y": values["y"] + 1} for values in every[1]]
    else:
        done, found = captured()[1], bound(STEPS)
        every = [[draw(2, seed, step) for step in STEPS] for seed in (0, 1)]
        every[1].append(draw(2, 1, [999, 0]))
    compiled = torch.compile(found.step, fullgraph=True, backend=counter)
    for prompt, loop in enumerate(every):
        for i, values in enumerate(loop):
            inputs, _ = found.call.bind((), values)
            with dynamo.config.patch(error_on_recompile=(prompt, i) > (0, 0)):
                assert torch.equal(compiled(*found.prologue.step_inputs(inputs))[0], done(**values))
    assert counter.frame_count == 1 and not dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize("name, recipe", [("flux-dev", "fp"), ("dit-xl-2", "w8a8")])
def test_compiled_loops(name: str, recipe: str, dynamo: Any) -> None:
    """Six steps of two prompts in one graph; as near to eager as without a prologue."""
    source: Any = bind_request(zoo.model(name), example_inputs=zoo.inputs(name, zoo.model(name)))
    source = source.unbound() if recipe == "fp" else converted(name, recipe)
    found = bind_request(source)
    plain, ours = compile_model(source, "inductor"), compile_model(found, "inductor")
    model = zoo.model(name)
    first = list(calls(name, model, 2, 40))
    for i, values in enumerate([*first, *first, *calls(name, model, 2, 41)]):
        with dynamo.config.patch(error_on_recompile=i > 0):
            expected, wanted, got = (answer(each(**values)) for each in (source, plain, ours))
        # the same kernels on the same values, but fused in other ways
        assert sqnr(expected, got) >= min(sqnr(expected, wanted) - 3, 100)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not dynamo.utils.counters["graph_break"]


def test_somebody_who_compiles_the_whole_gets_the_whole(dynamo: Any) -> None:
    """Nothing is kept then: what is traced once would be stale for ever."""
    counter = dynamo.testing.CompileCounterWithBackend("eager")
    found = bound(STEPS)
    compiled = torch.compile(found, fullgraph=True, backend=counter)
    for seed in (0, 1):
        for step in STEPS[:2]:
            check(compiled, draw(2, seed, step))
    assert counter.frame_count == 1 and computed(found) == {T: 0, TC: 0, C: 0}


@pytest.mark.parametrize(
    "name, kind",
    [
        ("dit-xl-2", "EulerDiscreteScheduler"),
        pytest.param("flux-dev", FLOW_EULER, marks=pytest.mark.slow),
        pytest.param("sdxl", "DDIMScheduler", marks=pytest.mark.slow),
        pytest.param("sd15", "DDIMScheduler", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'
def test_images_of_a_pipeline_are_the_same(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "dit-xl-2":  # its pipeline takes 1000 to mean no class
        monkeypatch.setitem(zoo.ENTRIES[name].reduced, "num_embeds_ada_norm", 1000)
    model = zoo.model(name)
    pipe, options = pipeline(name, model, schedule(kind))
    pipe.set_progress_bar_config(disable=True)
    part = "transformer" if hasattr(pipe, "transformer") else "unet"
    example = zoo.inputs(name, model)
    if kind == "EulerDiscreteScheduler":
        example["timestep"] = example["timestep"].float()
    found = bind_request(model, pipe.scheduler, example, on_miss="error")

    def images(denoiser: nn.Module, steps: int) -> Tensor:
        setattr(pipe, part, denoiser)
        generator = torch.Generator().manual_seed(1)
        made = pipe(**options | {"num_inference_steps": steps}, generator=generator)[0]
        return torch.as_tensor(made)

    met = set[float]()
    for steps in (3, 5):
        assert torch.equal(images(found, steps), images(model, steps))
        met |= {*pipe.scheduler.timesteps.tolist()}
        for kept in found.prologue.parts:  # each value once, in spite of two images
            assert kept.computed == (len(met) if kept.part.stepped else 1)
