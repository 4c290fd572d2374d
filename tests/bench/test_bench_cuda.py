"""bench_cuda: what it measures and how it goes on after failures; times are not looked at."""

import json
import time

import pytest
import torch

from tests.bench import bench_cuda, cuda_kernels, cuda_variants
from tests.bench.bench_cuda import arguments, key_of, plan, table, work
from tests.bench.cuda_models import CASES, Request, build, recipe, timesteps, tiny
from tests.bench.cuda_results import BROKEN, Results, supervise
from tests.bench.cuda_timing import full_precision
from tests.bench.cuda_variants import BASE, MAIN, REST
from tfmq_fx.backends.cuda.autotune import arguments as operands


def small(*more):
    return arguments(["--device", "cpu", "--tiny", "--repeats", "2", *more])


def in_time():
    return time.time() + 600


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "results.json")


@pytest.mark.slow
def test_every_variant_of_a_model_is_a_row(results):
    args = small("--only", "dit-b2")
    assert work(args, results, in_time()) == 0
    rows = results.data["rows"]
    # torchao's fp8 asks for a device with fp8
    assert {*rows} == {key_of("dit-b2", v) for v in (*MAIN, *REST) if v != "torchao fp8"}
    assert json.loads(results.path.read_text()) == results.data
    assert "capability" in results.data["failed"][key_of("dit-b2", "torchao fp8")]
    for key, row in rows.items():
        assert row["ms"] > 0 and row["base_ms"] > 0 and row["repeats"] == 2, key
        # 8 bits of mantissa in bf16, 3 in fp8, 16 values in int4: 6.02 dB a bit, less what the
        # layers add up to in a model of two blocks
        assert row["sqnr"] > 15 and row["recompiled"] == 0, key
        assert row["saved_bytes"] > 0 or "torchao" in key
    assert "request_ms" in rows[key_of("dit-b2", "fp8 prologue")]
    assert "w4a8 prologue" in "".join(table(results, args))


def test_what_fails_is_a_row_and_the_rest_goes_on(results, monkeypatch):
    make = cuda_variants.Bench.make

    def broken(self, variant):
        if variant == "bf16 eager":
            raise RuntimeError("no such\nkernel")
        return make(self, variant)

    monkeypatch.setattr(cuda_variants.Bench, "make", broken)
    args = small("--only", "dit-b2", "--variants", f"{BASE},w8a8 prologue,bf16 eager")
    assert work(args, results, in_time()) == 0
    rows = results.data["rows"]
    assert [*rows] == [key_of("dit-b2", v) for v in (BASE, "w8a8 prologue")]
    assert results.data["failed"] == {
        key_of("dit-b2", "bf16 eager"): "failed: RuntimeError: no such"
    }
    assert all(row["ms"] > 0 and row["sqnr"] > 25 for row in rows.values())
    lines = list(table(results, args))
    assert len(lines) == 5 and {line.count("|") for line in lines} == {10}


def test_what_has_no_time_is_skipped_and_says_so(results):
    args = small("--only", "dit-b2", "--variants", f"{BASE},bf16 eager")
    assert work(args, results, time.time()) == 0
    lines = list(table(results, args))
    assert all("skipped: 0 s left" in line for line in lines[2:]) and len(lines) == 4


def test_a_device_that_breaks_ends_the_process(results, monkeypatch):
    monkeypatch.setattr(bench_cuda, "is_usable", lambda device: False)
    monkeypatch.setattr(cuda_variants.Bench, "make", lambda self, variant: 1 / 0)
    args = small("--only", "dit-b2", "--variants", f"{BASE},bf16 eager")
    assert work(args, results, in_time()) == BROKEN
    assert [*results.data["failed"]] == [key_of("dit-b2", BASE)]


def test_a_process_that_dies_is_followed_by_one_for_the_rest(tmp_path):
    path = tmp_path / "results.json"

    def start(deadline):
        """Does a, dies of b, runs into a broken device at c, does d."""
        found = Results(path)
        for key in "abcd":
            if key in found.data["rows"] or key in found.data["failed"]:
                continue
            found.write(started=key)
            if key == "b":
                return -11
            if key == "c":
                found.fail(key, "failed: illegal access")
                return BROKEN
            found.add(key, {})
            found.write(started=None)
        return 0

    assert supervise(start, lambda: Results(path), 0) is None
    data = Results(path).data
    assert [*data["rows"]] == ["a", "d"]
    assert data["failed"] == {
        "b": "failed: the process ended with status -11",
        "c": "failed: illegal access",
    }
    path.unlink()
    assert (
        supervise(lambda deadline: 1, lambda: Results(path), 0) == "the process ended with status 1"
    )
    Results(path).write(started="a")
    assert supervise(lambda deadline: None, lambda: Results(path), 0) is None
    assert Results(path).data["failed"] == {"a": "skipped: out of time"}


def test_the_most_telling_comes_first_and_every_round_has_its_baseline():
    order = plan(small())
    assert [name for name, _ in order] == [*CASES, *CASES] and order[0][0] == "sdxl-b2"
    assert all(variants[0] == BASE for _, variants in order)
    for name in CASES:
        found = {v for each, variants in order for v in variants if each == name}
        assert found == {v for v in (*MAIN, *REST) if CASES[name].bound or "prologue" not in v}
    with pytest.raises(SystemExit):
        small("--only", "nothing")


@pytest.mark.parametrize("name", ["sd15-b8", "flux-b1", "pixart-b2", "dit-b2"])
def test_inputs_are_fresh_and_fixed_where_a_request_fixes_them(name):
    case = tiny(CASES[name])
    model = build(case, "cpu", full=False)
    request = Request(case, model)
    first, second = request.inputs(), request.inputs()
    steps = timesteps(case)
    assert first["timestep"].tolist() == steps[:1].expand(2).tolist()
    assert second["timestep"].tolist() == steps[1:2].expand(2).tolist()
    sample = next(iter(first))
    assert not torch.equal(first[sample], second[sample])
    conditions = {*first} - {sample, "timestep"}
    assert all(first[c] is second[c] for c in conditions)
    request.new_conditions()
    third = request.inputs()
    changing = conditions & {"encoder_hidden_states", "pooled_projections", "class_labels"}
    assert changing and all(third[c] is not first[c] for c in changing)
    with torch.no_grad():
        model(**third)


@pytest.mark.parametrize("name", ["w8a8", "fp8", "w4a8"])
def test_recipes_with_and_without_tables(name):
    tables, without = recipe(name, tables=True), recipe(name, tables=False)
    assert tables.temporal.mode == "table" and without.temporal.mode == "tib"
    acts = [config.layers.activations.per_timestep for config in (tables, without)]
    assert acts == [True, False] and tables.layers.weights == without.layers.weights


def test_kernels_are_timed_and_compared(results):
    args = small("--kernels")
    assert cuda_kernels.work(args, results, in_time()) == 0
    names = cuda_kernels.problems(tiny=True)
    kinds = (cuda_kernels.TORCH, *cuda_kernels.FORMATS)
    assert [*results.data["rows"]] == [f"{name} / {kind}" for name in names for kind in kinds]
    # the kernel is the reference here
    assert all(row.get("error", 0) == 0 for row in results.data["rows"].values())
    lines = list(cuda_kernels.table(results, args))
    assert len(lines) == 3 + len(names) and len({line.count("|") for line in lines[1:]}) == 1


def test_a_wrong_kernel_is_told(monkeypatch):
    (problem, *_) = cuda_kernels.problems(tiny=True).values()
    right = cuda_kernels.conv2d
    monkeypatch.setattr(cuda_kernels, "conv2d", lambda **given: right(**given) * 1.02)
    assert cuda_kernels.ours(problem, "cpu", 1)["wrong"]
    monkeypatch.setattr(cuda_kernels, "conv2d", lambda **given: right(**given) * float("nan"))
    assert cuda_kernels.ours(problem, "cpu", 1)["wrong"]


def test_a_format_that_never_runs_is_left_out(results):
    for i in range(3):
        assert not cuda_kernels.is_hopeless("fp8", results)
        results.fail(f"shape {i} / fp8", "failed: illegal access")
    assert cuda_kernels.is_hopeless("fp8", results) and not cuda_kernels.is_hopeless(
        "int8", results
    )
    results.add("shape 3 / fp8", {})
    assert not cuda_kernels.is_hopeless("fp8", results)


def test_every_shape_can_be_made():
    for name, problem in cuda_kernels.problems(tiny=False).items():
        assert problem.rows > 0 and cuda_kernels.sets(problem) >= 2, name
        for kind in cuda_kernels.FORMATS:
            assert cuda_kernels.candidates(cuda_kernels.with_format(problem, kind)), name
    for problem in cuda_kernels.problems(tiny=True).values():
        packed = cuda_kernels.with_format(problem, "int4")
        assert operands(packed, torch.device("cpu"))["weights"][0].dtype == torch.uint8


def test_settings_of_torch_are_restored():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    with pytest.raises(ZeroDivisionError), full_precision():
        assert not torch.backends.cudnn.allow_tf32 and not torch.is_grad_enabled()
        raise ZeroDivisionError
    (problem, *_) = cuda_kernels.problems(tiny=True).values()
    cuda_kernels.torch_times(problem, "cpu")
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == before
    assert torch.is_grad_enabled()
