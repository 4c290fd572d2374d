"""bench_cpu: what it measures and how it goes on after failures; times are not looked at."""

import fcntl
import importlib.util
import json

import pytest
import torch

from tests.bench import bench_cpu
from tests.bench.bench_cpu import Run, arguments, main
from tests.bench.cpu_models import CASES, exported, first, job
from tests.bench.cpu_results import table
from tests.bench.cpu_timing import kernels
from tests.bench.cpu_variants import BF16, FP32, REFERENCE, VARIANTS
from tests.bench.cpu_workers import Turn, Worker, WorkerError

HAS_OPENVINO = importlib.util.find_spec("openvino") is not None


def settings(folder, **changed):
    return {
        "variant": REFERENCE,
        "case": "cifar10-b4",
        "seed": 0,
        "steps": 2,
        "threads": 1,
        "recipe": "nearest",
        "folder": str(folder),
        "small": True,
    } | changed


def made(case="cifar10-b4", **changed):
    given = settings(None, **changed)
    del given["variant"], given["case"]
    return job(case, **given)


def run(path, *more):
    main(["--tiny", "--repeats", "2", "--steps", "2", "--seed", "3", "--out", str(path), *more])
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_variants_of_a_model_are_rows_of_one_table(tmp_path, capsys):
    path = tmp_path / "found.jsonl"
    more = ["--models", "cifar10-b4", "--variants", "eager*,openvino fp32"]
    (result,) = run(path, *more, "--cache", str(tmp_path))
    assert [*result["rows"]] == [REFERENCE, "openvino fp32"]
    reference, other = result["rows"].values()
    assert reference["sqnr"] is None and len(reference["times"]) == 2
    assert reference["steady_bytes"] > reference["imports_bytes"] > 0
    assert reference["saved_bytes"] == 4 * reference["parameters"]
    if HAS_OPENVINO:
        assert other["ms"] > 0 and other["sqnr"] > 80 and not other["kernels"]
        assert 4 * other["parameters"] < other["saved_bytes"] < 5 * other["parameters"]
    else:
        assert "No module named 'openvino'" in other["failed"]
    printed = capsys.readouterr().out
    assert all(line in printed for line in table(result))
    assert result["machine"]["torch"] == torch.__version__ and "seed 3" in printed


@pytest.mark.slow
@pytest.mark.parametrize("case", ["cifar10-b4", "sd15-b2", "dit-b2", "flux-b1"])
def test_every_variant_is_a_row(case, tmp_path):
    (result,) = run(tmp_path / "found.jsonl", "--models", case)
    assert [*result["rows"]] == [*VARIANTS]
    failed = {name: row["failed"] for name, row in result["rows"].items() if "failed" in row}
    lacking = ("No module named", "unknown backend")
    assert not {name: why for name, why in failed.items() if not any(x in why for x in lacking)}
    for name, row in result["rows"].items():
        if name not in failed:
            assert row["ms"] > 0 and row["fp32_ms"] and row["bf16_ms"], name
            assert row["sqnr"] is None or row["sqnr"] > 12, name  # w4a8: two digits of a few bits
    assert result["rows"]["tfmq_fx w8a8 inductor"]["kernels"]


class Stub:
    """A worker that answers at once."""

    failing = ("torchao int8", "pt2e int8")
    alive: set[str]

    def __init__(self, settings, *, cache, timeout):
        self.name = settings["variant"]
        self.alive.add(self.name)

    def answer(self):
        if self.name == "pt2e int8":
            raise WorkerError("failed: no | such kernel")
        sizes = ("parameters", "imports_bytes", "preparing_bytes", "steady_bytes", "saved_bytes")
        seconds = {"preparing_seconds": 1.0, "start_seconds": 2.0}
        return dict.fromkeys(sizes, 2**20) | seconds | {"sqnr": 30.0, "coverage": [], "note": ""}

    def ask(self, **request):
        if not request:
            return {"kernels": {"qconv": 3}, "idle_ms": 0}
        if self.name == "torchao int8" and request["step"] == 1:
            raise WorkerError("failed: the process ended with status -11")
        return {"ms": 10.0 if "bf16" in self.name else 20.0, "idle_ms": 9.0}

    def tail(self):
        return ""

    def stop(self):
        self.alive.discard(self.name)


@pytest.fixture
def stubs(monkeypatch):
    monkeypatch.setattr(bench_cpu, "Worker", Stub)
    monkeypatch.setattr(bench_cpu, "_PAUSE", 0.0)
    Stub.alive = set()
    yield Stub.alive
    assert not Stub.alive


def test_what_fails_is_a_row_and_the_rest_goes_on(stubs, tmp_path):
    (result,) = run(tmp_path / "found.jsonl", "--models", "dit-b2")
    rows = result["rows"]
    assert [*rows] == [*VARIANTS]
    assert {name for name, row in rows.items() if "failed" in row} == {*Stub.failing}
    lines = list(table(result))
    assert len(lines) == 4 + len(VARIANTS)
    cells = [line.replace("\\|", "").count("|") for line in lines[2:]]
    assert len({*cells}) == 1
    (ours,) = (line for line in lines if "w8a8 inductor" in line)
    assert "| 1.00 | 0.50 | 30.0 |" in ours and "processor time" in ours


def test_waves_have_the_fastest_baselines(stubs, tmp_path):
    args = arguments(["--tiny", "--models", "sd15-b2", "--repeats", "2", "--together", "5"])
    bench = Run("sd15-b2", args, tmp_path, Turn(None))
    waves = []
    for wave in bench.waves():
        waves.append(wave)
        for name in wave:
            bench.rows[name] = {}
        bench.bases = {"fp32_ms": FP32[0], "bf16_ms": BF16[0]}
    assert all(len(wave) <= 7 and len(wave) == len({*wave}) for wave in waves)
    assert waves[0][0] == REFERENCE and {name for wave in waves for name in wave} == {*VARIANTS}
    assert all(wave[:2] == [FP32[0], BF16[0]] for wave in waves[2:])
    bench = Run("sd15-b2", args, tmp_path, Turn(None))
    bench.measure()
    assert bench.rows["tfmq_fx w4a8 auto"]["bf16_ms"] == 10.0


def test_a_worker_tells_why_it_failed(tmp_path):
    worker = Worker(settings(tmp_path, case="none"), cache=tmp_path, timeout=60)
    with pytest.raises(WorkerError, match="failed: KeyError: 'none'"):
        worker.answer()
    assert "Traceback" in worker.tail(100)
    worker.stop()
    worker = Worker(settings(tmp_path), cache=tmp_path, timeout=0.01)
    with pytest.raises(WorkerError, match="no answer within"):
        worker.answer()
    worker = Worker(settings(tmp_path), cache=tmp_path, timeout=60)
    worker.process.kill()
    with pytest.raises(WorkerError, match=r"status -9 \(killed\)"):
        worker.answer()
    worker.stop()


@pytest.mark.parametrize("name", CASES)
def test_inputs_are_the_same_for_every_variant_and_others_for_calibration(name):
    one, same, other = made(name), made(name), made(name, seed=1)
    sample = next(iter(one.evaluation[0]))
    values = [given[sample] for given in (*one.evaluation, *one.calibration, *other.evaluation)]
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    for a, b in zip(one.evaluation, same.evaluation, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    for batches in (one.evaluation, one.calibration):
        assert [given["timestep"][0].item() for given in batches] == one.timesteps.tolist()
    parameters = zip(one.model.parameters(), same.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in parameters)


def test_the_exported_model_answers_as_the_model():
    given = made()
    inputs = given.evaluation[1]
    with torch.no_grad():
        expected = first(given.model(**inputs))
        found = exported(given).module()(*inputs.values())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_turns_are_taken_with_a_lock(tmp_path, monkeypatch):
    path = tmp_path / "lock"

    def is_free():
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    with Turn(path) as turn:
        assert not is_free()
        turn.pause()
        assert not is_free()
    assert is_free()


def test_arguments_are_checked(capsys):
    for wrong in (["--models", "none"], ["--variants", "none"], ["--repeats", "3"]):
        with pytest.raises(SystemExit):
            arguments(wrong)
    assert arguments(["--variants", "pt2e*"]).variants == [REFERENCE, "pt2e int8"]
    assert arguments([]).variants == [*VARIANTS] and arguments([]).seed != arguments([]).seed


def test_kernels_of_a_float_product_are_none():
    assert kernels(lambda: torch.ones(2, 2) @ torch.ones(2, 2)) == {}
