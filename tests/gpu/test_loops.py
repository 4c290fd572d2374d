"""Compiled models in denoising loops: one graph, recorded or not, whatever step and request."""

import gc

import pytest
import torch

from tests.gpu.models import DEVICE, calls, check_near, converted, exact, told
from tests.test_end_to_end import answer, steps_of
from tfmq_fx import bind_request, compile

DTYPE = torch.bfloat16
AWAY = "none" if DEVICE == "cpu" else "cpu"
MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")


def loop(name, batch=2):
    """Three requests of three steps."""
    return [given for seed in (1, 2, 3) for given in calls(name, DTYPE, batch, seed)]


def in_one_graph(compiled, every, dynamo):
    """What a compiled model answers to all of a loop, for which it is compiled once."""
    found = []
    for i, given in enumerate(every):
        with dynamo.config.patch(error_on_recompile=i > 0):
            found.append(answer(compiled(**given)))
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    return found


@pytest.mark.parametrize(
    "name, mode", [("sd15", "max-autotune"), *(("dit-xl-2", mode) for mode in MODES)]
)
def test_one_graph_for_a_denoising_loop(name, mode, dynamo, kernels):
    done = converted(name, DTYPE, "w8a8")
    compiled = compile(done, "inductor", mode=mode)
    every = loop(name)
    found = in_one_graph(compiled, every, dynamo)
    assert not dynamo.utils.counters["graph_break"]
    for given, output in zip(every, found, strict=True):  # no later call has overwritten it
        expected, reference = exact(name, DTYPE, given), told(done, given)
        check_near(expected, reference, output.float().cpu(), dtype=DTYPE, recipe="w8a8")


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_a_bound_model_in_one_graph(mode, dynamo, kernels):
    name = "dit-xl-2"
    done = converted(name, DTYPE, "w8a8")
    bound = bind_request(done, list(steps_of(name)), offload=AWAY, on_miss="error")
    compiled = compile(bound, "inductor", mode=mode)
    every = loop(name)
    found = in_one_graph(compiled, every, dynamo)
    bound.unbound()  # its weights return to the device, where `done` looks for them
    for given, output in zip(every, found, strict=True):
        expected, reference = exact(name, DTYPE, given), told(done, given)
        check_near(expected, reference, output.float().cpu(), dtype=DTYPE, recipe="w8a8")


def test_other_batch_sizes_are_compiled_too(kernels):
    name = "dit-xl-2"
    done = converted(name, DTYPE, "w8a8")
    compiled = compile(done, "inductor")
    for batch in (2, 1, 3):
        for given in calls(name, DTYPE, batch, seed=4):
            expected, reference = exact(name, DTYPE, given), told(done, given)
            check_near(expected, reference, told(compiled, given), dtype=DTYPE, recipe="w8a8")


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_memory_does_not_grow_with_steps(mode, kernels):
    name = "dit-xl-2"
    compiled = compile(converted(name, DTYPE, "w8a8"), "inductor", mode=mode)
    (first, *rest) = calls(name, DTYPE, 2, seed=1)
    compiled(**first), compiled(**first)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        for given in rest:
            compiled(**given)
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
