"""Bound models answer as the model they were made from does, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from tests import zoo
from tests.denoisers import Spec, build, denoisers, inputs
from tests.prologue.bound.toys import (
    STEPS,
    TC,
    C,
    Inputs,
    T,
    bound,
    captured,
    check,
    computed,
    draw,
    labelled,
    quantizable,
)
from tests.test_end_to_end import (
    calls,
    fast,
)
from tfmq_fx import (
    Bound,
    InputError,
    bind_request,
    convert,
    fold_timesteps,
    load,
    save,
)
from tfmq_fx.capture.nested_values import outline


def test_the_toy_has_all_three_kinds_of_values() -> None:
    found = bound()
    assert set(computed(found)) == {T, TC, C} and not found.prologue.declined
    assert {n.target for n in found.step.graph.find_nodes(op="call_module")} == {"q"}


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
        if version is folded:  # from whose source other rows are computed
            check(found, draw(1, t=7), model)
            continue
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
        assert "Capture again" in str(error)
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
