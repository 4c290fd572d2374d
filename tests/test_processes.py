"""Two processes of a torch.distributed group do what one does: bit for bit, and up to the order of
sums where gradients are added. Every check is a function of tests/processes_worker.py, run there in
two processes over gloo; they start once for all checks of a kind."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tfmq_fx.core import distributed
from tfmq_fx.core.distributed import pack, unpack

FAST = (
    "exchanged",
    "images",
    "by_inputs",
    "by_scheduler",
    "second_order",
    "failures",
    "disagreement",
    "checkpoints",
    "blocks",
    "evaluated",
)
SLOW = ("recipes", "rounds_and_correction", "by_pipeline")


def run(folder, names):
    """What each process says of each check: nothing, or why it failed."""
    command = [sys.executable, "-m", "tests.processes_worker", str(folder / "rendezvous"), "2"]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(folder), *names],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    finally:
        for process in started:
            process.kill()
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    return run(tmp_path_factory.mktemp("processes"), FAST)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return run(tmp_path_factory.mktemp("processes"), SLOW)


@pytest.mark.parametrize("name", FAST)
def test_two_processes(fast, name):
    assert [results[name] for results in fast] == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_two_processes_at_length(slow, name):
    assert [results[name] for results in slow] == ["", ""]


@pytest.mark.slow
@pytest.mark.sample
def test_a_group_is_started_as_torchrun_says(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from tfmq_fx.core import distributed as processes\n"
        "assert processes.world() == 1\n"
        "with processes.started(), processes.started():\n"
        "    found = processes.exchange(processes.rank(), 'ranks')\n"
        "assert processes.world() == 1\n"
        "os.write(1, f'{found}\\n'.encode())\n"  # whole: both write to one pipe
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.splitlines() == ["[0, 1]"] * 2, done.stderr


def test_without_a_group_there_is_one_process():
    assert (distributed.rank(), distributed.world(), list(distributed.shard_indices(3))) == (
        0,
        1,
        [0, 1, 2],
    )
    value = torch.ones(2)
    (found,) = distributed.exchange(value, "values")
    assert found is value and distributed.from_first(value, "first") is value
    assert distributed.all_reduce_sum(value, "sum") is value
    assert list(distributed.in_order(range(3), str, "words")) == ["0", "1", "2"]
    done = []
    assert list(distributed.shard("ab", lambda: done.append(1))) == ["a", "b"] and not done
    distributed.check_same("anything", {"a": 1})
    with pytest.raises(ValueError, match="own"), distributed.together("a test"):
        raise ValueError("own")


def test_values_come_back_with_their_bits_and_strides():
    tensors = [
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(6, 6)[::2, 1:3],
        torch.randn(1, 4).expand(3, 4),
        torch.tensor(3.5),
        torch.zeros(0, 4, dtype=torch.float16),
        torch.tensor([True, False]),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.tensor([float("nan"), -0.0]),
    ]
    words, found = unpack(pack(({"a": (1, "b")}, tensors)))
    assert words == {"a": (1, "b")}
    for given, came in zip(tensors, found, strict=True):
        assert came.dtype == given.dtype and came.stride() == torch.empty_like(given).stride()
        torch.testing.assert_close(came, given, rtol=0, atol=0, equal_nan=True)
        assert not came.numel() or came.data_ptr() % came.element_size() == 0
    assert unpack(pack(None)) is None
