"""origin: what a model remembers of its making holds no weights, is exact, and survives JSON."""

import copy
import dataclasses
import gc
import json
import pickle

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.adapters import Denoiser, adapt, by_data
from tests.mutations import seal
from tests.toys import Small, ToyUNet, seeded
from tfmq_fx import (
    PRESETS,
    ArtifactError,
    ConfigError,
    LayerConfig,
    WeightSpec,
    calibrate,
    check_source,
    convert,
    fold_timesteps,
    load,
    prepare,
    save,
)
from tfmq_fx.passes.observe_layers import observer_name
from tfmq_fx.serialization.artifact import GRAPH_FILE, ORIGIN_FILE, ORIGIN_TENSORS, saved_bytes
from tfmq_fx.serialization.provenance import Provenance

X, T = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 1])
TIMES = (0, 1, 5)


def data(count=12):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(count, 4, generator=generator), torch.full((count,), t)) for t in TIMES]


W8A8 = dataclasses.replace(
    PRESETS["w8a8"], temporal=dataclasses.replace(PRESETS["w8a8"].temporal, tiar_iters=2)
)


def calibrated(model, config=W8A8):
    overrides = {"leave": LayerConfig(weights=WeightSpec(bits=4))} if config is W8A8 else None
    prepared = prepare(model, (X, T), timesteps=TIMES, config=config, overrides=overrides)
    return calibrate(prepared, data(), progress=False)


def quantized(model, config=W8A8):
    return convert(calibrated(model, config), progress=False)


@pytest.fixture(scope="module")
def source():
    """Not to be changed."""
    return seeded(Denoiser).eval()


@pytest.fixture(scope="module")
def model(source):
    return quantized(source)


def parts(origin, calibration=True):
    """Through JSON, as on disk."""
    found, tensors = origin.to_parts(calibration=calibration)
    return json.loads(json.dumps(found)), tensors


# ---------------------------------------------------------------- what is kept


def test_no_weight_is_kept_alive():
    source = seeded(Denoiser, width=64).eval()
    model = quantized(source)
    memory = {
        name: StorageWeakRef(source.get_parameter(name).untyped_storage())
        for name in ("enter.weight", "time.0.weight", "leave.weight")
    }
    assert not any(ref.expired() for ref in memory.values())
    del source
    gc.collect()
    assert all(ref.expired() for ref in memory.values())
    assert torch.isfinite(model(X, T)).all()


def test_what_is_kept_is_no_part_of_the_model(model):
    without = copy.deepcopy(model)
    without.origin = None
    assert model.nbytes() == without.nbytes()
    assert model.state_dict().keys() == without.state_dict().keys()
    small = len(fold_timesteps(seeded(Denoiser, width=8), TIMES, (X, T)).origin.graph)
    large = len(fold_timesteps(seeded(Denoiser, width=512), TIMES, (X, T)).origin.graph)
    assert large < 1.1 * small  # sizes have more digits, and that is all


def test_copies_remember_too(model):
    assert copy.deepcopy(model).origin is model.origin
    pickled = pickle.loads(pickle.dumps(model)).origin
    assert pickled.graph == model.origin.graph
    assert pickled.calibration.seen == model.origin.calibration.seen


def test_the_samples_kept_are_those_that_conversion_drew(source):
    prepared = calibrated(source)
    spec = prepared.recipe.reconstruction
    prepared.recipe = dataclasses.replace(
        prepared.recipe, reconstruction=dataclasses.replace(spec, samples=6)
    )
    origin = convert(prepared, progress=False).origin
    assert {step: len(rows) for step, rows in origin.calibration.rows.items()} == {0: 2, 1: 2, 5: 2}
    assert origin.visits == {0: 12, 1: 12, 5: 12} and origin.timesteps.tolist() == [0, 1, 5]
    seen = prepared.observed.get_submodule(observer_name("enter")).seen
    assert origin.calibration.seen["enter"] == seen
    calibrate(prepared, [(X * 100, T)], progress=False)  # later on, for something else
    assert origin.calibration.seen["enter"] != seen and origin.visits[1] == 12


def test_calibration_is_kept_only_where_it_was_read(source, model):
    origin = quantized(source, "fp").origin
    assert not origin.calibrated and origin.calibration is None and origin.visits[5] == 12
    assert model.origin.calibrated


def test_tensors_made_in_forward_are_kept_with_the_graph():
    class Turns(Small):
        """Rotates by angles that forward makes a tensor of, as one that no trace sees."""

        angles = torch.polar(torch.ones(2), torch.tensor([0.5, 1.5]))

        def forward(self, x, t):
            pairs = torch.view_as_complex(self.base(x, t).unflatten(1, (2, 2)).contiguous())
            return torch.view_as_real(pairs * Turns.angles).flatten(1)

    source = seeded(Turns).eval()
    model = fold_timesteps(source, TIMES, (X, T))
    ((name, angles),) = model.origin.constants.items()
    assert torch.equal(angles, Turns.angles) and name not in model.origin.fingerprints
    restored = Provenance.from_parts(*parts(model.origin))
    assert torch.equal(restored.constants[name], Turns.angles)
    gm = restored.captured(source)
    assert torch.equal(gm(X, T)[0], source(X, T))


# ---------------------------------------------------------------- the source again


def test_the_captured_graph_is_the_one_that_was(source):
    prepared = calibrated(source)
    origin = convert(prepared, progress=False).origin
    gm = origin.captured(source)
    assert gm.code == prepared.unmerged.code
    assert torch.equal(gm(X, T)[0], source(X, T))
    other = seeded(Denoiser, seed=1).eval()
    assert torch.equal(origin.captured(other)(X, T)[0], other(X, T))


def test_changes_are_listed(source, model):
    assert check_source(model, source) == []
    assert check_source(model, copy.deepcopy(source).half()) == []
    other = copy.deepcopy(source)
    by_data(other, "leave.weight")
    other.enter.bias.data[-1] += 1  # in a corner
    assert check_source(model, other) == ["enter.bias", "leave.weight"]
    (adapter,) = adapt(other, "time.0")
    assert {"time.0.weight", "time.0.bias"} < set(check_source(model, other))
    adapter.merge()
    assert set(check_source(model, other)) == {"time.0.weight", "enter.bias", "leave.weight"}
    names = check_source(model, nn.Linear(2, 2))
    assert names == [*model.origin.fingerprints, "(class)", "time", "enter", "leave"]


def test_a_graph_that_cannot_be_kept_is_said_so():
    source = seeded(Denoiser).eval()
    source.enter.register_forward_hook(lambda *_: None)
    model = fold_timesteps(source, TIMES, (X, T))
    assert model.origin.graph == "" and "hooks" in model.origin.obstacle
    model(X, T)
    with pytest.raises(ConfigError, match=r"cannot be kept \(.*hooks.*\): prepare and convert"):
        model.origin.captured(source)
    by_data(source, "enter.weight")
    assert check_source(model, source) == ["enter.weight"]


# ---------------------------------------------------------------- on disk


def test_what_is_written_is_read(source, model):
    origin = model.origin
    assert origin.overrides
    for calibration in (False, True):
        restored = Provenance.from_parts(*parts(origin, calibration))
        for field in ("graph", "call", "overrides", "visits", "parameters", "ties", "merged"):
            assert getattr(restored, field) == getattr(origin, field)
        assert torch.equal(restored.timesteps, origin.timesteps)
        assert restored.changed(source) == []
        assert (restored.calibration is not None) == calibration
    kept = restored.calibration
    assert kept.seen == origin.calibration.seen and kept.sampling is None
    assert list(kept.rows) == list(origin.calibration.rows)
    for step, rows in kept.rows.items():
        for row, other in zip(rows, origin.calibration.rows[step], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(row, other, strict=True))


def test_saved_models_remember_and_take_no_more_to_run(source, model, tmp_path):
    for calibration in (False, True):
        save(model, tmp_path / "model", calibration=calibration)
        loaded = load(tmp_path / "model")
        assert (loaded.origin.calibration is not None) == calibration
        assert check_source(loaded, source) == [] and loaded.watch is None
        assert torch.equal(loaded(X, T), model(X, T))
    files = {path.name: path.stat().st_size for path in (tmp_path / "model").iterdir()}
    assert saved_bytes(tmp_path / "model") == sum(files.values()) - (
        files[ORIGIN_FILE] + files[ORIGIN_TENSORS]
    )


def test_a_model_saved_without_an_origin_loads(source, model, tmp_path):
    save(model, tmp_path / "model")
    document = json.loads((tmp_path / "model" / GRAPH_FILE).read_text())
    del document["origin"]
    (tmp_path / "model" / ORIGIN_FILE).unlink()
    (tmp_path / "model" / ORIGIN_TENSORS).unlink()
    seal(tmp_path / "model", document)
    loaded = load(tmp_path / "model")
    assert loaded.origin is None and torch.equal(loaded(X, T), model(X, T))
    with pytest.raises(ConfigError, match="does not remember what it was made from"):
        check_source(loaded, source)
    save(loaded, tmp_path / "again")
    assert load(tmp_path / "again").origin is None


@pytest.mark.parametrize("name", [ORIGIN_FILE, ORIGIN_TENSORS])
def test_an_origin_that_was_altered_is_refused(model, tmp_path, name):
    save(model, tmp_path / "model", calibration=True)
    path = tmp_path / "model" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=rf"{name} is truncated or was altered: its bytes is"):
        load(tmp_path / "model")
    path.write_bytes(content.replace(b"1", b"2", 1))
    with pytest.raises(ArtifactError, match=rf"{name} is truncated or was altered: its sha256"):
        load(tmp_path / "model")
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{name} is missing"):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("graph"),
        lambda d: d.update(call={}),
        lambda d: d.update(overrides={"a": {"weight": 1}}),
        lambda d: d.update(visits=[3]),
        lambda d: d.update(fingerprints={"a": {}}),
        lambda d: d.update(samples=[[0, 9]]),
        lambda d: d.update(complex=["nowhere"]),
        lambda d: d.update(novelty=1),
        lambda d: d.update(behaviour={"a": 1}),
        lambda d: d.update(behaviour={"": {}}),
    ],
)
def test_damaged_parts_are_refused(model, change):
    found, tensors = parts(model.origin)
    change(found)
    with pytest.raises(ArtifactError):
        Provenance.from_parts(found, tensors)


@pytest.mark.parametrize("graph", ["", "{", "{}", "[" * 100_000])
def test_a_damaged_graph_is_refused(source, model, graph):
    origin = dataclasses.replace(model.origin, graph=graph)
    with pytest.raises(ArtifactError):
        origin.captured(source)


def test_the_graph_of_a_real_architecture_is_kept():
    model = seeded(ToyUNet).eval()
    x = torch.randn(1, 3, 8, 8)
    folded = fold_timesteps(model, TIMES, (x, torch.tensor([1])))
    gm = Provenance.from_parts(*parts(folded.origin)).captured(model)
    assert torch.equal(gm(x, torch.tensor([5]))[0], model(x, torch.tensor([5])))
