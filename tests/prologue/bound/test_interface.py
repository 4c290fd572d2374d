"""What cannot be bound is refused by name; what can is told, and can be undone."""

from __future__ import annotations

import pytest
import torch

from tests.prologue.bound.toys import STEPS, WIDTH, bound, captured, check, conditional, draw
from tfmq_fx import (
    ConfigError,
    Converted,
    InputError,
    PrologueSpec,
    bind_request,
    prepare,
)
from tfmq_fx import compile as compile_model


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
    with pytest.raises(ConfigError, match="conditions must be of type tuple"):
        bind_request(source, conditions="y")
    with pytest.raises(ConfigError, match="a PrologueSpec or capacity, not both"):
        bind_request(source, spec=PrologueSpec(), capacity=2)
    with pytest.raises(ConfigError, match="captured already"):
        bind_request(source, example_inputs=draw())
    with pytest.raises(ConfigError, match="not a Prepared"):
        bind_request(prepare(model, draw(), config="fp"))
    with pytest.raises(ConfigError, match="bind before compiling"):
        bind_request(compile_model(source, backend="eager"))
    with pytest.raises(ConfigError, match="capacity must be at least 1"):
        bind_request(source, capacity=0)
    for removed in ("mode", "precision"):
        with pytest.raises(ConfigError, match=rf"no option '{removed}'; it has conditions, steps"):
            bind_request(source, **{removed: "exact"})
    with pytest.raises(ConfigError, match="timesteps"):
        bind_request(source, [1.5])
    with pytest.raises(ConfigError, match="already"):
        bind_request(source, offload="cpu")


def test_conditions_unlike_those_captured() -> None:
    """They are refused where the model itself refuses them, and answered as it does elsewhere."""
    found, model = bound(STEPS), captured()[0]
    check(found, draw())
    answered = 0
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
        values = draw() | change
        try:
            model(**values)
        except Exception:
            with pytest.raises(InputError, match=message):
                found(**values)
        else:
            answered += 1
            check(found, values)
    check(found, draw())
    assert answered < 5  # a width, for one, is the model's own


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
