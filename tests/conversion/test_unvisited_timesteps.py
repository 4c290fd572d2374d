"""Timesteps that calibration did not visit: the rows of `refresh`, made when a call brings them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import logging
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.toys import seeded, sinusoidal
from tfmq_fx import (
    PRESETS,
    InputError,
    StaleError,
    bind_request,
    calibrate,
    compile,
    convert,
    fold_timesteps,
    load,
    prepare,
    refresh,
    report,
    save,
)
from tfmq_fx.conversion import unvisited_timesteps
from tfmq_fx.conversion.models import Converted

STEPS = [900, 500, 100]
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A temporal block of two layers, whose values two layers of the sample take."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        own = self.time(sinusoidal(t, 8).to(x.dtype))
        out: Tensor = self.leave(torch.tanh(self.enter(x) * own + own))
        return out


def recipe(name: str, mode: str = "table") -> Any:
    config = PRESETS[name]
    spec = dataclasses.replace(config.reconstruction, rounding="nearest", iters=0)
    temporal = dataclasses.replace(config.temporal, mode=mode, tiar_iters=0)
    return dataclasses.replace(config, reconstruction=spec, temporal=temporal)


def made(config: Any, kind: torch.dtype = torch.int64) -> tuple[nn.Module, Converted]:
    source = seeded(Net).eval()
    steps = torch.tensor(STEPS).to(kind)
    prepared = prepare(source, (X, steps[:2]), timesteps=steps, config=config)
    calls = [(X * (1 + float(step) / 500), step.expand(2)) for step in steps]
    return source, convert(calibrate(prepared, calls, progress=False), progress=False)


@functools.cache
def kept(name: str, mode: str = "table") -> tuple[nn.Module, Converted]:
    """A source and a model that tests copy."""
    return made("fp" if name == "fp" else recipe(name, mode))


def fresh(name: str, mode: str = "table") -> tuple[nn.Module, Converted]:
    source, model = kept(name, mode)
    return source, copy.deepcopy(model)


FORMS = [
    ("fp", "table"),
    ("w8a8", "table"),
    ("w8a8", "cache"),
    ("w8a8", "tib"),
    ("w8a8-dynamic", "table"),
]
OTHERS = [899, 0, 300, 2000, 101]  # beside, beyond and between those of calibration


@pytest.mark.parametrize(("name", "mode"), FORMS)
def test_the_answers_are_those_of_a_model_made_for_all_of_them(name: str, mode: str) -> None:
    source, model = fresh(name, mode)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    known = {step: model(X, step) for step in STEPS}
    wanted = refresh(model, source, timesteps=[*STEPS, *OTHERS])
    for step in OTHERS:
        assert torch.equal(model(X, step), wanted(X, step))
        mixed = torch.tensor([step, STEPS[0]])
        assert torch.equal(model(X, mixed), wanted(X, mixed))
        assert all(torch.equal(model(X, step), known[step]) for step in STEPS)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert model.timesteps.tolist() == sorted(STEPS)  # the model itself stays as it is
    expected = {"timesteps": len(OTHERS), "interpolated": 0 if name != "w8a8" else len(OTHERS)}
    assert report(model).data["unvisited"] == expected
    assert "; 5 more met in calls (" in str(report(model))
    assert ("ranges of 5 interpolated" in str(report(model))) == (name == "w8a8")


def test_exact_tables_stay_exact() -> None:
    source, model = fresh("fp")
    with torch.no_grad():
        for step in OTHERS:
            assert torch.equal(model(X[:1], step), source(X[:1], torch.tensor([step])))
        with torch.autocast("cpu"):  # rows are as exact as those of folding
            model(X[:1], 77)
        assert torch.equal(model(X[:1], 77), source(X[:1], torch.tensor([77])))
    with torch.inference_mode():
        model(X[:1], 78)
    x = X.clone().requires_grad_()
    model(x, 78).sum().backward()
    assert x.grad is not None


def test_float_timesteps_between_others() -> None:
    source, model = made(recipe("w8a8"), torch.float32)
    wanted = refresh(model, source, timesteps=[*map(float, STEPS), 300.5, 99.75])
    for step in (300.5, 99.75):
        assert torch.equal(model(X, step), wanted(X, step))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=rf"t: {bad} is not among the 3 .* not finite"):
            model(X, bad)


def test_a_row_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = fresh("w8a8")
    counted, usual = [], unvisited_timesteps.tables_at

    def counting(gm: Any, keys: Tensor, **options: Any) -> Any:
        counted.append(keys.tolist())
        return usual(gm, keys, **options)

    monkeypatch.setattr(unvisited_timesteps, "tables_at", counting)
    for step in (7, 9, 7, 9, 500):
        model(X, step)
    model(X, torch.tensor([9, 11]))
    assert counted == [[7], [9], [11]]


def test_rows_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unvisited_timesteps, "_MOST", 4)
    for mode in ("table", "cache"):
        source, model = fresh("w8a8", mode)
        wanted = refresh(model, source, timesteps=range(1000))
        for step in (*range(10), 500, 3):
            assert torch.equal(model(X, step), wanted(X, step))
        assert len(model.unvisited.met) == 4


def test_one_line_of_the_log_says_that_ranges_are_interpolated(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, logger="tfmq_fx"):
        _, model = fresh("w8a8")
        for step in (300, 301):
            model(X, step)
        assert [r.getMessage().partition(":")[0] for r in caplog.records] == [
            "timestep 300 is not among the 3 of calibration"
        ]
        caplog.clear()
        fresh("fp")[1](X, 300)  # which is exact
        assert not caplog.records


def test_from_many_threads() -> None:
    source, model = fresh("w8a8", "cache")
    wanted = refresh(model, source, timesteps=range(0, 1000, 10))
    wrong = list[float]()

    def ask(first: int) -> None:
        for step in range(first, 1000, 50):
            if not torch.equal(model(X, step), wanted(X, step)):
                wrong.append(step)

    threads = [threading.Thread(target=ask, args=(10 * i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(model.unvisited.met) == 100 - len(STEPS)


# ---------------------------------------------------------------- without a source


@pytest.mark.parametrize("how", ["loaded", "pickled", "forgotten", "gone"])
def test_features_need_the_source(how: str, tmp_path: Any) -> None:
    source, model = made(recipe("w8a8"))
    model(X, 7)
    if how == "loaded":
        save(model, tmp_path / "model")
        model = load(tmp_path / "model")
    elif how == "pickled":
        model = pickle.loads(pickle.dumps(model))
    elif how == "forgotten":
        model.forget_source()
    else:
        alive = weakref.ref(source)
        del source
        gc.collect()
        assert alive() is None  # the rows made before have not kept it
        source = seeded(Net).eval()
    with pytest.raises(InputError, match=r"t: 8 is not among the 3 .*refresh\(model, source, ti"):
        model(X, 8)
    again = refresh(model, source, timesteps=[*STEPS, 8])  # what the message says
    assert torch.isfinite(again(X, 8)).all()


def test_without_features_no_source_is_needed(tmp_path: Any) -> None:
    _, model = fresh("w8a8", "tib")
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert torch.equal(loaded(X, 300), model(X, 300))
    assert report(loaded).data["unvisited"] == {"timesteps": 1, "interpolated": 1}


def test_a_source_that_changed_is_refused() -> None:
    source, model = made("fp")
    model(X, 7)
    with torch.no_grad():
        source.time[0].weight += 1
    with pytest.raises(StaleError):
        model(X, 8)
    source, model = made("fp")
    source.time[0].weight.data += 1  # past the version counter
    with pytest.raises(StaleError):
        model(X, 8)


def test_a_source_in_another_dtype_computes_no_rows() -> None:
    source, model = made("fp")
    source.half()
    with pytest.raises(InputError, match=r"t: 8 is not among .* cannot be computed: .*float16"):
        model(X, 8)


# ---------------------------------------------------------------- moved, changed, bound, compiled


def test_a_cast_model_makes_rows_in_its_own_dtype() -> None:
    source, model = made("fp")
    model(X, 7)
    model.to(torch.bfloat16)
    wanted = refresh(model, source, timesteps=[*STEPS, 7, 8])
    for step in (7, 8):
        assert torch.equal(model(X.bfloat16(), step), wanted(X.bfloat16(), step))


def test_what_calls_added_is_no_part_of_the_model(tmp_path: Any) -> None:
    source, model = fresh("w8a8")
    model(X, 7)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    for other in (copy.deepcopy(model), loaded, refresh(model, source, timesteps=[*STEPS, 3])):
        assert not other.unvisited.met and 7 not in other.timesteps.tolist()
    # from what calibration measured, not by way of another set
    there = refresh(model, source, timesteps=[950, 50])
    assert torch.equal(there(X, 500), model(X, 500)) and torch.equal(there(X, 7), model(X, 7))


@pytest.mark.parametrize(("name", "mode"), FORMS)
def test_a_bound_model_answers_alike(name: str, mode: str) -> None:
    source, model = fresh(name, mode)
    wanted = refresh(model, source, timesteps=[*STEPS, *OTHERS])
    bound = bind_request(model, STEPS)
    for step in (*OTHERS, *STEPS, OTHERS[0]):
        assert torch.equal(bound(X, step), wanted(X, step))
    bound.set_timesteps([*STEPS, 42])
    assert torch.equal(bound(X, 42), model(X, 42))


def test_a_compiled_model_hands_over_to_the_converted_one(caplog: Any) -> None:
    _, model = fresh("w8a8")
    compiled = compile(model, "eager")
    with caplog.at_level(logging.WARNING, logger="tfmq_fx.conversion.models"):
        for step in (7, 8, 500):
            assert torch.equal(compiled(X, step), model(X, step))
        ours = [r for r in caplog.records if r.name.endswith("conversion.models")]
        assert [r.getMessage().partition(":")[0] for r in ours] == ["timestep 7 was not compiled"]
    del model
    gc.collect()
    with pytest.raises(InputError, match=r"t: 9 is not among the 3 .* gone: keep a reference"):
        compiled(X, 9)


def test_a_timestep_that_the_model_cannot_take_is_named() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.mix = nn.Embedding(10, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = x * self.mix(self.rows(t))
            return out

    source = seeded(Embedded).eval()
    model = fold_timesteps(source, [1, 5], (X, torch.tensor([1, 5])))
    assert torch.equal(model(X[:1], 9), source(X[:1], torch.tensor([9])))
    with pytest.raises(InputError, match=r"t: 10 is not among the 2 .* index out of range"):
        model(X, 10)
