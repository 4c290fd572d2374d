"""Folders of earlier formats load, and answer what they answered."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import tfmq_fx
from tests import saved_models
from tests.mutations import seal
from tests.serialization.test_artifact import edit
from tfmq_fx.core.config import AttentionSpec, Config, PrologueSpec, RewriteSpec
from tfmq_fx.core.errors import ArtifactError, ConfigError
from tfmq_fx.core.layer_config import LayerConfig, WeightSpec
from tfmq_fx.serialization import older_formats
from tfmq_fx.serialization.artifact import GRAPH_FILE, ORIGIN_FILE, ORIGIN_TENSORS
from tfmq_fx.serialization.saved_names import OLD_NAMES

ASSETS = Path(__file__).parents[1] / "assets" / "saved-format-4"
NAMES = ["quantized", "bound"]
SOURCES = {"quantized": saved_models.Net, "bound": saved_models.Labelled}


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(ASSETS / "quantized", tmp_path / "model")
    return tmp_path / "model"


def expected(name):
    """The digests of the tensors and the answer that were recorded when the model was saved."""
    digests = json.loads((ASSETS / "digests.json").read_text())[name]
    return digests, safetensors.torch.load_file(ASSETS / "answers.safetensors")[name]


def check_as_recorded(model, name):
    digests, answer = expected(name)
    assert saved_models.digests(model) == digests
    assert torch.equal(saved_models.answer(model), answer)


def downgraded(folder, version):
    """Make of a folder of format 4 what an earlier version wrote: no SHA-256 of the JSON."""
    document = json.loads((folder / GRAPH_FILE).read_text()) | {"format_version": version}
    del document["sha256"]
    (folder / GRAPH_FILE).write_text(json.dumps(document))


def test_the_asset_names_all_that_a_saved_graph_can_name():
    text = (ASSETS / "quantized" / GRAPH_FILE).read_text()
    assert all(f'"{name}"' in text for name in OLD_NAMES)
    assert '"format_version":4' in text
    origin = json.loads((ASSETS / "quantized" / ORIGIN_FILE).read_text())
    assert '"tfmq_fx.effects.inplace_"' in origin["graph"] and origin["samples"]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_format_4_is_loaded_as_it_was(name):
    model = tfmq_fx.load(ASSETS / name)
    check_as_recorded(model, name)
    assert isinstance(model, tfmq_fx.Bound) == (name == "bound")


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_are_exact_and_so_the_same_on_any_processor(name):
    # In twice the digits nothing is rounded off: no order of additions changes the sums.
    model = tfmq_fx.load(ASSETS / name).to(torch.float64)
    x, t, y = saved_models.inputs(4)
    with torch.no_grad():
        found = model(x.double(), t, y.double())
    found = found["sample"] if isinstance(found, dict) else found
    assert torch.equal(found, expected(name)[1].double())


def test_format_3_is_read_too_but_not_what_it_was_made_from(folder):
    downgraded(folder, 3)
    model = tfmq_fx.load(folder)
    check_as_recorded(model, "quantized")
    assert model.origin is None
    with pytest.raises(ConfigError, match="does not remember what it was made from"):
        tfmq_fx.refresh(model, saved_models.Net().eval())


@pytest.mark.parametrize("version", [1, 2])
def test_formats_1_and_2_are_refused_with_what_to_do(folder, version):
    downgraded(folder, version)
    message = rf"format_version {version}, and this tfmq_fx reads 3 to 5; convert the model anew"
    with pytest.raises(ArtifactError, match=message):
        tfmq_fx.load(folder)


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_it_is_of_the_current_format(name, tmp_path):
    calibration = name == "quantized"
    tfmq_fx.save(tfmq_fx.load(ASSETS / name), tmp_path / name, calibration=calibration)
    for file in (GRAPH_FILE, ORIGIN_FILE):
        text = (tmp_path / name / file).read_text()
        assert not [old for old in OLD_NAMES if old in text]
    document = json.loads((tmp_path / name / GRAPH_FILE).read_text())
    assert document["format_version"] == 5
    check_as_recorded(tfmq_fx.load(tmp_path / name), name)
    tensors = [place / name / ORIGIN_TENSORS for place in (ASSETS, tmp_path)]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()


def test_a_current_folder_names_nothing_by_its_module(tmp_path):
    tfmq_fx.save(tfmq_fx.load(ASSETS / "quantized"), tmp_path / "model")
    graph = json.loads((tmp_path / "model" / GRAPH_FILE).read_text())["graph"]
    called = {e["class"] for e in graph["modules"].values() if "class" in e}
    called |= {n["target"] for n in graph["nodes"] if n["op"] == "call_function"}
    assert {*OLD_NAMES.values()} <= called  # all that those formats knew
    ours = {name for name in called if "tfmq_fx" in name}
    assert ours == {"torch.ops.tfmq_fx.timestep_row.default"}


@pytest.mark.parametrize("name", NAMES)
def test_an_older_model_is_refreshed(name):
    model, source = tfmq_fx.load(ASSETS / name), SOURCES[name]().eval()
    captured = model.origin.captured(source)
    x, t, y = saved_models.inputs(4)
    with torch.no_grad():
        assert torch.equal(captured(x, t, y)[0], saved_models.answer(source))
        source.conv.bias.add_(1) if name == "bound" else source.conv_out.bias.add_(1)
    again = tfmq_fx.refresh(model, source)
    assert type(again) is type(model)
    assert not torch.equal(saved_models.answer(again), saved_models.answer(model))


def test_old_names_are_refused_in_a_current_folder(folder, tmp_path):
    tfmq_fx.save(tfmq_fx.load(folder), tmp_path / "current")
    for old, new in OLD_NAMES.items():
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "current", folder)
        document = json.loads((folder / GRAPH_FILE).read_text())
        text = json.dumps(document["graph"]).replace(f'"{new}"', f'"{old}"')
        seal(folder, document | {"graph": json.loads(text)})
        with pytest.raises(ArtifactError, match=r"may not (call|hold a) tfmq_fx"):
            tfmq_fx.load(folder)


@pytest.mark.parametrize("kind", ["class", "target"])
def test_an_older_folder_cannot_name_anything_else(folder, kind):
    def plant(document):
        graph = document["graph"]
        entries = graph["modules"].values() if kind == "class" else graph["nodes"]
        entry = next(e for e in entries if str(e.get(kind)).startswith("tfmq_fx."))
        entry[kind] = "tfmq_fx.graph_json.from_json"

    edit(folder, plant)
    with pytest.raises(ArtifactError, match=r"may not (call|hold a) tfmq_fx.graph_json.from_json"):
        tfmq_fx.load(folder)


@pytest.mark.parametrize("value", [None, 3, "x", [], [3], {}, {"x": 3}, {"class": []}])
def test_older_folders_that_are_damaged_are_refused(folder, value):
    for path in (
        ("graph",),
        ("graph", "nodes"),
        ("graph", "modules"),
        ("extra",),
        ("extra", "record"),
        ("extra", "record", "removed"),
        ("config",),
        ("config", "layers"),
    ):

        def plant(document, path=path):
            *owners, last = path
            for key in owners:
                document = document[key]
            document[last] = value

        shutil.rmtree(folder)
        shutil.copytree(ASSETS / "quantized", folder)
        edit(folder, plant)
        try:
            tfmq_fx.load(folder)  # an empty record or recipe is one
        except ArtifactError as error:
            assert str(folder) in str(error)


# ---------------------------------------------------------------- fields that are gone

LEGACY = {
    "name": "old",
    "layers": {"weights": {"bits": 4, "shuffle": True}, "activations": None},
    "rewrites": {"low_rank": 2, "magic": {"deep": [1]}},
    "attention": {"activations": {"bits": 8}, "probabilities": "adaptive"},
    "mood": "bright",
}


@pytest.fixture
def retired(monkeypatch):
    """The table, with fields that no recipe ever had."""
    table = {
        Config: {"mood": None},
        WeightSpec: {"shuffle": None},
        RewriteSpec: {"magic": None},
        AttentionSpec: {"probabilities": {"adaptive": "uniform"}},
        PrologueSpec: {"taste": None},
    }
    real = older_formats.RETIRED
    merged = {kind: real.get(kind, {}) | table.get(kind, {}) for kind in {**real, **table}}
    monkeypatch.setattr(older_formats, "RETIRED", merged)


def test_fields_and_values_that_are_gone_are_dropped(retired):
    found = older_formats.without_retired(LEGACY, Config)
    assert found == {
        "name": "old",
        "layers": {"weights": {"bits": 4}, "activations": None},
        "rewrites": {"low_rank": 2},
        "attention": {"activations": {"bits": 8}, "probabilities": "uniform"},
    }
    assert LEGACY["mood"] == "bright"  # what was given is left alone


def test_a_bound_model_that_kept_rows_at_fewer_bits_is_exact_now(tmp_path):
    shutil.copytree(ASSETS / "bound", tmp_path / "model")
    edit(
        tmp_path / "model",
        lambda d: d["extra"]["prologue"].update(mode="batched", precision="int8", capacity=2),
    )
    model = tfmq_fx.load(tmp_path / "model")
    assert model.spec == PrologueSpec(conditions=("y",), capacity=2)
    check_as_recorded(model, "bound")


def test_they_are_dropped_where_a_folder_has_them(retired, folder):
    def plant(document):
        document["config"]["mood"] = "bright"
        document["config"]["layers"]["weights"]["shuffle"] = True
        document["extra"]["prologue"] = {"taste": 1}

    edit(folder, plant)
    data = json.loads((folder / ORIGIN_FILE).read_text())
    data["overrides"]["conv_in"] = {"weights": {"bits": 8, "shuffle": False}, "activations": None}
    (folder / ORIGIN_FILE).write_text(json.dumps(data))
    seal(folder, json.loads((folder / GRAPH_FILE).read_text()))
    model = tfmq_fx.load(folder)
    assert model.recipe == saved_models.CONFIG and model.spec == PrologueSpec()
    assert model.origin.overrides == {"conv_in": LayerConfig(weights=WeightSpec(bits=8))}
    check_as_recorded(model, "quantized")


def test_a_current_folder_with_such_a_field_is_refused(retired, folder, tmp_path):
    tfmq_fx.save(tfmq_fx.load(folder), tmp_path / "current")
    edit(tmp_path / "current", lambda d: d["config"].update(mood="bright"))
    with pytest.raises(ArtifactError, match=r"unknown keys \['mood'\]"):
        tfmq_fx.load(tmp_path / "current")


def test_other_fields_are_refused_in_older_folders_too(folder):
    edit(folder, lambda d: d["config"].update(mood="bright"))
    with pytest.raises(ArtifactError, match=r"unknown keys \['mood'\]"):
        tfmq_fx.load(folder)
