"""auto: every backend that can run a model is timed once, and the fastest runs it."""

import json

import pytest
import torch

from tests.backends.test_inductor import Net, converted, data
from tests.toys import seeded
from tfmq_fx import ActivationSpec, LayerConfig, WeightSpec, compile, fold_timesteps
from tfmq_fx.backends import auto, float, inductor, openvino
from tfmq_fx.backends.auto import CANDIDATES, compile_fastest, example_inputs
from tfmq_fx.core.errors import BackendError, ConfigError


@pytest.fixture(scope="module")
def model():
    return converted(seeded(Net).eval())


class Timer:
    """Gives milliseconds in the order of the candidates and runs nothing."""

    def __init__(self, *millis):
        self.left = list(millis)

    def __call__(self, call):
        return self.left.pop(0)


def fastest(model, timer, cache, **options):
    values = example_inputs(model.gm, model.timesteps)
    return compile_fastest(
        model.gm, lambda: values, options=options, progress=False, timer=timer, cache=cache
    )


@pytest.fixture(autouse=True)
def everything_can_run(monkeypatch):
    for module in (inductor, openvino, float):
        monkeypatch.setattr(module, "unavailable", lambda device: None)


@pytest.mark.parametrize("winner", CANDIDATES)
def test_the_fastest_backend_is_taken_and_known_at_the_next_start(model, tmp_path, winner):
    millis = {name: 1.0 if name == winner else 2.0 for name in CANDIDATES}
    path = tmp_path / "kept" / "choice.json"
    found = fastest(model, Timer(*millis.values()), path)
    assert (found.name, found.millis, found.missing) == (winner, millis, [])
    assert json.loads(path.read_text()) == {"backend": winner, "millis": millis}
    again = fastest(model, Timer(), path)  # it would fail if it timed anything
    assert (again.name, again.millis) == (winner, millis)


def test_where_bf16_is_fastest_no_layer_runs_as_integers(model, tmp_path):
    found = fastest(model, Timer(3.0, 3.0, 1.0), tmp_path / "choice.json")
    assert found.lowering.details.get("integer", 0) == 0
    reasons = {d.site: d.reason for d in found.lowering.declined}
    assert set(reasons) == {"enter", "leave"}
    assert reasons["leave"].startswith("backend 'float' computes in ")


def test_a_backend_that_fails_is_named_and_the_others_go_on(model, tmp_path, monkeypatch):
    def fail(gm, **options):
        raise BackendError("OpenVINO lacks aten::something")

    monkeypatch.setattr(openvino, "compile_graph", fail)
    found = fastest(model, Timer(2.0, 1.0), tmp_path / "choice.json")
    assert found.name == "float" and list(found.millis) == ["inductor", "float"]
    assert found.missing == [("openvino", "OpenVINO lacks aten::something")]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"backend": "inductor"}', '{"backend": 3}'])
def test_a_damaged_choice_is_made_anew(model, tmp_path, content):
    path = tmp_path / "choice.json"
    path.write_text(content)
    assert fastest(model, Timer(3.0, 1.0, 2.0), path).name == "openvino"
    assert json.loads(path.read_text())["backend"] == "openvino"


def test_a_choice_that_cannot_be_kept_is_made_all_the_same(model, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    found = fastest(model, Timer(1.0, 2.0, 3.0), tmp_path / "file" / "choice.json")
    assert found.name == "inductor" and "is not kept" in caplog.text


def test_each_option_goes_to_the_backends_that_take_it(model, tmp_path, monkeypatch):
    seen = {}
    for module in (inductor, openvino, float):

        def record(gm, module=module, **options):
            seen[module.__name__.rpartition(".")[2]] = options
            raise BackendError("recorded")

        monkeypatch.setattr(module, "compile_graph", record)
    options = {"dynamic": True, "artifact": "file", "trial": False, "threads": 2}
    assert fastest(model, Timer(), tmp_path / "choice.json", **options).name == "eager"
    kept = {"dynamic": True, "artifact": "file"}
    assert seen == {"inductor": kept | {"trial": False}, "openvino": {"threads": 2}, "float": kept}
    fastest(model, Timer(), tmp_path / "choice.json")
    assert seen == {"inductor": {"trial": True}, "openvino": {}, "float": {}}
    with pytest.raises(
        ConfigError, match="takes sped, treads; inductor, openvino, float take arti"
    ):
        fastest(model, Timer(), tmp_path / "choice.json", threads=2, treads=2, sped=3)


def test_a_graph_without_integers_stays_exact(tmp_path):
    folded = fold_timesteps(seeded(Net).eval(), (0, 3, 7), data()[0])
    path = tmp_path / "choice.json"
    found = fastest(folded, Timer(), path)
    assert found.name == "inductor" and found.millis == {} and not path.exists()


def test_choices_differ_by_graph_size_and_threads(model):
    four = LayerConfig(weights=WeightSpec(bits=4), activations=ActivationSpec())
    other = converted(seeded(Net).eval(), overrides={"leave": four})
    names = list(CANDIDATES)
    found = {auto._digest(model.gm, names), auto._digest(other.gm, names)}
    found |= {auto._digest(model.gm, names[:1])}
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        found |= {auto._digest(model.gm, names)}
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 4


def test_example_inputs_are_what_the_model_takes(model):
    x, t = example_inputs(model.gm, model.timesteps)
    assert x.shape == (4, 4, 6, 6) and x.dtype == torch.float32
    assert t.shape == (4,) and t.dtype == torch.int64 and set(t.tolist()) == {3}
    assert model(x, t).shape == (4, 8)


def test_a_compiled_model_tells_what_was_measured(model, monkeypatch):
    def chosen(gm, inputs, *, options, reference):
        runner, lowering = openvino.compile_graph(gm)
        assert [v.shape for v in inputs()] == [(4, 4, 6, 6), (4,)]
        times, missing = {"openvino": 1.0}, [("float", "why")]
        return auto.CompiledGraph("openvino", runner, lowering, None, times, missing)

    monkeypatch.setattr("tfmq_fx.api.compile_fastest", chosen)
    compiled = compile(model, check=False)
    assert compiled.backend == "openvino" and compiled.millis == {"openvino": 1.0}
    assert compiled.declined[0] == ["the whole model", "why"]
