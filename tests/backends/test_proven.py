"""proven: a backend that does not answer as the model does is not used, and another one is."""

import functools
import json
import warnings

import pytest
import torch

from tests.backends.cpu.cases import needs_kernels
from tests.backends.faults import Faulty, one_more, scale_off
from tests.backends.test_inductor import data
from tests.backends.test_self_check import deep
from tfmq_fx import BackendWarning, compile, report
from tfmq_fx.backends import auto, eager, float, inductor, openvino
from tfmq_fx.backends.cpu.codes_layer import CpuCodesLayer
from tfmq_fx.core.errors import BackendError, ConfigError

X, T = data(seed=1)[0]


def right(gm, **options):
    return eager.compile_graph(gm)


def wrong(gm, fault=one_more, **options):
    _, lowering = eager.compile_graph(gm)
    return Faulty(gm, "middle", fault).run, lowering


def failing(gm, **options):
    raise BackendError("it lacks an operation")


@pytest.fixture
def using(monkeypatch, tmp_path):
    """Puts other functions in the place of backends' own, all of which can run here."""
    monkeypatch.setenv("TFMQ_FX_CACHE", str(tmp_path))

    def use(**functions):
        for module in (inductor, openvino, float):
            monkeypatch.setattr(module, "unavailable", lambda device: None)
            name = module.__name__.rpartition(".")[2]
            monkeypatch.setattr(module, "compile_graph", functions.get(name, failing))

    return use


def test_a_right_backend_says_how_near_it_is(using):
    using(openvino=right)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BackendWarning)
        compiled = compile(deep(), "openvino")
    assert compiled.backend == "openvino" and compiled.check.passed
    assert compiled.check.backend == "openvino" and len(compiled.check.steps) == 3
    assert str(compiled.check) in compiled.extra_repr()
    found = report(compiled)
    assert f"backend openvino: {compiled.check}" in str(found)
    assert [s["timestep"] for s in found.data["compiled"]["steps"]] == [0, 3, 7]


@pytest.mark.parametrize("fault", [one_more, scale_off], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["inductor", "openvino", "float"])
def test_a_wrong_backend_is_not_used(using, name, fault):
    using(**{name: functools.partial(wrong, fault=fault)})
    model = deep()
    with pytest.warns(BackendWarning) as caught:
        compiled = compile(model, name)
    (text,) = [str(w.message) for w in caught if w.category is BackendWarning]
    assert f"backend {name!r} does not answer as the reference: t = 0: " in text
    assert "dB (at least " in text and "report" in text and "'eager' runs the model" in text
    assert compiled.backend == "eager" and torch.equal(compiled(X, T), model(X, T))
    site, reason = compiled.declined[0]
    assert site == "the whole model" and reason in text
    assert compiled.check is None


def test_the_next_backend_is_tried_before_eager(using):
    using(openvino=wrong, float=right)
    with pytest.warns(BackendWarning, match="'float' runs the model instead"):
        compiled = compile(deep(), "openvino")
    assert compiled.backend == "float" and compiled.check.passed


def test_nothing_is_compared_where_that_is_not_asked_for(using):
    using(inductor=wrong)
    compiled = compile(deep(), "inductor", check=False)
    assert compiled.backend == "inductor" and compiled.check is None
    assert "not compared" in compiled.extra_repr() and "not compared" in str(report(compiled))
    assert not torch.equal(compiled(X, T), deep()(X, T))


def test_a_backend_that_cannot_run_the_model_is_an_error(using):
    using()
    with pytest.raises(BackendError, match="lacks an operation"):
        compile(deep(), "openvino")


def test_auto_takes_the_fastest_of_those_that_are_right(using, tmp_path, monkeypatch):
    """As it really chooses: each runs, is timed, and the wrong one, the fastest, is not taken."""
    millis = {"openvino": 1.0, "float": 2.0, "inductor": 3.0}
    using(inductor=right, openvino=wrong, float=right)
    timed = []
    order = iter(["inductor", "float"])

    def least_millis(call):
        timed.append(call())
        return millis[next(order)]

    monkeypatch.setattr(auto, "_least_millis", least_millis)
    model = deep()
    with pytest.warns(BackendWarning, match="'float' runs the model instead"):
        compiled = compile(model)
    assert compiled.backend == "float" and compiled.check.passed
    assert compiled.millis == {"inductor": 3.0, "float": 2.0} and len(timed) == 2
    assert torch.equal(compiled(X, T), model(X, T))
    assert "does not answer as the reference" in compiled.declined[0][1]
    (kept,) = tmp_path.glob("auto-*.json")
    assert json.loads(kept.read_text())["backend"] == "float"

    using(inductor=right, openvino=right, float=wrong)  # what is kept is compared as well
    order = iter(["inductor", "openvino"])
    with pytest.warns(BackendWarning, match="'openvino' runs the model instead"):
        compiled = compile(model)
    assert compiled.backend == "openvino" and compiled.check.passed
    assert json.loads(kept.read_text())["backend"] == "openvino"
    monkeypatch.setattr(auto, "_least_millis", lambda call: pytest.fail("timed anew"))
    again = compile(model)
    assert again.backend == "openvino" and again.check.passed


def test_auto_runs_eager_where_all_others_are_wrong(using):
    using(inductor=wrong, openvino=wrong, float=failing)
    with pytest.warns(BackendWarning, match="'eager' runs the model instead"):
        compiled = compile(deep())
    assert compiled.backend == "eager" and torch.equal(compiled(X, T), deep()(X, T))
    assert len(compiled.declined) >= 3


@pytest.mark.parametrize("backend", ["auto", "inductor", "openvino", "float", "eager"])
def test_unknown_options_are_errors(backend):
    with pytest.raises(ConfigError, match="speed"):
        compile(deep(), backend, speed=3)


def test_options_of_auto_reach_those_that_take_them(using):
    seen = {}

    def recorded(name):
        def compile_graph(gm, **options):
            seen[name] = options
            return right(gm)

        return compile_graph

    using(**{name: recorded(name) for name in ("inductor", "openvino", "float")})
    compile(deep(), threads=1, precision="f32", dynamic=True, trial=False)
    assert seen == {
        "inductor": {"dynamic": True, "trial": False},
        "openvino": {"threads": 1, "precision": "f32"},
        "float": {"dynamic": True},
    }


def planted(monkeypatch, fault):
    """A kernel of this package that is wrong: in every layer, or in one."""
    forward = CpuCodesLayer.forward

    def wrong_forward(self, codes, scale, *more):
        if fault(self):
            codes = codes + 1
        return forward(self, codes, scale, *more)

    monkeypatch.setattr(CpuCodesLayer, "forward", wrong_forward)


@needs_kernels
def test_a_layer_whose_kernel_is_wrong_runs_in_floating_point(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda gm, **options: gm)
    planted(monkeypatch, lambda layer: getattr(layer, "in_channels", 0) == 16)
    model = deep()
    compiled = compile(model, "inductor")
    assert compiled.backend == "inductor" and compiled.lowered == 2 and compiled.check.passed
    assert [site for site, _ in compiled.declined] == ["middle", "down"]
    for _, reason in compiled.declined:
        assert "runs in floating point: its kernel is " in reason and "dB from the layer" in reason
    step = model.gm.activation_scales.max() * model.gm.leave.weight.abs().max()
    assert ((compiled(X, T) - model(X, T)).abs().max() <= 10 * step).item()


@needs_kernels
def test_a_kernel_that_fails_is_not_used(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda gm, **options: gm)

    def fail(self, *args):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(CpuCodesLayer, "forward", fail)
    compiled = compile(deep(), "inductor")
    assert compiled.lowered == 0 and len(compiled.declined) == 4
    assert "its kernel fails here: RuntimeError: no such instruction" in compiled.declined[0][1]
