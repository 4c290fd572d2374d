"""Nothing is stale, whatever becomes of conditions, weights, copies, threads and modes."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.prologue.bound.toys import (
    STEPS,
    TC,
    WIDTH,
    C,
    Inputs,
    T,
    bound,
    captured,
    check,
    computed,
    conditional,
    draw,
    labelled,
    of,
    quantizable,
)
from tests.toys import seeded
from tfmq_fx import (
    Bound,
    ConfigError,
    Converted,
    InputError,
    StaleError,
    bind_request,
    convert,
    refresh,
)

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
            layer.weight.data = layer.weight + 0.1
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
    model.get_submodule("k").weight.add_(0.1)
    with pytest.raises(StaleError, match=r"other weights since: k\.weight"):
        found(**draw())
    again = refresh(found, model, progress=False)
    assert isinstance(again, Bound) and again.spec == found.spec
    assert again.prologue.schedule.values() == STEPS
    for seed in (0, 1):
        check(again, draw(seed=seed), model)
    assert not torch.equal(again(**draw()), before)
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


def test_another_dtype_is_captured_anew() -> None:
    """The graph asks for float32, and does not tell whether the model would in bfloat16 too: a cast
    is captured from a copy of the source, or refused where there is none."""
    found, values = bind_request(copy.deepcopy(captured()[1]), STEPS), draw()
    check(found, values)
    low = {k: v.bfloat16() if v.is_floating_point() else v for k, v in values.items()}
    model = copy.deepcopy(captured()[0]).to(torch.bfloat16)
    check(copy.deepcopy(found).to(torch.bfloat16), low, model)
    found.forget_source()
    with pytest.raises(ConfigError, match=r"Cast the model and capture it: model\.to"):
        found.to(torch.bfloat16)
    check(found, values)
    found = bind_request(model, STEPS, low)
    check(found, low, model)
    with pytest.raises(InputError, match=r"captured for torch\.bfloat16, got torch\.float32"):
        found(**values)
    assert found.prologue.schedule.values() == STEPS


def test_quantized_models_to_another_dtype_and_back() -> None:
    done = convert(quantizable()[1], progress=False)
    found = bind_request(copy.deepcopy(done))
    for dtype in (torch.bfloat16, torch.float32):
        found.to(dtype)
        done.to(dtype)
        for values in labelled(2):
            check(found, values | {"x": values["x"].to(dtype)}, done)


def test_a_new_tensor_where_one_was_freed() -> None:
    """At the same place and version, and often of the same id, with other contents."""
    found = bound()
    values = draw()
    memory = values["text"].numpy().copy()
    for seed in range(20):
        memory[:] = np.random.default_rng(seed).standard_normal(memory.shape)
        values["text"] = torch.from_numpy(memory)
        check(found, values)
        values["text"] = None


def test_what_is_returned_may_be_written_to() -> None:
    """A kept value that is an output as well stays as it is."""
    model = conditional(shows=True)
    found = bind_request(model, example_inputs=draw())
    for _ in range(3):
        wanted, given = model(**draw()), found(**draw())
        assert all(map(torch.equal, wanted, given))
        for value in given:
            value.zero_()
