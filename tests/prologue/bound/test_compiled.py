"""Bound models compiled, and in pipelines of diffusers."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import zoo
from tests.prologue.bound.toys import (
    STEPS,
    TC,
    C,
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
    FLOW_EULER,
    answer,
    calls,
    converted,
    pipeline,
    schedule,
)
from tfmq_fx import (
    bind_request,
    convert,
)
from tfmq_fx import compile as compile_model
from tfmq_fx.backends.inductor import unavailable
from tfmq_fx.quant.quant_layer import QuantLayer
from tfmq_fx.quant.sqnr import sqnr


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


LOOPS = [("flux-dev", "fp"), pytest.param("dit-xl-2", "w8a8", marks=pytest.mark.sample)]


@pytest.mark.slow
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize("name, recipe", LOOPS)
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


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_a_compiled_model_needs_no_quantized_layer_of_the_step() -> None:
    """Kernels have weights in a form of their own; values of a request are still computed."""
    found = bind_request(convert(quantizable()[1], progress=False))
    every = [next(labelled(2)) | {"y": torch.tensor(y)} for y in ([1, 2], [3, 4], [1, 2])]
    inputs = [found.call.bind((), values)[0] for values in every]
    expected = [found.prologue.step_inputs(given) for given in inputs]
    layers = [m for m in found.step.modules() if isinstance(m, QuantLayer)]
    (layer, *_) = [m for m in layers if m.act_bits == 8]  # one that has a kernel
    seen = weakref.ref(layer)
    compiled = compile_model(found, "inductor")
    found.prologue.forget()
    del found, layer, layers, _
    gc.collect()
    assert seen() is None and compiled._feed is not None
    for given, wanted in zip(inputs, expected, strict=True):
        assert all(map(torch.equal, compiled._feed(given), wanted))


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
